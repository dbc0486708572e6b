"""The slots of one engine, given by priority: the lowest number first, and of equals who came first."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sllm_actor.errors import SllmError


class Slots:
    """Owns the slots and the queue for them; whoever takes one gives it back. Belongs to one event loop."""

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._holds = 0
        self._arrivals = itertools.count()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []

    def take_now(self) -> bool:
        """Take a slot if one is free."""
        if not self._free or self._holds:
            return False
        self._free -= 1
        return True

    async def take(self, priority: int) -> None:
        """Wait for a slot; who is cancelled meanwhile has none.

        Raises:
            SllmError: what `turn_away` was given.
        """
        turn = (priority, next(self._arrivals), asyncio.get_running_loop().create_future())
        heapq.heappush(self._waiting, turn)
        try:
            await turn[2]
        except asyncio.CancelledError:
            if turn in self._waiting:
                self._waiting.remove(turn)
                heapq.heapify(self._waiting)
            elif not turn[2].cancelled() and turn[2].exception() is None:
                # A slot was given in the same turn of the loop.
                self.give()
            raise

    def turn_away(self, why: Callable[[], SllmError]) -> None:
        """Let nobody wait any longer who does now."""
        for _, _, turn in self._waiting:
            if not turn.cancelled():
                turn.set_exception(why())
        self._waiting.clear()

    def give(self) -> None:
        """Give a slot back: it goes to the first of those who wait."""
        self._free += 1
        self._serve()

    def _serve(self) -> None:
        while self._free and self._waiting and not self._holds:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.cancelled():
                self._free -= 1
                turn.set_result(None)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let nobody have a slot in this block: who comes waits, and who has one may give it back."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
            self._serve()
