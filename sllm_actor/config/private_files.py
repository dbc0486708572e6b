"""Files with what must stay secret: read whole, and only where nobody else may read them."""

from __future__ import annotations

import os
from pathlib import Path

from sllm_actor.errors import ConfigInvalid


def others_may_read(status: os.stat_result, reader: int) -> bool:
    """Tell whether a file's mode lets anybody but its reader at it.

    What root hands to a service that is not root has its group's bit for reading: a Secret in a pod with an `fsGroup`,
    and a credential of systemd, where that bit is the mask of the service's own entry in the access list. PostgreSQL
    has the same rule for its keys.
    """
    handed_over = status.st_uid == 0 and reader != 0
    return bool(status.st_mode & (0o037 if handed_over else 0o077))


def read_private_file(path: str, knob: str, max_bytes: int) -> str:
    """Read the file that `knob` names.

    Raises:
        ConfigInvalid: it can't be read, is too long or empty, or others may read it.
    """
    try:
        with Path(path).expanduser().open("rb") as opened:
            if others_may_read(os.fstat(opened.fileno()), os.geteuid()):
                raise ConfigInvalid(f"{knob}: others may read {path}; chmod 600 it", param=knob)
            raw = opened.read(max_bytes + 1)
            text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{knob}: {path} can't be read: {error}", param=knob) from None
    if len(raw) > max_bytes:
        raise ConfigInvalid(f"{knob}: {path} is larger than {max_bytes} bytes", param=knob)
    if not text.strip():
        raise ConfigInvalid(f"{knob}: {path} is empty", param=knob)
    return text
