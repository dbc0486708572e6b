"""The node's own folder on disk, held by one living node at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import NamedTuple

from sllm_actor.errors import ConfigInvalid, DataFolderInUse

LOCK = "node.lock"
# A process and an address.
_MAX_LOCK_BYTES = 1024


class Holder(NamedTuple):
    """The process that holds a folder; `url` is where it serves, empty as long as it does not."""

    pid: int
    url: str


class DataFolder:
    """Owns the folder from `open` to `close`; the kernel gives it free when the process ends, however it ends."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def open(cls, path: Path) -> DataFolder:
        """Create the folder where it is missing, and take it.

        Raises:
            DataFolderInUse: another living node holds it; the message names its process.
            ConfigInvalid: it can't be made or written.
        """
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigInvalid(f"data_dir: {path} can't be used: {error.strerror}", param="data_dir") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            holder = last_holder(path)
            pid = holder.pid if holder else "unknown"
            raise DataFolderInUse(
                f"the data folder {path} is held by another living node (process {pid}); "
                "stop it, or choose another with --data-dir",
                param="data_dir",
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return cls(path, fd)

    def serve_at(self, url: str) -> None:
        """Write down where the holder serves, for whoever finds the folder held."""
        os.pwrite(self._fd, f"{os.getpid()}\n{url}\n".encode(), 0)

    def close(self) -> None:
        """Give the folder free."""
        os.close(self._fd)


def last_holder(path: Path) -> Holder | None:
    """Give what its holder has written into a folder: the one of now, where it is held."""
    try:
        with (path / LOCK).open("rb") as lock:
            pid, url, *_ = [*lock.read(_MAX_LOCK_BYTES).decode().split("\n"), ""]
        return Holder(int(pid), url)
    except (OSError, ValueError):
        return None
