"""How long one request may take in all: the node's knob, or less where the client asks for less."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

from aiohttp import web

from sllm_actor.errors import DeadlineExceeded, InvalidRequest
from sllm_actor.runtime import Clock
from sllm_actor.units import parse_duration_s

HEADER = "X-Request-Timeout"
T = TypeVar("T")


def timeout_of(request: web.Request, longest_s: float) -> float:
    """Give the seconds that a request may take: what it asks for (`30`, `1.5s`, `500ms`), at most `longest_s`.

    Raises:
        InvalidRequest: it asks for something else.
    """
    asked = request.headers.get(HEADER)
    if asked is None:
        return longest_s
    try:
        asked_s = parse_duration_s(asked)
    except ValueError as error:
        raise InvalidRequest(f"{HEADER}: {error}", param=HEADER) from None
    if asked_s <= 0:
        raise InvalidRequest(f"{HEADER}: {asked[:64]!r} leaves no time", param=HEADER)
    return min(asked_s, longest_s)


async def within(
    items: AsyncGenerator[T, None], timeout_s: float, begin_s: float, clock: Clock
) -> AsyncGenerator[T, None]:
    """Pass `items` on until `timeout_s` after `begin_s`; then what makes them is closed.

    Raises:
        DeadlineExceeded: they had not ended by then.
    """
    limit = _Limit(asyncio.current_task())
    timer = asyncio.get_running_loop().call_later(begin_s + timeout_s - clock.monotonic_s(), limit.end)
    try:
        async with aclosing(items):
            while not limit.over:
                limit.waits = True
                try:
                    item = await anext(items)
                except StopAsyncIteration:
                    return
                except asyncio.CancelledError:
                    if not limit.take_back():
                        raise
                    break
                finally:
                    limit.waits = False
                yield item
            raise DeadlineExceeded(f"the answer was not finished within {timeout_s:g} s")
    finally:
        timer.cancel()
        limit.take_back()


class _Limit:
    """The end of one answer's time. It interrupts the wait for an item (`waits`), and nothing that is done with one.

    It serves a whole answer: an `asyncio.timeout` for each of its items would be work for every token.
    """

    def __init__(self, task: asyncio.Task[object] | None) -> None:
        assert task is not None
        self.over = False
        self.waits = False
        self._task = task
        self._cancels_before: int | None = None

    def end(self) -> None:
        self.over = True
        if self.waits:
            self._cancels_before = self._task.cancelling()
            self._task.cancel()

    def take_back(self) -> bool:
        """Take the cancel at the end of the time back; false where that is not all that cancels, or was none."""
        before, self._cancels_before = self._cancels_before, None
        return before is not None and self._task.uncancel() <= before
