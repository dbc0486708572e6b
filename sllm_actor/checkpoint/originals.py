"""What a conversion reads: tensors of a folder by name, as blocks of bytes.

Safetensors files are read here with `pread` into one bounded buffer; pickles are read by a child process
(`pickles.py`). Interprets no byte of a tensor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import xxhash

from sllm_actor.checkpoint.folder import Checkpoint, WeightFile
from sllm_actor.checkpoint.layout import Described, is_pad
from sllm_actor.checkpoint.manifest import OriginFormat
from sllm_actor.checkpoint.partitions import Runs
from sllm_actor.checkpoint.safetensors_header import Tensor
from sllm_actor.errors import CheckpointChanged, CheckpointHeaderInvalid, ReadFailed

BLOCK_BYTES = 4 * 2**20


def read_blocks(fd: int, path: Path, begin: int, length: int, buffer: memoryview) -> Iterator[memoryview]:
    """Give bytes of an open file as they fill the buffer, which the next block overwrites.

    Raises:
        ReadFailed: they can't be read.
        CheckpointChanged: the file ends before them.
    """
    end = begin + length
    while begin < end:
        block = buffer[: end - begin]
        try:
            got = os.preadv(fd, [block], begin)
        except OSError as wrong:
            raise ReadFailed(f"{path} can't be read: {wrong.strerror}") from wrong
        if got == 0:
            raise CheckpointChanged(f"{path} has become shorter while it was read")
        yield block[:got]
        begin += got


MAX_PAD_BYTES = 64


class Original(Protocol):
    """The tensors of what is converted, in the order in which its files have them."""

    format: OriginFormat
    tensors: Sequence[Described]
    aliases: Mapping[str, str]
    metadata: Mapping[str, str]
    generation: str

    def read(self, name: str, runs: Runs) -> Iterator[memoryview]:
        """Give the bytes of `runs` of a tensor in order; each block is valid until the next is asked for.

        Raises:
            ReadFailed, CheckpointChanged, ConversionFailed: they can't be had.
        """

    def finish(self) -> None:
        """Check, after the last byte, that nothing has changed while it was read.

        Raises:
            CheckpointChanged: it has.
        """

    def close(self) -> None:
        """Let go of files and processes."""


class _Place(NamedTuple):
    file: WeightFile
    tensor: Tensor


class SafetensorsFolder:
    """The tensors of a folder of safetensors, stock or converted; pads are left out."""

    format = OriginFormat.SAFETENSORS

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._places: dict[str, _Place] = {}
        self._fds: dict[str, int] = {}
        self._buffer = memoryview(bytearray(BLOCK_BYTES))
        metadata: dict[str, str] = {}
        for file in checkpoint.files:
            metadata = file.header.metadata | metadata
            for tensor in file.header.tensors:
                if not is_pad(tensor.name):
                    self._places[tensor.name] = _Place(file, tensor)
                elif tensor.dtype != "U8" or tensor.end - tensor.begin >= MAX_PAD_BYTES:
                    raise CheckpointHeaderInvalid(
                        f"{checkpoint.file_path(file)}: tensor {tensor.name!r} has a name that only pads may have"
                    )
        self.metadata: Mapping[str, str] = metadata
        self.tensors: Sequence[Described] = [
            Described(tensor.name, tensor.dtype, tensor.shape, tensor.end - tensor.begin)
            for _, tensor in self._places.values()
        ]
        self.aliases: Mapping[str, str] = checkpoint.aliases
        try:
            self.generation = self._open_all()
        except BaseException:
            self.close()
            raise

    def _open_all(self) -> str:
        """Open every file, so that what is read is what was described, and digest names, sizes and headers."""
        generation = xxhash.xxh3_128()
        for file in self._checkpoint.files:
            path = self._checkpoint.file_path(file)
            try:
                self._fds[file.name] = fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                self._check_unchanged(file)
                header = xxhash.xxh3_128()
                for begin in range(0, file.header.data_begin, BLOCK_BYTES):
                    header.update(os.pread(fd, min(BLOCK_BYTES, file.header.data_begin - begin), begin))
                # Blocks are asked for one after the other: let the next be on its way meanwhile.
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            except OSError as wrong:
                raise ReadFailed(f"{path} can't be read: {wrong.strerror}") from wrong
            generation.update(f"{file.name}:{file.size_bytes}:{header.hexdigest()};".encode())
        return generation.hexdigest()

    def read(self, name: str, runs: Runs) -> Iterator[memoryview]:
        """Give the bytes of `runs` of a tensor."""
        file, tensor = self._places[name]
        assert runs.begin + runs.stride * max(0, runs.count - 1) + runs.length <= tensor.end - tensor.begin
        fd, path = self._fds[file.name], self._checkpoint.file_path(file)
        for begin, length in runs.ranges():
            yield from read_blocks(fd, path, tensor.begin + begin, length, self._buffer)

    def _check_unchanged(self, file: WeightFile) -> None:
        found = os.fstat(self._fds[file.name])
        if (found.st_size, found.st_mtime_ns, found.st_ino) != (file.size_bytes, file.mtime_ns, file.inode):
            raise CheckpointChanged(f"{self._checkpoint.file_path(file)} has changed while it was read")

    def finish(self) -> None:
        """Check that no file has changed."""
        for file in self._checkpoint.files:
            self._check_unchanged(file)

    def close(self) -> None:
        """Close the files."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
