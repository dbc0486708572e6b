"""Read a small file whole, believing neither its size nor its kind."""

from __future__ import annotations

from pathlib import Path

from sllm_actor.errors import CheckpointInvalid


def read_bounded(path: Path, max_bytes: int, error: type[CheckpointInvalid]) -> bytes:
    """Return the content of a regular file of at most `max_bytes`; raise `error` where it is none, or can't be read."""
    try:
        # A regular file only: a pipe would be waited on for ever.
        if not path.is_file():
            raise error(f"{path} is not a file")
        with path.open("rb") as opened:
            raw = opened.read(max_bytes + 1)
    except OSError as wrong:
        raise error(f"{path} can't be read: {wrong.strerror}") from None
    if len(raw) > max_bytes:
        raise error(f"{path} is longer than {max_bytes} bytes")
    return raw
