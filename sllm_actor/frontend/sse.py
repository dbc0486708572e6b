"""Server-sent events of one answer: a status held back for a while, then comments wherever nothing else comes.

Comments are lines that begin with a colon; the standard has clients ignore them, and proxies count them as life.
Source: WHATWG HTML, "Server-sent events".
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any

import msgspec
from aiohttp import web

from sllm_actor.errors import SllmError
from sllm_actor.frontend import http_errors
from sllm_actor.runtime import Clock
from sllm_actor.runtime.tasks import TaskScope

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}

# Held events are sent as soon as they are this much.
HELD_BYTES = 16 * 1024


async def write_on(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    """Write, waiting for a full buffer to drain; `Connections` drops a client that leaves it full.

    Raises:
        ConnectionError: the client has left.
    """
    await response.write(data)
    if request.protocol.writing_paused:
        await request.writer.drain()


class _Answer(web.StreamResponse):
    """An answer whose head goes out with its first bytes, and not in a packet of its own."""

    # aiohttp's own for answers with a body. Were it named otherwise one day, the head would go first again.
    _send_headers_immediately = False


class EventStream:
    """The events of one answer, as an async context manager. `opened` once its status has gone out: a 200.

    Until the first event, and no longer than `open_after_s`, nothing is sent, so that what fails early is a proper
    status. After that a comment with what `progress` says goes out whenever nothing else has for `interval_s`.
    Events are held until `flush`, so that those which come together leave together: each write is a system call.
    """

    def __init__(
        self,
        request: web.Request,
        headers: dict[str, str],
        progress: Callable[[], Awaitable[str]],
        tasks: TaskScope,
        clock: Clock,
        *,
        open_after_s: float,
        interval_s: float,
    ) -> None:
        self._request = request
        self._response = _Answer(headers=HEADERS | headers)
        self._progress = progress
        self._tasks = tasks
        self._clock = clock
        self._open_after_s = open_after_s
        self._interval_s = interval_s
        self._opening = asyncio.Lock()
        self._open = False
        self._held: list[bytes] = []
        self._held_bytes = 0
        # A timer costs a stream next to nothing; the task of a comment is made for those that get one.
        self._timer: asyncio.TimerHandle | None = None
        self._comment: asyncio.Task[None] | None = None
        self._sent_s = 0.0
        self.opened = False

    async def __aenter__(self) -> EventStream:
        self._look_in(self._open_after_s)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._still()

    async def _still(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._comment is not None and not self._comment.done():
            self._comment.cancel()
            await asyncio.wait([self._comment])

    def hold(self, content: Any, event_id: bytes = b"") -> None:
        """Take an event, to be sent with the next ones; an `event_id` says behind which one a client goes on."""
        end = b"\nid: " + event_id + b"\n\n" if event_id else b"\n\n"
        data = b"data: " + msgspec.json.encode(content) + end
        self._held.append(data)
        self._held_bytes += len(data)

    @property
    def is_full(self) -> bool:
        """Tell whether so much is held that it is better sent."""
        return self._held_bytes >= HELD_BYTES

    async def flush(self) -> None:
        """Send what is held; the first of it opens the stream.

        Raises:
            ConnectionError: the client has left.
        """
        if self._held:
            await self._write(self._take())

    def _take(self) -> bytes:
        data = self._held[0] if len(self._held) == 1 else b"".join(self._held)
        self._held = []
        self._held_bytes = 0
        return data

    async def fail(self, error: SllmError) -> web.StreamResponse:
        """End with an error event, for what goes wrong once the status is out."""
        self.hold(http_errors.body_of(error))
        return await self._end()

    async def done(self) -> web.StreamResponse:
        """End as OpenAI's streams do."""
        self._held.append(b"data: [DONE]\n\n")
        return await self._end()

    async def _end(self) -> web.StreamResponse:
        # Nothing may be written behind the end.
        await self._still()
        if not self._open:
            await self._prepare()
        await self._response.write_eof(self._take())
        return self._response

    async def _write(self, data: bytes) -> None:
        if not self._open:
            await self._prepare()
        self._sent_s = self._clock.monotonic_s()
        await write_on(self._request, self._response, data)

    async def _prepare(self) -> None:
        """Begin with the status, once, whoever comes first with something to say."""
        async with self._opening:
            if not self._open:
                self.opened = True
                await self._response.prepare(self._request)
                self._open = True

    def _look_in(self, after_s: float) -> None:
        """See later whether it is time for a comment."""
        self._timer = asyncio.get_running_loop().call_later(after_s, self._beat)

    def _beat(self) -> None:
        wait_s = self._sent_s + self._interval_s - self._clock.monotonic_s()
        if self.opened and wait_s > 0:
            self._look_in(wait_s)
        else:
            self._comment = self._tasks.spawn(self._say(), "heartbeat")

    async def _say(self) -> None:
        # A client that has gone cancels its request, which is not for the heartbeat to do.
        with contextlib.suppress(ConnectionError):
            await self._write(f": {await self._progress()}\n\n".encode())
            self._look_in(self._interval_s)
