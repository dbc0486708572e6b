"""A connected stream socket that carries messages, on an event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, cast

from sllm_actor.errors import ActorDied, ProtocolViolation
from sllm_actor.runtime.frames import Codec

HIGH_WATER_BYTES = 1024 * 1024


class Channel(asyncio.Protocol):
    """Sends and receives messages over one socket. Belongs to one event loop.

    `on_message` is called for each message in order; `on_closed` once, with the violation that ended
    the channel or None. Both run on the loop and must not block.
    """

    def __init__(
        self,
        codec: Codec,
        on_message: Callable[[Any], None],
        on_closed: Callable[[ProtocolViolation | None], None],
    ) -> None:
        self._codec = codec
        self._on_message = on_message
        self._on_closed = on_closed
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._violation: ProtocolViolation | None = None
        self._closed = False

    @classmethod
    async def open(
        cls,
        sock: socket.socket,
        codec: Codec,
        on_message: Callable[[Any], None],
        on_closed: Callable[[ProtocolViolation | None], None],
    ) -> Channel:
        """Take over a connected Unix stream socket."""
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_unix_connection(lambda: cls(codec, on_message, on_closed), sock=sock)
        return channel

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        self._writable.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._codec.feed(data):
                self._on_message(message)
                if self.closed:
                    return
        except ProtocolViolation as violation:
            self._violation = violation
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        self._writable.set()
        self._on_closed(self._violation)

    @property
    def ended(self) -> bool:
        """Tell whether every message has been given and `on_closed` called."""
        return self._closed

    @property
    def closed(self) -> bool:
        """Tell whether it takes no more messages; `on_closed` may still be to come."""
        return self._closed or self._transport is None or self._transport.is_closing()

    async def send(self, message: object) -> None:
        """Send once the peer keeps up.

        Raises:
            ActorDied: the channel is closed.
            FrameTooLong: the message exceeds the frame bound.
        """
        await self._writable.wait()
        self.send_now(message)

    def send_now(self, message: object) -> None:
        """Send whatever the peer does: for control messages, whose number is bounded by the caller."""
        if self.closed:
            raise ActorDied("the process at the other end has left")
        assert self._transport is not None
        self._transport.write(self._codec.encode(message))

    def close(self) -> None:
        """Close the socket; `on_closed` follows."""
        if self._transport is not None:
            self._transport.close()
