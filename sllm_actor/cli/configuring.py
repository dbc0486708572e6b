"""A node's configuration from the flags of a verb, the variables and a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sllm_actor.config import Resolved, resolve


def configure(
    file: Path | None,
    data_dir: str | None,
    extra: list[str] | None,
    *,
    host: str | None = None,
    port: int | None = None,
    key_file: str | None = None,
    listen: str | None = None,
    secret_file: str | None = None,
    node_id: str | None = None,
    metadata: str | None = None,
    roles: str | None = None,
) -> Resolved:
    """Put flags, variables and file together."""
    flags: dict[str, Any] = {}
    for text in extra or ():
        name, _, value = text.partition("=")
        flags[name.strip()] = value
    named = {
        "data_dir": data_dir, "host": host, "port": port, "api_key_file": key_file,
        "listen": listen, "cluster_secret_file": secret_file, "node_id": node_id, "metadata": metadata,
        "roles": roles,
    }  # fmt: skip
    flags |= {name: value for name, value in named.items() if value is not None}
    return resolve(file, os.environ, flags)
