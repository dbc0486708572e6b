"""The device part of the native library: the ctypes signatures, and one function for each, without logic of its own.

C ABI: `native/include/sllm_native.h`, which says what each function does. Objects are the library's addresses of them.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char, c_char_p, c_int32, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any, NoReturn

import msgspec

from sllm_actor.errors import ConfigInvalid
from sllm_actor.loader.native import _Error, library

HANDLE_BYTES = 64
_OK = 0


class _Facts(ctypes.Structure):
    _fields_ = (
        ("ordinal", c_int32),
        ("driver_version", c_int32),
        ("total_bytes", c_uint64),
        ("free_bytes", c_uint64),
        ("name", c_char * 256),
    )


DEVICE_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "sllm_device_count": (c_int32, (c_char_p, POINTER(c_int32), POINTER(_Error))),
    "sllm_device_open": (c_void_p, (c_char_p, c_int32, c_uint32, POINTER(_Error))),
    "sllm_device_get_facts": (c_int32, (c_void_p, POINTER(_Facts), POINTER(_Error))),
    "sllm_device_register": (c_int32, (c_void_p, c_void_p, POINTER(_Error))),
    "sllm_device_unregister": (c_int32, (c_void_p, c_void_p, POINTER(_Error))),
    "sllm_device_close": (None, (c_void_p,)),
    "sllm_buffer_create": (c_void_p, (c_void_p, c_uint64, POINTER(_Error))),
    "sllm_buffer_export": (c_int32, (c_void_p, c_char_p, POINTER(_Error))),
    "sllm_buffer_open": (c_void_p, (c_void_p, c_char_p, c_uint64, POINTER(_Error))),
    "sllm_buffer_address": (c_uint64, (c_void_p,)),
    "sllm_buffer_read": (c_int32, (c_void_p, c_uint64, c_uint64, c_void_p, POINTER(_Error))),
    "sllm_buffer_destroy": (None, (c_void_p,)),
}


class DeviceFacts(msgspec.Struct, frozen=True):
    """What a device is, and how much of its memory is free just now. Version 13000 of a driver is 13.0."""

    ordinal: int
    name: str
    driver_version: int
    total_bytes: int
    free_bytes: int


@cache
def _library() -> ctypes.CDLL:
    loaded = library()
    try:
        for name, (result, arguments) in DEVICE_FUNCTIONS.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as wrong:
        raise ConfigInvalid(f"the native library can't be used, build it again: {wrong}") from None
    return loaded


def _fail(error: _Error) -> NoReturn:
    raise error.kind()(error.text())


def _call(name: str, *arguments: Any) -> None:
    error = _Error()
    if getattr(_library(), name)(*arguments, byref(error)) != _OK:
        _fail(error)


def _make(name: str, *arguments: Any) -> int:
    error = _Error()
    made = getattr(_library(), name)(*arguments, byref(error))
    if not made:
        _fail(error)
    return int(made)


def _driver(path: str | None) -> bytes | None:
    return None if path is None else path.encode("utf-8", "surrogateescape")


def device_count(driver: str | None) -> int:
    """Return how many devices the driver knows."""
    count = c_int32()
    _call("sllm_device_count", _driver(driver), byref(count))
    return count.value


def device_open(driver: str | None, ordinal: int, streams: int) -> int:
    """Open a device."""
    return _make("sllm_device_open", _driver(driver), ordinal, streams)


def device_facts(device: int) -> DeviceFacts:
    """Return what the device is."""
    found = _Facts()
    _call("sllm_device_get_facts", device, byref(found))
    return DeviceFacts(
        ordinal=found.ordinal,
        name=bytes(found.name).decode("utf-8", "replace"),
        driver_version=found.driver_version,
        total_bytes=found.total_bytes,
        free_bytes=found.free_bytes,
    )


def device_register(device: int, pool: int) -> None:
    """Page-lock a pool for the driver."""
    _call("sllm_device_register", device, pool)


def device_unregister(device: int, pool: int) -> None:
    """Undo `device_register`."""
    _call("sllm_device_unregister", device, pool)


def device_close(device: int) -> None:
    """Close the device; no buffer of it is left."""
    _library().sllm_device_close(device)


def buffer_create(device: int, size_bytes: int) -> int:
    """Take device memory."""
    return _make("sllm_buffer_create", device, size_bytes)


def buffer_open(device: int, handle: bytes, size_bytes: int) -> int:
    """Open what another process exported."""
    return _make("sllm_buffer_open", device, handle, size_bytes)


def buffer_export(buffer: int) -> bytes:
    """Return the handle by which another process opens the buffer."""
    handle = ctypes.create_string_buffer(HANDLE_BYTES)
    _call("sllm_buffer_export", buffer, handle)
    return handle.raw


def buffer_address(buffer: int) -> int:
    """Return the device address of the buffer."""
    return int(_library().sllm_buffer_address(buffer))


def buffer_read(buffer: int, offset: int, length: int) -> bytes:
    """Copy bytes back from the device."""
    found = bytearray(length)
    _call("sllm_buffer_read", buffer, offset, length, (c_char * length).from_buffer(found) if length else None)
    return bytes(found)


def buffer_destroy(buffer: int) -> None:
    """Wait for the copies into the buffer, then give it back."""
    _library().sllm_buffer_destroy(buffer)
