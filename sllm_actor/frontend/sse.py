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


async def write_on(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    """Write, waiting for a full buffer to drain; `Connections` drops a client that leaves it full.

    Raises:
        ConnectionError: the client has left.
    """
    await response.write(data)
    if request.protocol.writing_paused:
        await request.writer.drain()


class EventStream:
    """The events of one answer, as an async context manager. `opened` once its status has gone out: a 200.

    Until the first event, and no longer than `open_after_s`, nothing is sent, so that what fails early is a proper
    status. After that a comment with what `progress` says goes out whenever nothing else has for `interval_s`.
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
        self._response = web.StreamResponse(headers=HEADERS | headers)
        self._progress = progress
        self._tasks = tasks
        self._clock = clock
        self._open_after_s = open_after_s
        self._interval_s = interval_s
        self._opening = asyncio.Lock()
        self._open = False
        self._beating: asyncio.Task[None] | None = None
        self._sent_s = 0.0
        self.opened = False

    async def __aenter__(self) -> EventStream:
        self._beating = self._tasks.spawn(self._beat(), "heartbeat")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._still()

    async def _still(self) -> None:
        assert self._beating is not None
        self._beating.cancel()
        await asyncio.wait([self._beating])

    async def send(self, content: Any) -> None:
        """Send one event; the first one opens the stream.

        Raises:
            ConnectionError: the client has left.
        """
        await self._write(b"data: " + msgspec.json.encode(content) + b"\n\n")

    async def fail(self, error: SllmError) -> web.StreamResponse:
        """End with an error event, for what goes wrong once the status is out."""
        await self.send(http_errors.body_of(error))
        return await self._end()

    async def done(self) -> web.StreamResponse:
        """End as OpenAI's streams do."""
        await self._write(b"data: [DONE]\n\n")
        return await self._end()

    async def _end(self) -> web.StreamResponse:
        # Nothing may be written behind the end.
        await self._still()
        await self._response.write_eof()
        return self._response

    async def _write(self, data: bytes) -> None:
        if not self._open:
            await self._prepare()
        self._sent_s = self._clock.monotonic_s()
        await write_on(self._request, self._response, data)

    async def _prepare(self) -> None:
        """Send the status, once, whoever comes first with something to say."""
        async with self._opening:
            if not self._open:
                self.opened = True
                await self._response.prepare(self._request)
                self._open = True

    async def _beat(self) -> None:
        wait_s = self._open_after_s
        # A client that has gone cancels its request, which is not for the heartbeat to do.
        with contextlib.suppress(ConnectionError):
            while True:
                await self._clock.sleep(wait_s)
                wait_s = self._sent_s + self._interval_s - self._clock.monotonic_s()
                if not self.opened or wait_s <= 0:
                    await self._write(f": {await self._progress()}\n\n".encode())
                    wait_s = self._interval_s
