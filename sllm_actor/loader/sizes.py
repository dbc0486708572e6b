"""Bounds of a loader's pool, threads and loads, and whether the machine has the memory. Blocks for a moment."""

from __future__ import annotations

import mmap

from sllm_actor.errors import ConfigInvalid
from sllm_actor.loader.choice import use_native
from sllm_actor.loader.memory import available_bytes, reserved_bytes
from sllm_actor.units import MIB, format_bytes

_ALIGNMENT = 4096
_HUGE_PAGE_BYTES = 2 * MIB
_MAX_THREADS = 256
_MAX_LOADS = 65536


def check_sizes(pool_bytes: int, chunk_bytes: int, reading_threads: int, max_loads: int, huge_pages: bool) -> None:
    """Refuse a pool, a chunk or a number of threads that can't be.

    Raises:
        ConfigInvalid: the message names what is out of bounds.
    """
    alignment = max(_ALIGNMENT, mmap.PAGESIZE)
    if chunk_bytes <= 0 or chunk_bytes % alignment:
        raise ConfigInvalid(f"a chunk of {chunk_bytes} bytes is not a multiple of {alignment}")
    if pool_bytes < chunk_bytes:
        raise ConfigInvalid(f"a host pool of {pool_bytes} bytes holds no chunk of {chunk_bytes}")
    may_reserve = huge_pages and use_native() and chunk_bytes % _HUGE_PAGE_BYTES == 0
    fits_reserved = may_reserve and pool_bytes <= reserved_bytes()
    if pool_bytes > (available := available_bytes()) and not fits_reserved:
        # Every page is taken at once, and for one too many the kernel would end some process.
        raise ConfigInvalid(
            f"a host pool of {format_bytes(pool_bytes)} is more than {format_bytes(available)} of free memory"
        )
    if not 1 <= reading_threads <= _MAX_THREADS or not 1 <= max_loads <= _MAX_LOADS:
        raise ConfigInvalid(f"{reading_threads} reading threads or {max_loads} loads are out of bounds")
