"""The cluster's secret, from its file."""

from __future__ import annotations

from sllm_actor.config.private_files import read_private_file
from sllm_actor.errors import ConfigInvalid
from sllm_actor.runtime import Security

MAX_SECRET_BYTES = 4096
KNOB = "cluster_secret_file"


def read_cluster_secret(path: str) -> Security:
    """Read how this node and others prove that they belong together; nothing where `path` is empty.

    Raises:
        ConfigInvalid: the file is wrong, or the secret too short.
    """
    secret = read_private_file(path, KNOB, MAX_SECRET_BYTES).strip().encode() if path else b""
    try:
        return Security(secret=secret)
    except ConfigInvalid as error:
        raise ConfigInvalid(f"{KNOB}: {error.message}", param=KNOB) from None
