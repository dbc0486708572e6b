"""The connections of the HTTP endpoint, bounded in number and in what each may leave undone.

A connection waits for a request or is busy with one. One that waits too long is closed, sooner once the head of a
request has begun to come; where there are too many, the one that has waited longest makes room for a new one. One
whose client leaves its buffer full for too long is dropped.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import NamedTuple, cast

import msgspec
from aiohttp import web

from sllm_actor.frontend import http_errors
from sllm_actor.runtime import Clock

log = logging.getLogger(__name__)

SWEEP_S = 0.25
NEVER_S = 1e9
# Time for a client to read the refusal of a body that it is still sending.
LINGERING_S = 2.0
MAX_LINE_BYTES = 8190
MAX_HEADER_BYTES = 8190
MAX_HEADERS = 128


class ConnectionLimits(NamedTuple):
    """The knobs of connections; the names are those of `Config`."""

    max_connections: int
    idle_timeout_s: float
    header_timeout_s: float
    send_buffer_bytes: int
    send_timeout_s: float


class Connection(web.RequestHandler):
    """One connection. `waiting_since_s`: since when it has had no request; `head_since_s`: since when one comes."""

    def __init__(self, connections: Connections, server: web.Server, debug: bool) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            # Those that wait are for `Connections` to close.
            keepalive_timeout=NEVER_S,
            lingering_time=LINGERING_S,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            max_headers=MAX_HEADERS,
            # None for none; the library's own types leave that out.
            access_log=None,  # type: ignore[arg-type]
            logger=log,
            debug=debug,
        )
        self._connections = connections
        self.waiting_since_s = 0.0
        self.head_since_s: float | None = None
        self.lingers = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # uvloop's transports are no subclass of asyncio's.
        cast(asyncio.Transport, transport).set_write_buffer_limits(high=self._connections.limits.send_buffer_bytes)
        self._connections.add(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if data:
            self._connections.head_comes(self)
        super().data_received(data)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._connections.full(self)

    def resume_writing(self) -> None:
        self._connections.drained(self)
        super().resume_writing()

    def drop(self) -> None:
        """Close at once, whatever has not been sent; a request that is being answered is cancelled."""
        if self.transport is not None:
            self.transport.abort()

    def begin(self) -> None:
        """Note that a whole head has come: the connection is busy until `end`."""
        self._connections.busy(self)

    def end(self, request: web.BaseRequest) -> None:
        """Note that the request is answered; what still comes of its body is not the head of another."""
        self.lingers = not request.content.is_eof()
        self._connections.waits(self)

    def refuse(self, status: int, reason: str, code: str, message: str) -> None:
        """Say why, outside any request, and close."""
        if self.transport is not None and not self.transport.is_closing():
            body = msgspec.json.encode(http_errors.body(message, status, code=code))
            head = (
                f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is no HTTP, or a bug of ours, in the shape of all errors; nothing of the request is logged."""
        if status >= 500:
            log.error("a request failed", exc_info=exc)
            message = "an internal error; the log of the node says more"
        if request.writer.output_size > 0:
            raise ConnectionError("a part of the answer has been sent already")
        code = "internal_error" if status >= 500 else "bad_http"
        # The parser's messages may have lines of what was sent; the first one says what is wrong.
        text = (message or "the request is not HTTP").splitlines()[0][:200]
        response = web.Response(
            body=msgspec.json.encode(http_errors.body(text, status, code=code)),
            status=status,
            content_type="application/json",
        )
        response.force_close()
        return response


class Connections:
    """Makes the connections of one server and closes those that wait too long. Belongs to one event loop."""

    def __init__(self, server: web.Server, limits: ConnectionLimits, clock: Clock) -> None:
        self._server = server
        self.limits = limits
        self._clock = clock
        self._open: set[Connection] = set()
        # Those that wait, the one that has for the longest first.
        self._waiting: dict[Connection, None] = {}
        # Those whose buffer is full, and since when.
        self._full_since_s: dict[Connection, float] = {}
        self.closed: dict[str, int] = dict.fromkeys(("idle", "slow_head", "made_room", "refused", "unread"), 0)

    def __call__(self) -> Connection:
        """Make the protocol of a connection, for `create_server`."""
        return Connection(self, self._server, debug=False)

    def counts(self) -> Mapping[str, int]:
        """Tell how many are open, and how many of these wait for a request."""
        return {"open": len(self._open), "waiting": len(self._waiting)}

    def add(self, connection: Connection) -> None:
        """Take a new one in, for which another may have to go."""
        if len(self._open) >= self.limits.max_connections:
            oldest = next(iter(self._waiting), None)
            if oldest is None:
                self.closed["refused"] += 1
                connection.refuse(503, "Service Unavailable", "too_many_connections", "too many connections are busy")
                return
            self.closed["made_room"] += 1
            self.discard(oldest)
            oldest.force_close()
        self._open.add(connection)
        self.waits(connection)

    def discard(self, connection: Connection) -> None:
        """Forget one that is closed."""
        self._open.discard(connection)
        self._waiting.pop(connection, None)
        self._full_since_s.pop(connection, None)

    def head_comes(self, connection: Connection) -> None:
        """Note the first bytes of a request."""
        if connection in self._waiting and connection.head_since_s is None and not connection.lingers:
            connection.head_since_s = self._clock.monotonic_s()

    def busy(self, connection: Connection) -> None:
        """Note that it has a request."""
        self._waiting.pop(connection, None)

    def waits(self, connection: Connection) -> None:
        """Note that it has none, or none any more."""
        if connection in self._open:
            connection.waiting_since_s = self._clock.monotonic_s()
            connection.head_since_s = None
            self._waiting[connection] = None

    def full(self, connection: Connection) -> None:
        """Note that its client has left so much unread that nothing more is written."""
        self._full_since_s[connection] = self._clock.monotonic_s()

    def drained(self, connection: Connection) -> None:
        """Note that its client has read on."""
        self._full_since_s.pop(connection, None)

    async def watch(self) -> None:
        """Close those that wait too long, until cancelled."""
        while True:
            await self._clock.sleep(SWEEP_S)
            self._sweep(self._clock.monotonic_s())

    def _sweep(self, now_s: float) -> None:
        for connection, since_s in list(self._full_since_s.items()):
            if now_s - since_s > self.limits.send_timeout_s:
                self.closed["unread"] += 1
                self.discard(connection)
                connection.drop()
        for connection in list(self._waiting):
            if connection.head_since_s is not None and now_s - connection.head_since_s > self.limits.header_timeout_s:
                self.closed["slow_head"] += 1
                self.discard(connection)
                text = f"the head of the request did not arrive in {self.limits.header_timeout_s:g} s"
                connection.refuse(408, "Request Timeout", "request_timeout", text)
            elif now_s - connection.waiting_since_s > self.limits.idle_timeout_s:
                self.closed["idle"] += 1
                self.discard(connection)
                connection.force_close()
