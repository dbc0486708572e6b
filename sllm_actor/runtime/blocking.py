"""Messages over a blocking socket, for child processes that run no event loop."""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from collections.abc import Iterable
from typing import Any

from sllm_actor.runtime.frames import Codec

READ_BYTES = 256 * 1024


class BlockingChannel:
    """The child's end of a channel. Not thread-safe."""

    def __init__(self, sock: socket.socket, codec: Codec) -> None:
        self._sock = sock
        self._codec = codec
        self._arrived: deque[Any] = deque()
        self._sock.setblocking(True)

    def send(self, message: object) -> None:
        """Send, waiting while the other end does not read.

        Raises:
            OSError: the other end has gone.
        """
        self._sock.sendall(self._codec.encode(message))

    def send_all(self, messages: Iterable[object]) -> None:
        """Send several in one piece, waiting while the other end does not read.

        Raises:
            OSError: the other end has gone.
        """
        self._sock.sendall(b"".join(self._codec.encode(message) for message in messages))

    def wait_closed(self) -> None:
        """Wait until the other end has closed, as it does once it has read the last word; what it sends is dropped.

        Who leaves at once may cost it that word: a message that it sends just then fails, and its loop closes the
        socket with what it has not read.
        """
        with contextlib.suppress(ConnectionResetError):
            while self._sock.recv(READ_BYTES):
                pass

    def receive(self, wait: bool) -> Any | None:
        """Give the next message; without `wait`, None where there is none yet.

        Raises:
            EOFError: the other end has gone and every message has been given.
            ProtocolViolation: the other end broke the protocol.
        """
        while not self._arrived:
            try:
                data = self._sock.recv(READ_BYTES, 0 if wait else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            if not data:
                raise EOFError
            self._arrived.extend(self._codec.feed(data))
        return self._arrived.popleft()
