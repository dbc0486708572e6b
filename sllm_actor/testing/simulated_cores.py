"""The cores of a machine on virtual time, which all that compute on them share."""

from __future__ import annotations

import asyncio
from contextvars import Context
from math import inf

from sllm_actor.testing.virtual_loop import VirtualLoop


class Cores:
    """What all processes of one machine compute on, where its engines have no device each: those at work share it."""

    def __init__(self, count: float = inf) -> None:
        self._count = count
        # What each has done that has worked all the time, when that was counted, and how much it is at each one's end.
        self._done_s = 0.0
        self._counted_s = 0.0
        self._ends: dict[asyncio.Future[None], float] = {}
        self._timer: asyncio.TimerHandle | None = None
        # Nobody's: whoever is held up or ends leaves the others at work.
        self._context = Context()

    @property
    def enough(self) -> bool:
        """Tell whether everybody has a core."""
        return self._count == inf

    async def work(self, seconds: float) -> float:
        """Compute what takes one so long that has a core for itself; give how long it took."""
        if self.enough:
            await asyncio.sleep(seconds)
            return seconds
        loop = VirtualLoop.running()
        begin_s, end = loop.now_s, self._begin(loop, seconds)
        try:
            await end
        finally:
            self._leave(loop, end)
        return loop.now_s - begin_s

    def work_aside(self, seconds: float) -> None:
        """Have somebody compute whom nobody waits for."""
        if seconds and not self.enough:
            self._begin(VirtualLoop.running(), seconds)

    def _begin(self, loop: VirtualLoop, seconds: float) -> asyncio.Future[None]:
        self._count_done(loop)
        end = loop.create_future()
        self._ends[end] = self._done_s + seconds
        self._arm(loop)
        return end

    def _leave(self, loop: VirtualLoop, end: asyncio.Future[None]) -> None:
        if end in self._ends:
            self._count_done(loop)
            del self._ends[end]
            self._arm(loop)

    @property
    def _share(self) -> float:
        return min(1.0, self._count / len(self._ends))

    def _count_done(self, loop: VirtualLoop) -> None:
        if self._ends:
            self._done_s += (loop.now_s - self._counted_s) * self._share
        self._counted_s = loop.now_s

    def _arm(self, loop: VirtualLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._ends:
            first = min(self._ends, key=self._ends.__getitem__)
            left_s = (self._ends[first] - self._done_s) / self._share
            self._timer = loop.call_later(max(0.0, left_s), self._end, loop, first, context=self._context)

    def _end(self, loop: VirtualLoop, end: asyncio.Future[None]) -> None:
        self._leave(loop, end)
        if not end.done():
            end.set_result(None)
