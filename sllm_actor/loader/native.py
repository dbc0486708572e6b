"""The native library, called through ctypes: the only module that touches it, and without logic of its own.

C ABI: `native/include/sllm_native.h`, which says what each function does.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_char, c_char_p, c_double, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm_actor.checkpoint.digests import DIGEST_BYTES
from sllm_actor.errors import (
    CheckpointChanged,
    CheckpointCorrupt,
    ConfigInvalid,
    DeviceFailed,
    DeviceMissing,
    DeviceOutOfMemory,
    InvalidInput,
    NoCapacity,
    ReadFailed,
    SllmError,
)
from sllm_actor.loader.mover import LoadPlan, LoadState, LoadStatus, MoverOptions, PathFacts, Paths, SlabFacts

if TYPE_CHECKING:
    from sllm_actor.loader.device import Device

LIBRARY = Path(__file__).with_name("libsllm_native.so")
ABI_VERSION = 2
_MESSAGE_BYTES = 8192
_OK, _INVALID, _NO_MEMORY, _CHANGED, _READ_FAILED, _BUSY, _INTERNAL, _DIGEST = range(8)
_NO_DEVICE, _DEVICE_NO_MEMORY, _DEVICE_FAILED = range(8, 11)
_STATES = (LoadState.LOADING, LoadState.DONE, LoadState.FAILED, LoadState.CANCELLED)
_ERRORS: dict[int, type[SllmError]] = {
    _INVALID: InvalidInput,
    _NO_MEMORY: ConfigInvalid,
    _CHANGED: CheckpointChanged,
    _READ_FAILED: ReadFailed,
    _BUSY: NoCapacity,
    _DIGEST: CheckpointCorrupt,
    _NO_DEVICE: DeviceMissing,
    _DEVICE_NO_MEMORY: DeviceOutOfMemory,
    _DEVICE_FAILED: DeviceFailed,
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
        ("reserved", c_int32),
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
        ("digests", c_char_p),
        ("digest_count", c_uint64),
        ("target", c_void_p),
        ("target_offset", c_uint64),
    )


class _Options(ctypes.Structure):
    _fields_ = (
        ("priority", c_int32),
        ("resident", c_int32),
        ("digest_bytes", c_uint64),
        ("window", POINTER(c_uint64)),
        ("window_count", c_uint64),
    )


class _Path(ctypes.Structure):
    _fields_ = (("bytes", c_uint64), ("busy_s", c_double))

    def facts(self) -> PathFacts:
        return PathFacts(self.bytes, self.busy_s)


class _ReaderFacts(ctypes.Structure):
    _fields_ = (("cached", _Path), ("storage", _Path), ("copied", _Path), ("io_uring", c_int32))


class _Status(ctypes.Structure):
    _fields_ = (
        ("state", c_int32),
        ("failed_file", c_int32),
        ("cached_bytes", c_uint64),
        ("device_bytes", c_uint64),
        ("copied_bytes", c_uint64),
        ("total_bytes", c_uint64),
        ("elapsed_s", c_double),
        ("error", _Error),
    )


_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "sllm_abi_version": (c_uint32, ()),
    "sllm_digest": (None, (c_char_p, c_uint64, c_char_p)),
    "sllm_pool_create": (c_void_p, (c_uint64, c_uint64, c_uint32, c_int32, c_int32, POINTER(_Error))),
    "sllm_pool_get_facts": (None, (c_void_p, POINTER(_PoolFacts))),
    "sllm_pool_destroy": (None, (c_void_p,)),
    "sllm_reader_create": (c_void_p, (c_void_p, c_uint32, c_uint32, c_int32, POINTER(_Error))),
    "sllm_reader_event_fd": (c_int32, (c_void_p,)),
    "sllm_reader_submit": (
        c_int32,
        (c_void_p, POINTER(_File), c_uint64, POINTER(_Options), POINTER(c_uint64), POINTER(_Error)),
    ),
    "sllm_reader_set_priority": (c_int32, (c_void_p, c_uint64, c_int32, POINTER(_Error))),
    "sllm_reader_drop_targets": (c_int32, (c_void_p, c_uint64, POINTER(_Error))),
    "sllm_reader_get_facts": (None, (c_void_p, POINTER(_ReaderFacts))),
    "sllm_reader_status": (c_int32, (c_void_p, c_uint64, POINTER(_Status), POINTER(_Error))),
    "sllm_reader_cancel": (c_int32, (c_void_p, c_uint64, POINTER(_Error))),
    "sllm_reader_forget": (c_int32, (c_void_p, c_uint64, POINTER(_Error))),
    "sllm_reader_destroy": (None, (c_void_p,)),
    "sllm_map_chunks": (
        c_int32,
        (c_int32, c_uint64, POINTER(c_uint64), c_uint64, c_uint32, POINTER(c_void_p), POINTER(_Error)),
    ),
    "sllm_map_file": (
        c_int32,
        (c_char_p, c_uint64, c_int64, c_uint64, c_uint32, POINTER(c_void_p), POINTER(_Error)),
    ),
    "sllm_cached_bytes": (c_int32, (c_char_p, POINTER(c_uint64), POINTER(_Error))),
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
        self._devices: set[Device] = set()
        error = _Error()
        self._pool = self._library.sllm_pool_create(
            options.chunk_bytes, options.chunks, options.reading_threads, options.lock, options.huge_pages, byref(error)
        )
        if not self._pool:
            raise error.kind()(error.text())
        self._reader = self._library.sllm_reader_create(
            self._pool, options.reading_threads, options.max_loads, options.io_uring, byref(error)
        )
        if not self._reader:
            self._library.sllm_pool_destroy(self._pool)
            raise error.kind()(error.text())
        facts = _PoolFacts()
        self._library.sllm_pool_get_facts(self._pool, byref(facts))
        self.pool_fd = int(facts.fd)
        self.event_fd = int(self._library.sllm_reader_event_fd(self._reader))
        self.facts = SlabFacts(
            native=True,
            locked=bool(facts.locked),
            huge_bytes=facts.huge_bytes,
            reserved=bool(facts.reserved),
            io_uring=bool(self._reader_facts().io_uring),
        )

    def register(self, device: Device) -> None:
        device.register(self._pool)
        self._devices.add(device)

    def start(self, plan: LoadPlan) -> int:
        described = (_File * len(plan.files))()
        for to, file in zip(described, plan.files, strict=True):
            to.path, to.size_bytes = _path(file.path), file.size_bytes
            to.mtime_ns, to.inode = file.mtime_ns, file.inode
            to.chunks, to.chunk_count = _indexes(file.chunks), len(file.chunks)
            if file.digests:
                to.digests, to.digest_count = file.digests, len(file.digests) // DIGEST_BYTES
            to.target, to.target_offset = file.target, file.target_offset
        options = _Options(plan.priority, plan.resident, plan.digest_bytes, _indexes(plan.window), len(plan.window))
        load_id = c_uint64()
        _call(self._library.sllm_reader_submit, self._reader, described, len(described), byref(options), byref(load_id))
        return load_id.value

    def status(self, load_id: int) -> LoadStatus:
        found = _Status()
        _call(self._library.sllm_reader_status, self._reader, load_id, byref(found))
        failed = found.error.code != _OK
        return LoadStatus(
            state=_STATES[found.state],
            page_cache_bytes=found.cached_bytes,
            ssd_bytes=found.device_bytes,
            device_bytes=found.copied_bytes,
            duration_s=found.elapsed_s,
            error=found.error.kind() if failed else None,
            message=found.error.text(),
        )

    def set_priority(self, load_id: int, priority: int) -> None:
        _call(self._library.sllm_reader_set_priority, self._reader, load_id, priority)

    def drop_targets(self, load_id: int) -> None:
        _call(self._library.sllm_reader_drop_targets, self._reader, load_id)

    def paths(self) -> Paths:
        found = self._reader_facts()
        return Paths(page_cache=found.cached.facts(), ssd=found.storage.facts(), device=found.copied.facts())

    def _reader_facts(self) -> _ReaderFacts:
        found = _ReaderFacts()
        self._library.sllm_reader_get_facts(self._reader, byref(found))
        return found

    def cancel(self, load_id: int) -> None:
        _call(self._library.sllm_reader_cancel, self._reader, load_id)

    def forget(self, load_id: int) -> None:
        _call(self._library.sllm_reader_forget, self._reader, load_id)

    def close(self) -> None:
        self._library.sllm_reader_destroy(self._reader)
        try:
            for device in self._devices:
                if not device.closed:
                    device.unregister(self._pool)
        finally:
            self._library.sllm_pool_destroy(self._pool)


def _path(path: str) -> bytes:
    return os.fsencode(path)


def _indexes(chunks: Sequence[int]) -> Any:
    return (c_uint64 * len(chunks))(*chunks)


def map_chunks(pool_fd: int, chunk_bytes: int, chunks: Sequence[int], populate: int) -> int:
    """Map chunks at one fresh address, private and writable; return the address."""
    address = c_void_p()
    _call(library().sllm_map_chunks, pool_fd, chunk_bytes, _indexes(chunks), len(chunks), populate, byref(address))
    assert address.value is not None
    return address.value


def map_file(path: str, size_bytes: int, mtime_ns: int, inode: int, populate: int) -> int:
    """Map the described file at a fresh address, private and writable; return the address."""
    address = c_void_p()
    _call(library().sllm_map_file, _path(path), size_bytes, mtime_ns, inode, populate, byref(address))
    assert address.value is not None
    return address.value


def cached_bytes(path: str) -> int:
    """Return about how much of a file is in the page cache; 0 where that can't be known."""
    found = c_uint64()
    if library().sllm_cached_bytes(_path(path), byref(found), byref(_Error())) != _OK:
        return 0
    return found.value


def digest(data: bytes) -> bytes:
    """Return the XXH3-128 of `data` in canonical form, as the reading threads compute it."""
    answer = ctypes.create_string_buffer(DIGEST_BYTES)
    library().sllm_digest(data, len(data), answer)
    return answer.raw


def unmap(address: int, length_bytes: int) -> None:
    """Give back what `map_chunks` mapped."""
    _call(library().sllm_unmap, address, length_bytes)
