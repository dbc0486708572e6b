"""Write the files of a checkpoint folder, digesting every byte on its way.

Blocking, one file at a time, in bounded memory. Knows neither where tensors come from nor how a folder becomes
visible: it is given blocks, and a folder that nobody else looks at yet.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from sllm_actor.checkpoint.digests import ChunkDigests, digest
from sllm_actor.checkpoint.layout import FileLayout
from sllm_actor.checkpoint.manifest import FileRecord
from sllm_actor.errors import WriteFailed
from sllm_actor.units import format_bytes

BLOCK_BYTES = 4 * 2**20
_GATHER_BYTES = 2**20


class DigestingFile:
    """A new file, digested chunk by chunk while it is written. Small writes are gathered."""

    def __init__(self, path: Path, chunk_bytes: int) -> None:
        self._path = path
        self._gathered = bytearray()
        self._digests = ChunkDigests(chunk_bytes)
        self.size_bytes = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags, 0o666)
        except OSError as wrong:
            raise _failed(path, wrong) from wrong

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes.

        Raises:
            WriteFailed: the disk is full, or fails.
        """
        self.size_bytes += len(data)
        if len(data) < _GATHER_BYTES:
            self._gathered += data
        else:
            self._flush()
            self._put(memoryview(data))
        if len(self._gathered) >= _GATHER_BYTES:
            self._flush()

    def finish(self) -> tuple[bytes, ...]:
        """Write what is gathered, wait until the disk has all of it, and return the digests.

        Raises:
            WriteFailed: the disk is full, or fails.
        """
        self._flush()
        try:
            os.fsync(self._fd)
        except OSError as wrong:
            raise _failed(self._path, wrong) from wrong
        return self._digests.finish()

    def _flush(self) -> None:
        if self._gathered:
            self._put(memoryview(bytes(self._gathered)))
            self._gathered.clear()

    def _put(self, view: memoryview) -> None:
        self._digests.update(view)
        at = 0
        try:
            while at < len(view):
                at += os.write(self._fd, view[at:])
        except OSError as wrong:
            raise _failed(self._path, wrong) from wrong


def write_weights(path: Path, layout: FileLayout, blocks: Iterable[memoryview], chunk_bytes: int) -> FileRecord:
    """Write one weight file: its header, then `blocks`, which bring the bytes of its tensors and pads in order.

    Raises:
        WriteFailed: the disk is full, or fails.
    """
    with DigestingFile(path, chunk_bytes) as file:
        file.write(layout.header)
        for block in blocks:
            file.write(block)
        digests = file.finish()
        assert file.size_bytes == layout.size_bytes, "the blocks bring what the layout says"
    return FileRecord(
        path.name, layout.size_bytes, digest(layout.header).hex(), tuple(chunk.hex() for chunk in digests)
    )


def write_bytes(path: Path, raw: bytes) -> None:
    """Write a small file and wait until the disk has it.

    Raises:
        WriteFailed: the disk is full, or fails.
    """
    with DigestingFile(path, BLOCK_BYTES) as file:
        file.write(raw)
        file.finish()


def write_in_new_folder(path: Path, raw: bytes) -> None:
    """Write a small file as `write_bytes` does, and before it the folder that it is alone in.

    Raises:
        WriteFailed: the disk is full, or fails, or the folder is there.
    """
    folder = path.parent
    try:
        folder.mkdir()
        write_bytes(path, raw)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as wrong:
        raise _failed(folder, wrong) from wrong


def check_free(folder: Path, needed_bytes: int) -> None:
    """Refuse before the first byte what the disk has no room for.

    Raises:
        WriteFailed: it has not; the message has both figures.
    """
    try:
        found = os.statvfs(folder)
    except OSError as wrong:
        raise _failed(folder, wrong) from wrong
    free_bytes = found.f_bavail * found.f_frsize
    if needed_bytes > free_bytes:
        raise WriteFailed(
            f"{folder} has {format_bytes(free_bytes)} free and {format_bytes(needed_bytes)} are to be written"
        )


def _failed(path: Path, wrong: OSError) -> WriteFailed:
    return WriteFailed(f"{path} can't be written: {wrong.strerror}")
