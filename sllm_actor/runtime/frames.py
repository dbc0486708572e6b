"""Frames on a byte stream: 4-byte big-endian length, then a MessagePack body. No I/O in here.

The length is checked before the body is waited for, so no more than a frame and one read is ever kept.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, Union

import msgspec

from sllm_actor.errors import FrameInvalid, FrameTooLong

_LENGTH = struct.Struct(">I")


class Codec:
    """Messages to frames and back, for the message types of one direction each.

    Stateful: it keeps the bytes of a frame that has not arrived whole.
    """

    def __init__(self, sends: Sequence[type], receives: Sequence[type], max_frame_bytes: int) -> None:
        self._sends = frozenset(sends)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Union[tuple(receives)])  # noqa: UP007
        self._max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()

    def encode(self, message: object) -> bytes:
        """Make one frame.

        Raises:
            FrameTooLong: the body exceeds the bound; nothing may be sent then.
        """
        assert type(message) in self._sends, f"{type(message).__name__} does not travel this way"
        body = self._encoder.encode(message)
        if len(body) > self._max_frame_bytes:
            raise FrameTooLong(f"a frame of {len(body)} bytes exceeds the bound of {self._max_frame_bytes}")
        return _LENGTH.pack(len(body)) + body

    def feed(self, data: bytes) -> Iterator[Any]:
        """Take received bytes and give the messages that they complete.

        Raises:
            FrameTooLong: a length over the bound; the stream can't be used any more.
            FrameInvalid: a body that is no message of the table; neither can it.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > self._max_frame_bytes:
                raise FrameTooLong(f"a frame of {length} bytes exceeds the bound of {self._max_frame_bytes}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(memoryview(self._buffer)[_LENGTH.size : end])
            del self._buffer[:end]
            yield self._decode(body)

    def _decode(self, body: bytes) -> Any:
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FrameInvalid(f"a frame that is no message of this conversation: {error}") from error
