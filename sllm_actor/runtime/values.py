"""Kinds of fields that a message may have beside plain data: large bytes, and data without a type."""

from __future__ import annotations

from typing import Any

import msgpack

from sllm_actor.errors import FrameInvalid

# Bounds on untyped data, checked by msgpack before it builds anything.
MAX_FREE_FORM_ITEMS = 65_536
MAX_FREE_FORM_BYTES = 1024 * 1024


class Blob:
    """Bytes that travel beside their message, in chunks, straight into a buffer of their own.

    For payloads from a few KiB up. `data` is bytes-like (one dimension, contiguous); on the sending side it must not
    change until the message is answered, and a receiver may keep or change what it got.
    """

    __slots__ = ("data",)

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self.data = data

    def __len__(self) -> int:
        return memoryview(self.data).nbytes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blob) and self.data == other.data

    def __hash__(self) -> int:
        return hash(bytes(self.data))

    def __repr__(self) -> str:
        return f"Blob({len(self)} bytes)"


class FreeForm:
    """Data without a declared type: None, numbers, strings, bytes, lists and dicts with string keys."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FreeForm) and bool(self.value == other.value)

    def __hash__(self) -> int:
        raise TypeError("free-form data may hold lists")

    def __repr__(self) -> str:
        return f"FreeForm({self.value!r})"

    def pack(self) -> bytes:
        """Write it as MessagePack.

        Raises:
            FrameInvalid: it holds something else, or too much.
        """
        try:
            packed: bytes = msgpack.packb(self.value)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise FrameInvalid(f"free-form data that can't be written: {error}") from error
        if len(packed) > MAX_FREE_FORM_BYTES:
            raise FrameInvalid(f"free-form data of {len(packed)} bytes exceeds the bound of {MAX_FREE_FORM_BYTES}")
        return packed

    @classmethod
    def unpack(cls, packed: bytes) -> FreeForm:
        """Read what `pack` wrote, within the bounds.

        Raises:
            ValueError: it is no MessagePack, or exceeds a bound.
        """
        if len(packed) > MAX_FREE_FORM_BYTES:
            raise ValueError(f"free-form data of {len(packed)} bytes exceeds the bound of {MAX_FREE_FORM_BYTES}")
        try:
            value = msgpack.unpackb(
                packed,
                strict_map_key=True,
                max_array_len=MAX_FREE_FORM_ITEMS,
                max_map_len=MAX_FREE_FORM_ITEMS,
                max_str_len=MAX_FREE_FORM_BYTES,
                max_bin_len=MAX_FREE_FORM_BYTES,
                max_ext_len=0,
            )
        except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
            raise ValueError(f"free-form data that can't be read: {error}") from error
        return cls(value)
