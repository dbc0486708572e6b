"""What a conversion reads of a checkpoint that ServerlessLLM's `sllm-store` has saved.

Whole tensors are read with `pread` in bounded blocks; one that is not contiguous is put in order in memory. Interprets
no byte of a tensor.
"""

from __future__ import annotations

import itertools
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import xxhash

from sllm_actor.checkpoint.bounded import read_bounded
from sllm_actor.checkpoint.digests import digest
from sllm_actor.checkpoint.folder import MAX_INDEX_BYTES, MAX_SHARDS, STORE_INDEX_NAME
from sllm_actor.checkpoint.layout import Described
from sllm_actor.checkpoint.manifest import OriginFormat
from sllm_actor.checkpoint.originals import BLOCK_BYTES, read_blocks
from sllm_actor.checkpoint.partitions import Runs
from sllm_actor.checkpoint.store_index import StoredTensor, parse_index
from sllm_actor.errors import (
    AdapterInvalid,
    CheckpointChanged,
    CheckpointHeaderInvalid,
    CheckpointTruncated,
    ReadFailed,
)

# Where ServerlessLLM's controller puts the tokenizer of a model that it has saved.
TOKENIZER_FOLDER = "tokenizer"
_DATA_NAME = re.compile(r"tensor\.data_(0|[1-9][0-9]{0,5})")
# Two models of one shape have one index: what tells them apart is in the data, of which the ends are looked at.
_ENDS_BYTES = 2**20
_WORDS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


class StoreFiles:
    """The tensors of an index and of the files beside it."""

    format = OriginFormat.SLLM_STORE
    metadata: Mapping[str, str] = {}

    def __init__(self, folder: Path) -> None:
        if (folder / "adapter_config.json").exists():
            raise AdapterInvalid(
                f"{folder} is a LoRA adapter as sllm-store saves one; save it with PEFT's save_pretrained, and deploy "
                "that beside its base model"
            )
        self._paths = _data_paths(folder)
        self._fds: list[int] = []
        self._strided = ("", b"")
        self._buffer = memoryview(bytearray(BLOCK_BYTES))
        index = folder / STORE_INDEX_NAME
        raw = read_bounded(index, MAX_INDEX_BYTES, CheckpointHeaderInvalid)
        try:
            self._stats = [self._open(path) for path in self._paths]
            self._begins = list(itertools.accumulate((found[0] for found in self._stats), initial=0))
            tensors, aliases = parse_index(raw, self._begins[-1], str(index))
            self.aliases: Mapping[str, str] = aliases
            self._by_name = {tensor.name: tensor for tensor in tensors}
            self.tensors: Sequence[Described] = [
                Described(tensor.name, tensor.dtype, tensor.shape, tensor.size_bytes) for tensor in tensors
            ]
            self.generation = self._generation(raw)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> tuple[int, int, int]:
        try:
            self._fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
            if not stat.S_ISREG(os.fstat(self._fds[-1]).st_mode):
                raise ReadFailed(f"{path} is not a regular file")
            os.posix_fadvise(self._fds[-1], 0, 0, os.POSIX_FADV_SEQUENTIAL)
            return _identity(self._fds[-1])
        except OSError as wrong:
            raise ReadFailed(f"{path} can't be read: {wrong.strerror}") from wrong

    def _generation(self, index: bytes) -> str:
        generation = xxhash.xxh3_128(digest(index))
        for path, (size_bytes, *_), begin in zip(self._paths, self._stats, self._begins, strict=False):
            length = min(size_bytes, _ENDS_BYTES)
            ends = xxhash.xxh3_128()
            for at in (begin, begin + size_bytes - length):
                for block in self._read_range(at, length):
                    ends.update(block)
            generation.update(f"{path.name}:{size_bytes}:{ends.hexdigest()};".encode())
        return generation.hexdigest()

    def read(self, name: str, runs: Runs) -> Iterator[memoryview]:
        """Give the bytes of `runs` of a tensor."""
        tensor = self._by_name[name]
        assert runs.begin + runs.stride * max(0, runs.count - 1) + runs.length <= tensor.size_bytes
        for begin, length in runs.ranges():
            if tensor.strides:
                yield memoryview(self._in_order(tensor))[begin : begin + length]
            else:
                yield from self._read_range(tensor.begin + begin, length)

    def _in_order(self, tensor: StoredTensor) -> bytes:
        # The last one is kept: a tensor is asked for once for each rank, and usually in one go.
        if self._strided[0] != tensor.name:
            storage = b"".join(self._read_range(tensor.begin, tensor.stored_bytes))
            self._strided = (tensor.name, b"".join(_rows(storage, tensor)))
        return self._strided[1]

    def _read_range(self, begin: int, length: int) -> Iterator[memoryview]:
        """Give bytes of all files as if they were one."""
        for fd, path, first, after in zip(self._fds, self._paths, self._begins, self._begins[1:], strict=False):
            at, end = max(begin, first), min(begin + length, after)
            if at < end:
                yield from read_blocks(fd, path, at - first, end - at, self._buffer)

    def finish(self) -> None:
        """Check that no file has changed."""
        for fd, path, before in zip(self._fds, self._paths, self._stats, strict=True):
            if _identity(fd) != before:
                raise CheckpointChanged(f"{path} has changed while it was read")

    def close(self) -> None:
        """Close the files."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()


def _data_paths(folder: Path) -> list[Path]:
    """List the files of data, refusing a row of them with a gap."""
    try:
        found = {int(match[1]) for match in map(_DATA_NAME.fullmatch, os.listdir(folder)) if match}
    except OSError as wrong:
        raise ReadFailed(f"{folder} can't be listed: {wrong.strerror}") from wrong
    if len(found) > MAX_SHARDS:
        raise CheckpointHeaderInvalid(f"{folder} has {len(found)} files of data and at most {MAX_SHARDS} are allowed")
    for k in range(max(found, default=0) + 1):
        if k not in found:
            raise CheckpointTruncated(f"{folder / f'tensor.data_{k}'} is missing")
    return [folder / f"tensor.data_{k}" for k in range(len(found))]


def _identity(fd: int) -> tuple[int, int, int]:
    found = os.fstat(fd)
    return found.st_size, found.st_mtime_ns, found.st_ino


def _rows(storage: bytes, tensor: StoredTensor) -> Iterator[bytes]:
    """Give a strided tensor's elements, one row of its last dimension after the other."""
    elements = memoryview(storage).cast(_WORDS[tensor.item_bytes])
    *outer, (count, stride) = tensor.steps
    for place in itertools.product(*(range(length) for length, _ in outer)):
        begin = sum(k * step for k, (_, step) in zip(place, outer, strict=True))
        if stride:
            yield elements[begin : begin + (count - 1) * stride + 1 : stride].tobytes()
        else:
            yield elements[begin : begin + 1].tobytes() * count
