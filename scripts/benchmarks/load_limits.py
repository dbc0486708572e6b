"""The machine's own speed, by a little C (`load_limits.c`): reading, copying, touching; and what is in the page cache.

Stdlib alone, since the peers' environment imports it, too. As a child: `python -m benchmarks.load_limits limits
LIBRARY`, with buffers that are faulted in once and kept, as a host pool is.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from array import array
from ctypes import c_char_p, c_double, c_int, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from benchmarks.actors_process import Commands, serve

SOURCE = Path(__file__).with_suffix(".c")
PAGE_BYTES = 4096
COPY_BLOCK_BYTES = 1 << 20
_Words = Any  # An array of 64-bit words, as ctypes sees it.


def build(folder: Path) -> Path:
    """Compile the C with the system's compiler, if it is newer than what is there; give the library."""
    library = folder / "load_limits.so"
    if not library.exists() or library.stat().st_mtime_ns < SOURCE.stat().st_mtime_ns:
        folder.mkdir(parents=True, exist_ok=True)
        command = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-pthread", "-o", str(library), str(SOURCE)]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as wrong:
            raise SystemExit(f"the limits need a C compiler (set CC): {wrong}") from None
    return library


class Machine:
    """The compiled functions. Every failure is an OSError."""

    def __init__(self, library: str | Path) -> None:
        self._c = ctypes.CDLL(str(Path(library).absolute()))
        words, seconds = ctypes.POINTER(c_uint64), ctypes.POINTER(c_double)
        self._c.bench_touch.argtypes = (words, words, c_uint64, words)
        self._c.bench_touch.restype = c_uint64
        self._c.bench_resident.argtypes = (c_char_p, words)
        self._c.bench_read.argtypes = (c_char_p, c_void_p, c_uint64, c_uint64, c_int, c_int, seconds)
        self._c.bench_copy.argtypes = (c_void_p, c_void_p, c_uint64, c_uint64, c_int, seconds)
        self._c.bench_memory.argtypes = (c_uint64, c_int)
        self._c.bench_memory.restype = c_void_p
        self._c.bench_free.argtypes = (c_void_p, c_uint64)

    def touch(self, addresses: array[int], lengths: array[int]) -> int:
        """Read a byte of every page of these ranges; give how many were read."""
        count, total = len(addresses), c_uint64()
        both: list[_Words] = [(c_uint64 * count).from_buffer(words) for words in (addresses, lengths)]
        return int(self._c.bench_touch(*both, count, ctypes.byref(total)))

    def resident_bytes(self, path: Path) -> int:
        """Count what of a file is in the page cache, in whole pages."""
        found = c_uint64()
        _check(self._c.bench_resident(os.fsencode(path), ctypes.byref(found)), path)
        return found.value

    def read_s(self, path: Path, memory: int, length: int, block_bytes: int, threads: int, direct: bool) -> float:
        """Read the beginning of a file into memory that has room for whole pages; give the seconds."""
        taken_s = c_double()
        arguments = (os.fsencode(path), memory, length, block_bytes, threads, direct, ctypes.byref(taken_s))
        _check(self._c.bench_read(*arguments), path)
        return taken_s.value

    def copy_s(self, to: int, source: int, length: int, threads: int) -> float:
        """Copy memory; give the seconds."""
        taken_s = c_double()
        _check(self._c.bench_copy(to, source, length, COPY_BLOCK_BYTES, threads, ctypes.byref(taken_s)), "memory")
        return taken_s.value

    def memory(self, length: int, faulted: bool) -> int:
        """Give the address of new memory of whole pages; the caller gives it back by `free`."""
        found = self._c.bench_memory(whole_pages(length), faulted)
        if found is None:
            raise MemoryError(f"no {length} bytes of memory")
        return int(found)

    def free(self, memory: int, length: int) -> None:
        """Give back what `memory` gave."""
        self._c.bench_free(memory, whole_pages(length))


def whole_pages(length: int) -> int:
    """Round up to whole pages."""
    return -(-length // PAGE_BYTES) * PAGE_BYTES


def _check(error: int, what: object) -> None:
    if error:
        raise OSError(error, os.strerror(error), str(what))


async def limits(library: str) -> tuple[None, Commands]:
    """Measure reads and copies, on request."""
    machine = Machine(library)
    held: dict[str, tuple[int, int]] = {}

    def buffer(name: str, length: int) -> int:
        if name in held and held[name][1] < length:
            machine.free(*held.pop(name))
        if name not in held:
            held[name] = machine.memory(length, faulted=True), length
        return held[name][0]

    async def read(path: str, block_bytes: int, threads: int) -> float:
        length = Path(path).stat().st_size
        return machine.read_s(Path(path), buffer("disk", length), length, block_bytes, threads, direct=True)

    async def copy(length: int, threads: int) -> float:
        try:
            return machine.copy_s(buffer("copy", length), buffer("disk", length), length, threads)
        finally:
            machine.free(*held.pop("copy"))

    async def free() -> None:
        while held:
            machine.free(*held.popitem()[1])

    return None, {"read": read, "copy": copy, "free": free}


if __name__ == "__main__":
    serve(limits=limits)
