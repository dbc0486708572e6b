"""A file to measure a device with: without a name, full of bytes that nobody compresses, written past the page cache.

Having no name, it is gone with the last descriptor of it, whatever ends the process. Blocks.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from sllm_actor.errors import WriteFailed
from sllm_actor.loader.mover import FilePlan

_NOT_OFFERED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


class Scratch:
    """A preallocated file of whole blocks in a folder; `direct` tells whether writes go past the page cache."""

    def __init__(self, folder: Path, size_bytes: int, block_bytes: int) -> None:
        """Take the room.

        Raises:
            WriteFailed: the disk is full, or refuses.
        """
        assert size_bytes % block_bytes == 0, (size_bytes, block_bytes)
        self.folder, self.size_bytes, self.block_bytes = folder, size_bytes, block_bytes
        with ExitStack() as stack:
            try:
                self._file = stack.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0))
                os.posix_fallocate(self._file.fileno(), 0, size_bytes)
                self._fd, self.direct = _opened(self.path)
            except OSError as wrong:
                raise _failed(folder, wrong) from None
            stack.callback(os.close, self._fd)
            self._block = stack.enter_context(self._random_block())
            self._stack = stack.pop_all()

    @property
    def path(self) -> str:
        """Where this process can open it."""
        return f"/proc/self/fd/{self._file.fileno()}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _random_block(self) -> mmap.mmap:
        block = mmap.mmap(-1, self.block_bytes)  # Page-aligned, as O_DIRECT wants it.
        block[:] = os.urandom(self.block_bytes)
        return block

    def write(self, number: int) -> int:
        """Write a block in its place, which comes around after the last; give the bytes that were taken. Any thread.

        Raises:
            OSError: the disk refused.
        """
        return self._put(number, self._block)

    def _put(self, number: int, block: mmap.mmap) -> int:
        return os.pwrite(self._fd, block, number * self.block_bytes % self.size_bytes)

    def fill(self) -> None:
        """Write all of it once, with other bytes in each block, and keep nothing of it in the page cache.

        Raises:
            WriteFailed: the disk refused.
        """
        try:
            for number in range(self.size_bytes // self.block_bytes):
                with self._random_block() as block:
                    self._put(number, block)
            os.fsync(self._fd)
        except OSError as wrong:
            raise _failed(self.folder, wrong) from None
        self.evict()

    def evict(self) -> None:
        """Ask that nothing of it stays in the page cache."""
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def plan(self, chunks: int) -> FilePlan:
        """Describe it to a byte mover. It fills `chunks` over and over, since nobody looks at what is in them."""
        found = os.fstat(self._fd)
        return FilePlan(
            path=self.path,
            size_bytes=self.size_bytes,
            mtime_ns=found.st_mtime_ns,
            inode=found.st_ino,
            chunks=tuple(number % chunks for number in range(self.size_bytes // self.block_bytes)),
        )


class Writers:
    """Threads that write a scratch file's blocks, front to back and again, from `start` to `stop`."""

    def __init__(self, scratch: Scratch, threads: int) -> None:
        self._scratch = scratch
        self._numbers = itertools.count()
        self._begun = threading.Event()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._written_bytes = 0  # Guarded by _lock, as is the next.
        self._error: OSError | None = None
        self._threads = [threading.Thread(target=self._work, name=f"sllm-writer-{k}") for k in range(threads)]
        self._started: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to write; `stop` must follow."""
        try:
            for thread in self._threads:
                thread.start()
                self._started.append(thread)
        except BaseException:
            self.stop()
            raise

    @property
    def written_bytes(self) -> int:
        """What has been written so far."""
        with self._lock:
            return self._written_bytes

    def until_begun(self) -> None:
        """Wait until the first block is written, or one has failed."""
        self._begun.wait()

    def wait(self, duration_s: float) -> None:
        """Let them write for so long, or until one fails."""
        self._stopping.wait(duration_s)

    def stop(self) -> None:
        """End the threads, each after the block that it writes."""
        self._stopping.set()
        for thread in self._started:
            thread.join()

    def check(self) -> None:
        """See that none has failed.

        Raises:
            WriteFailed: one has.
        """
        with self._lock:
            if self._error is not None:
                raise _failed(self._scratch.folder, self._error)

    def _work(self) -> None:
        try:
            while not self._stopping.is_set():
                taken = self._scratch.write(next(self._numbers))
                with self._lock:
                    self._written_bytes += taken
                self._begun.set()
        except OSError as wrong:
            with self._lock:
                self._error = wrong
            self._stopping.set()
            self._begun.set()


def _opened(path: str) -> tuple[int, bool]:
    """Open for writing past the page cache; where that is not offered, so that each write waits for the device."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT), True
    except OSError as wrong:
        if wrong.errno not in _NOT_OFFERED:
            raise
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DSYNC), False


def _failed(folder: Path, wrong: OSError) -> WriteFailed:
    return WriteFailed(f"{folder}: a scratch file can't be written: {wrong.strerror}")
