"""Files with what must stay secret: one line, not readable by others."""

from __future__ import annotations

import os
from pathlib import Path

from sllm_actor.errors import ConfigInvalid
from sllm_actor.runtime import Security

MAX_SECRET_BYTES = 4096


def read_secret_file(path: str, knob: str) -> str:
    """Read the secret that `knob` names the file of; nothing where `path` is empty.

    Raises:
        ConfigInvalid: it can't be read, is empty, or others may read it.
    """
    if not path:
        return ""
    try:
        with open(Path(path).expanduser(), encoding="utf-8") as opened:
            if os.fstat(opened.fileno()).st_mode & 0o077:
                raise ConfigInvalid(f"{knob}: others may read {path}; chmod 600 it", param=knob)
            secret = opened.read(MAX_SECRET_BYTES).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{knob}: {path} can't be read: {error}", param=knob) from None
    if not secret:
        raise ConfigInvalid(f"{knob}: {path} is empty", param=knob)
    return secret


def read_cluster_secret(path: str) -> Security:
    """Read how this node and others prove that they belong together; nothing where `path` is empty.

    Raises:
        ConfigInvalid: the file is wrong, or the secret too short.
    """
    secret = read_secret_file(path, "cluster_secret_file").encode()
    try:
        return Security(secret=secret)
    except ConfigInvalid as error:
        raise ConfigInvalid(f"cluster_secret_file: {error.message}", param="cluster_secret_file") from None
