"""Token ids as bytes: a prompt of thousands travels 10 x faster so than as a list of numbers."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence

from sllm_actor.errors import FrameInvalid

TOKEN_BYTES = 4


def pack_uint32(numbers: Iterable[int]) -> bytes:
    """Write numbers as little-endian uint32."""
    packed = array("I", numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_uint32(data: bytes) -> Sequence[int]:
    """Read little-endian uint32 numbers.

    Raises:
        FrameInvalid: the length is no multiple of four bytes.
    """
    if len(data) % TOKEN_BYTES:
        raise FrameInvalid(f"{len(data)} bytes are not a sequence of uint32")
    numbers = array("I")
    numbers.frombytes(data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
