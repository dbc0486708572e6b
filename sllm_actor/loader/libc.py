"""Memory calls of libc that Python has no name for, for processes without the native library."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Sequence

from sllm_actor.errors import ConfigInvalid, ReadFailed
from sllm_actor.loader.described import check_unchanged, open_described
from sllm_actor.units import MIB

# asm-generic/mman-common.h; mmap has no names for these before Python 3.13 or at all.
_MADV_POPULATE_READ, _MADV_COLLAPSE = 22, 25
_MAP_NORESERVE, _MAP_FIXED = 0x4000, 0x10
_PROT_NONE = 0
_CACHESTAT = 451
# sys/timex.h, on machines with 64-bit longs: nothing is set, as its first field, `modes`, is 0.
_TIMEX_BYTES, _MAX_ERROR_AT, _TIME_ERROR = 256, 24, 5
_IO_URING_SETUP, _IO_URING_PARAMS_BYTES = 425, 120
_HUGE_PAGE_BYTES = 2 * MIB


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t) + (ctypes.c_int,) * 3 + (ctypes.c_int64,)
    for name in ("munmap", "mlock"):
        getattr(libc, name).argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


def lock_memory(memory: memoryview) -> bool:
    """Ask that `memory` is never swapped out; return whether that holds."""
    first = ctypes.c_char.from_buffer(memory)
    return bool(_libc().mlock(ctypes.addressof(first), len(memory)) == 0)


def _mmap(libc: ctypes.CDLL, address: int | None, length: int, prot: int, flags: int, fd: int, at: int) -> int:
    mapped = libc.mmap(address, length, prot, flags, fd, at)
    if mapped == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(mapped)


def map_chunks(pool_fd: int, chunk_bytes: int, chunks: Sequence[int], populate: int) -> int:
    """Map chunks at one fresh address, private and writable; return the address.

    Python's own mmap can't be told where to map, and a copy would cost what the pool saves: so libc.
    """
    libc, length = _libc(), chunk_bytes * len(chunks)
    private = mmap.MAP_PRIVATE | _MAP_NORESERVE
    try:
        base = _mmap(libc, None, length, _PROT_NONE, private | mmap.MAP_ANONYMOUS, -1, 0)
    except OSError as wrong:
        raise ConfigInvalid(f"reserving address space: {wrong.strerror}") from None
    try:
        for at, chunk in enumerate(chunks):
            where, flags = base + at * chunk_bytes, private | _MAP_FIXED
            _mmap(
                libc,
                where,
                chunk_bytes,
                mmap.PROT_READ | mmap.PROT_WRITE,
                flags,
                pool_fd,
                chunk * chunk_bytes,
            )
    except OSError as wrong:
        unmap(base, length)
        raise ConfigInvalid(f"mapping chunks: {wrong.strerror}") from None
    if populate and (error := _populate(libc, base, length)):
        unmap(base, length)
        raise ConfigInvalid(f"mapping the pool's pages: {os.strerror(error)}")
    return base


def _populate(libc: ctypes.CDLL, address: int, length: int) -> int:
    """Map every page now; return 0, or the errno that says why one can't be had."""
    while libc.madvise(address, length, _MADV_POPULATE_READ) != 0:
        error = ctypes.get_errno()
        if error not in (errno.EINTR, errno.EAGAIN):
            # A kernel before 5.14 does not know it, and faults pages in as they are read.
            return 0 if error == errno.EINVAL else error
    return 0


