"""The engine's side of the host pool: files of a leased checkpoint as memory of this process, without a copy.

Runs in another process than the loader: it knows the pool's descriptor and chunk indexes, and nothing of
asyncio, torch or leases. The mapping is private: what is written here is seen by no one else.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from typing import Self

import msgspec

from sllm_actor.errors import InvalidInput
from sllm_actor.loader import libc, native
from sllm_actor.loader.choice import use_native


class HostFile(msgspec.Struct, frozen=True):
    """One file in the host pool: its bytes fill `chunks` in order, the last perhaps in part."""

    name: str
    size_bytes: int
    chunks: tuple[int, ...]


class MappedFiles:
    """Files mapped into this process: `buffers[k]` holds exactly the bytes of `files[k]`, writable.

    Memory goes when nothing uses it: after `close`, and after the last tensor or view on it is gone.
    """

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self.buffers = tuple(buffers)

    def close(self) -> None:
        """Give up this object's own hold on the memory; doing it twice does nothing."""
        self.buffers = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def map_files(pool_fd: int, chunk_bytes: int, files: Sequence[HostFile], *, populate: bool = False) -> MappedFiles:
    """Map `files` of the pool behind `pool_fd`, which may be closed after; `populate` takes page faults now.

    Raises:
        InvalidInput: the chunks do not fit the files or the pool.
        ConfigInvalid: no address space, or the native library is missing.
    """
    pool_bytes = os.fstat(pool_fd).st_size
    for file in files:
        if file.size_bytes <= 0 or len(file.chunks) != -(-file.size_bytes // chunk_bytes):
            raise InvalidInput(f"{file.name}: {len(file.chunks)} chunks can't hold {file.size_bytes} bytes")
        # A page outside the pool would end this process at the first touch.
        if min(file.chunks) < 0 or (max(file.chunks) + 1) * chunk_bytes > pool_bytes:
            raise InvalidInput(f"{file.name}: a chunk lies outside the pool of {pool_bytes} bytes")
    return MappedFiles([_map_file(pool_fd, chunk_bytes, file, populate) for file in files])


def _map_file(pool_fd: int, chunk_bytes: int, file: HostFile, populate: bool) -> memoryview:
    mapper = native if use_native() else libc
    address = mapper.map_chunks(pool_fd, chunk_bytes, file.chunks, populate)
    block = (ctypes.c_ubyte * file.size_bytes).from_address(address)
    # Every view and tensor keeps `block` alive, so the memory can't go while something reads it.
    ends = weakref.finalize(block, mapper.unmap, address, chunk_bytes * len(file.chunks))
    ends.atexit = False
    return memoryview(block).cast("B")
