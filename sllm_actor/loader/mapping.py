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


class InPlace(msgspec.Struct, frozen=True):
    """Where a file lies that is mapped out of the page cache, and what tells it from a later one of its name."""

    path: str
    mtime_ns: int
    inode: int


class HostFile(msgspec.Struct, frozen=True):
    """One file in host memory: its bytes fill `chunks` of the pool in order, the last perhaps in part.

    One that is `in_place` has no chunks: the page cache holds it whole, and it is mapped as it lies there.
    """

    name: str
    size_bytes: int
    chunks: tuple[int, ...] = ()
    in_place: InPlace | None = None


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


def map_files(pool_fd: int, chunk_bytes: int, files: Sequence[HostFile], *, populate: int = 0) -> MappedFiles:
    """Map `files`; the pool is the one behind `pool_fd`, which may be closed after.

    `populate` threads map every page now; with 0, each is mapped as it is first touched. The bytes need not be
    there yet: what a loader writes into the pool later is seen through the mapping, unless it was written to.

    Raises:
        InvalidInput: the chunks do not fit the files or the pool.
        CheckpointChanged: a file to be mapped in place is no longer the described one.
        ReadFailed: it can't be opened, or one of its pages can't be read; the latter with `populate` only. Without,
            the first touch of that page ends the process.
        ConfigInvalid: no address space or no memory, or the native library is missing.
    """
    pool_bytes = os.fstat(pool_fd).st_size
    for file in files:
        if file.in_place is None:
            _check_chunks(file, chunk_bytes, pool_bytes)
    return MappedFiles([_map_file(pool_fd, chunk_bytes, file, populate) for file in files])


def _check_chunks(file: HostFile, chunk_bytes: int, pool_bytes: int) -> None:
    if file.size_bytes <= 0 or len(file.chunks) != -(-file.size_bytes // chunk_bytes):
        raise InvalidInput(f"{file.name}: {len(file.chunks)} chunks can't hold {file.size_bytes} bytes")
    # A page outside the pool would end this process at the first touch.
    if min(file.chunks) < 0 or (max(file.chunks) + 1) * chunk_bytes > pool_bytes:
        raise InvalidInput(f"{file.name}: a chunk lies outside the pool of {pool_bytes} bytes")


def _map_file(pool_fd: int, chunk_bytes: int, file: HostFile, populate: int) -> memoryview:
    mapper = native if use_native() else libc
    if file.in_place is None:
        address = mapper.map_chunks(pool_fd, chunk_bytes, file.chunks, populate)
        length = chunk_bytes * len(file.chunks)
    else:
        lies = file.in_place
        address = mapper.map_file(lies.path, file.size_bytes, lies.mtime_ns, lies.inode, populate)
        length = file.size_bytes
    block = (ctypes.c_ubyte * file.size_bytes).from_address(address)
    # Every view and tensor keeps `block` alive, so the memory can't go while something reads it.
    ends = weakref.finalize(block, mapper.unmap, address, length)
    ends.atexit = False
    return memoryview(block).cast("B")


def cached_bytes(path: str) -> int:
    """Return about how much of a file is in the page cache; 0 where that can't be known."""
    found: int = (native if use_native() else libc).cached_bytes(path)
    return found