def map_file(path: str, size_bytes: int, mtime_ns: int, inode: int, populate: int) -> int:
    """Map the described file at a fresh address, private and writable; return the address."""
    libc = _libc()
    try:
        fd = open_described(path, size_bytes, mtime_ns, inode)
    except OSError as wrong:
        raise ReadFailed(f"{path} can't be opened: {wrong.strerror}") from None
    try:
        flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
        base = _mmap(libc, None, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
        if populate and (error := _populate(libc, base, size_bytes)):
            unmap(base, size_bytes)
            if error == errno.ENOMEM:
                raise OSError(error, os.strerror(error))
            check_unchanged(fd, path, size_bytes, mtime_ns, inode)
            raise ReadFailed(f"{path} can't be read, the kernel could not map all of it: {os.strerror(error)}")
    except OSError as wrong:
        raise ConfigInvalid(f"mapping {path}: {wrong.strerror}") from None
    finally:
        os.close(fd)
    return base


def cached_bytes(path: str) -> int:
    """Return how much of a file is in the page cache; 0 where that can't be known."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return 0
    try:
        size_bytes = os.fstat(fd).st_size
        wanted, found = (ctypes.c_uint64 * 2)(0, size_bytes), (ctypes.c_uint64 * 5)()
        if ctypes.CDLL(None).syscall(_CACHESTAT, fd, wanted, found, 0) != 0:
            return 0
    finally:
        os.close(fd)
    return min(size_bytes, found[0] * mmap.PAGESIZE)


def io_uring_refusal() -> str:
    """Return why the system refuses io_uring to this process; nothing where it does not."""
    libc, parameters = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(_IO_URING_PARAMS_BYTES)
    fd = libc.syscall(_IO_URING_SETUP, 1, parameters)
    if fd < 0:
        return os.strerror(ctypes.get_errno())
    os.close(fd)
    return ""


def huge_page_refusal() -> str:
    """Return why the kernel makes no huge page of shared memory for this process; nothing where it does."""
    libc, room = _libc(), 2 * _HUGE_PAGE_BYTES
    fd = os.memfd_create("sllm-probe", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, _HUGE_PAGE_BYTES)
        private = mmap.MAP_PRIVATE | _MAP_NORESERVE | mmap.MAP_ANONYMOUS
        reserved = _mmap(libc, None, room, _PROT_NONE, private, -1, 0)
        try:
            base = reserved + -reserved % _HUGE_PAGE_BYTES
            both = mmap.PROT_READ | mmap.PROT_WRITE
            _mmap(libc, base, _HUGE_PAGE_BYTES, both, mmap.MAP_SHARED | _MAP_FIXED, fd, 0)
            ctypes.memset(base, 0, 1)  # What has no page at all is refused.
            if libc.madvise(base, _HUGE_PAGE_BYTES, _MADV_COLLAPSE) != 0:
                return os.strerror(ctypes.get_errno())
        finally:
            libc.munmap(reserved, room)
    except OSError as refused:
        return os.strerror(refused.errno or 0)
    finally:
        os.close(fd)
    return ""


def gather_heap() -> int:
    """Put what this process has of anonymous memory into huge pages, as far as the kernel does; give how many it did.

    For whose objects are many and lie far apart: the processor knows the places of few pages, and looks for the others
    each time. What is mapped later is not in them.
    """
    libc, gathered = _libc(), 0
    with open("/proc/self/maps") as maps:
        areas = [line.split() for line in maps]
    for addresses, access, _, _, inode, *name in areas:
        if access != "rw-p" or inode != "0" or name not in ([], ["[heap]"]):
            continue
        begin, end = (int(address, 16) for address in addresses.split("-"))
        for page in range(begin + -begin % _HUGE_PAGE_BYTES, end - _HUGE_PAGE_BYTES + 1, _HUGE_PAGE_BYTES):
            gathered += libc.madvise(page, _HUGE_PAGE_BYTES, _MADV_COLLAPSE) == 0
    return gathered


def clock_error_s() -> float | None:
    """Return how far the clock may be off at most, as the kernel knows from who keeps it right; None if nobody does."""
    state = ctypes.create_string_buffer(_TIMEX_BYTES)
    if ctypes.CDLL(None).adjtimex(state) in (-1, _TIME_ERROR):
        return None
    return int.from_bytes(state.raw[_MAX_ERROR_AT : _MAX_ERROR_AT + 8], sys.byteorder) / 1e6


def unmap(address: int, length_bytes: int) -> None:
    """Give back what `map_chunks` mapped."""
    _libc().munmap(address, length_bytes)
