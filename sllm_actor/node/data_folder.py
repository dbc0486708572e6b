"""The node's own folder on disk, held by one living node at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from sllm_actor.errors import ConfigInvalid, DataFolderInUse

LOCK = "node.lock"


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
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise DataFolderInUse(
                f"the data folder {path} is held by another living node (process {holder}); "
                "stop it, or choose another with --data-dir",
                param="data_dir",
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return cls(path, fd)

    def close(self) -> None:
        """Give the folder free."""
        os.close(self._fd)
