"""A file as it was described: opened only if it is still that one. Blocks."""

from __future__ import annotations

import os
import stat

from sllm_actor.errors import CheckpointChanged


def open_described(path: str, size_bytes: int, mtime_ns: int, inode: int) -> int:
    """Open the described file for reading; return its descriptor.

    Raises:
        CheckpointChanged: it is gone, or another one now.
        OSError: it can't be opened.
    """
    try:
        # O_NONBLOCK: a pipe put in the file's place must not hold a thread.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointChanged(f"{path} is gone") from None
    try:
        check_unchanged(fd, path, size_bytes, mtime_ns, inode)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_unchanged(fd: int, path: str, size_bytes: int, mtime_ns: int, inode: int) -> None:
    """Compare an open file with its description.

    Raises:
        CheckpointChanged: it is another one, or was written to.
    """
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointChanged(f"{path} is no longer a regular file")
    if found.st_size != size_bytes:
        raise CheckpointChanged(f"{path} has {found.st_size} bytes and had {size_bytes} when it was registered")
    if (found.st_ino, found.st_mtime_ns) != (inode, mtime_ns):
        raise CheckpointChanged(f"{path} was replaced or rewritten since it was registered")
