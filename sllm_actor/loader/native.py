"""The native library, called through ctypes: the only module that touches it, and without logic of its own.

C ABI: `native/include/sllm_native.h`, which says what each function does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_char, c_char_p, c_double, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from sllm_actor.errors import CheckpointChanged, ConfigInvalid, NoCapacity, ReadFailed, SllmError
from sllm_actor.loader.mover import FilePlan, LoadState, LoadStatus, MoverOptions, SlabFacts

LIBRARY = Path(__file__).with_name("libsllm_native.so")
ABI_VERSION = 1
_MESSAGE_BYTES = 1024
_OK, _INVALID, _NO_MEMORY, _CHANGED, _READ_FAILED, _BUSY = range(6)
_STATES = (LoadState.LOADING, LoadState.DONE, LoadState.FAILED, LoadState.CANCELLED)
_ERRORS: dict[int, type[SllmError]] = {
    _NO_MEMORY: ConfigInvalid,
    _CHANGED: CheckpointChanged,
    _READ_FAILED: ReadFailed,
    _BUSY: NoCapacity,
}


class _Error(ctypes.Structure):
    _fields_ = (("code", c_int32), ("os_error", c_int32), ("message", c_char * _MESSAGE_BYTES))

    def text(self) -> str:
        return bytes(self.message).decode("utf-8", "replace")

    def kind(self) -> type[SllmError]:
        return _ERRORS.get(self.code, SllmError)


class _PoolFacts(ctypes.Structure):
    _fields_ = (
        ("fd", c_int32),
        ("locked", c_int32),
        ("chunk_bytes", c_uint64),
        ("chunks", c_uint64),
        ("huge_bytes", c_uint64),
    )


class _File(ctypes.Structure):
    _fields_ = (
        ("path", c_char_p),
        ("size_bytes", c_uint64),
        ("mtime_ns", c_int64),
        ("inode", c_uint64),
        ("chunks", POINTER(c_uint64)),
        ("chunk_count", c_uint64),
    )


class _Status(ctypes.Structure):
    _fields_ = (
        ("state", c_int32),
        ("failed_file", c_int32),
        ("cached_bytes", c_uint64),
        ("device_bytes", c_uint64),
        ("total_bytes", c_uint64),
        ("elapsed_s", c_double),
        ("error", _Error),
    )


_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "sllm_abi_version": (c_uint32, ()),
    "sllm_pool_create": (c_void_p, (c_uint64, c_uint64, c_uint32, c_int32, POINTER(_Error))),
    "sllm_pool_get_facts": (None, (c_void_p, POINTER(_PoolFacts))),
    "sllm_pool_destroy": (None, (c_void_p,)),
    "sllm_reader_create": (c_void_p, (c_void_p, c_uint32, c_uint32, POINTER(_Error))),
    "sllm_reader_event_fd": (c_int32, (c_void_p,)),
    "sllm_reader_submit": (
        c_int32,
        (c_void_p, POINTER(_File), c_uint64, POINTER(c_uint64), POINTER(_Error)),
    ),
    "sllm_reader_status": (c_int32, (c_void_p, c_uint64, POINTER(_Status), POINTER(_Error))),
    "sllm_reader_cancel": (c_int32, (c_void_p, c_uint64, POINTER(_Error))),
    "sllm_reader_forget": (c_int32, (c_void_p, c_uint64, POINTER(_Error))),
    "sllm_reader_destroy": (None, (c_void_p,)),
    "sllm_map_chunks": (
        c_int32,
        (c_int32, c_uint64, POINTER(c_uint64), c_uint64, c_int32, POINTER(c_void_p), POINTER(_Error)),
    ),
    "sllm_unmap": (c_int32, (c_void_p, c_uint64, POINTER(_Error))),
}


@cache
def library() -> ctypes.CDLL:
    """Load the library once.

    Raises:
        ConfigInvalid: it is of another version than this module, or can't be loaded.
    """
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as wrong:
        raise ConfigInvalid(f"the native library can't be used, build it again: {wrong}") from None
    if loaded.sllm_abi_version() != ABI_VERSION:
        raise ConfigInvalid(f"{LIBRARY} is of another version than this package, build it again")
    return loaded


def _call(function: Callable[..., int], *arguments: Any) -> None:
    error = _Error()
    if function(*arguments, byref(error)) != _OK:
        raise error.kind()(error.text())


class NativeMover:
    """A slab and C++ threads. Thread-safe but for `close`, which comes last."""

    def __init__(self, options: MoverOptions) -> None:
        self._library = library()
        error = _Error()
        self._pool = self._library.sllm_pool_create(
            options.chunk_bytes, options.chunks, options.reading_threads, options.lock, byref(error)
        )
        if not self._pool:
            raise error.kind()(error.text())
        self._reader = self._library.sllm_reader_create(
            self._pool, options.reading_threads, options.max_loads, byref(error)
        )
        if not self._reader:
            self._library.sllm_pool_destroy(self._pool)
            raise error.kind()(error.text())
        facts = _PoolFacts()
        self._library.sllm_pool_get_facts(self._pool, byref(facts))
        self.pool_fd = int(facts.fd)
        self.event_fd = int(self._library.sllm_reader_event_fd(self._reader))
        self.facts = SlabFacts(native=True, locked=bool(facts.locked), huge_bytes=facts.huge_bytes)

    def start(self, files: Sequence[FilePlan]) -> int:
        described = (_File * len(files))()
        for to, file in zip(described, files, strict=True):
            to.path = file.path.encode("utf-8", "surrogateescape")
            to.size_bytes, to.mtime_ns, to.inode = file.size_bytes, file.mtime_ns, file.inode
            to.chunks = (c_uint64 * len(file.chunks))(*file.chunks)
            to.chunk_count = len(file.chunks)
        load_id = c_uint64()
        _call(self._library.sllm_reader_submit, self._reader, described, len(files), byref(load_id))
        return load_id.value

    def status(self, load_id: int) -> LoadStatus:
        found = _Status()
        _call(self._library.sllm_reader_status, self._reader, load_id, byref(found))
        failed = found.error.code != _OK
        return LoadStatus(
            state=_STATES[found.state],
            page_cache_bytes=found.cached_bytes,
            ssd_bytes=found.device_bytes,
            duration_s=found.elapsed_s,
            error=found.error.kind() if failed else None,
            message=found.error.text(),
        )

    def cancel(self, load_id: int) -> None:
        _call(self._library.sllm_reader_cancel, self._reader, load_id)

    def forget(self, load_id: int) -> None:
        _call(self._library.sllm_reader_forget, self._reader, load_id)

    def close(self) -> None:
        self._library.sllm_reader_destroy(self._reader)
        self._library.sllm_pool_destroy(self._pool)


def map_chunks(pool_fd: int, chunk_bytes: int, chunks: Sequence[int], populate: bool) -> int:
    """Map chunks at one fresh address, private and writable; return the address."""
    address = c_void_p()
    indexes = (c_uint64 * len(chunks))(*chunks)
    _call(library().sllm_map_chunks, pool_fd, chunk_bytes, indexes, len(chunks), populate, byref(address))
    assert address.value is not None
    return address.value


def unmap(address: int, length_bytes: int) -> None:
    """Give back what `map_chunks` mapped."""
    _call(library().sllm_unmap, address, length_bytes)
