"""Loads that go one way wait for each other here: the sooner one is through, the sooner the next one has it all.

Knows how much is still to come, and so when a load that is asked for now would begin: the scheduler's `q`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Turn:
    """The place of one load in the queue; whoever has it tells what has arrived."""

    def __init__(self, size_bytes: int, priority: int, number: int, moved: Callable[[], None]) -> None:
        self._moved = moved
        self.size_bytes = size_bytes
        self.arrived_bytes = 0
        self.rank = (-priority, number)
        self.begun = asyncio.Event()

    def arrive(self, arrived_bytes: int) -> None:
        """Note how much has arrived by now."""
        self.arrived_bytes = arrived_bytes
        self._moved()


class LoadQueue:
    """Lets `limit` loads go at once: the most urgent first, equal ones in the order of their asking."""

    def __init__(self, limit: int, bytes_per_s: Callable[[], float]) -> None:
        assert limit > 0, limit
        self._limit = limit
        self._bytes_per_s = bytes_per_s
        self._waiting: list[Turn] = []
        self._on_moved: dict[Turn, Callable[[], None]] = {}
        self._running: list[Turn] = []
        self._numbers = itertools.count()

    @property
    def remaining_bytes(self) -> int:
        """What is still to come of all loads that run or wait."""
        return sum(max(0, turn.size_bytes - turn.arrived_bytes) for turn in (*self._running, *self._waiting))

    @property
    def remaining_s(self) -> float:
        """When all that is known now will be through, at the bandwidth that was observed last."""
        bytes_per_s = self._bytes_per_s()
        return self.remaining_bytes / bytes_per_s if bytes_per_s > 0 else 0.0

    @property
    def waiting(self) -> int:
        """How many loads wait."""
        return len(self._waiting)

    @asynccontextmanager
    async def turn(
        self, size_bytes: int, priority: int = 0, on_moved: Callable[[], None] | None = None
    ) -> AsyncIterator[Turn]:
        """Wait for the turn of a load of `size_bytes`, and have it until the block ends.

        While it waits, `on_moved` is called whenever something arrives for those before it.
        """
        mine = Turn(size_bytes, priority, next(self._numbers), self._moved)
        self._waiting.append(mine)
        if on_moved is not None:
            self._on_moved[mine] = on_moved
        self._begin()
        try:
            await mine.begun.wait()
            yield mine
        finally:
            self._on_moved.pop(mine, None)
            (self._running if mine in self._running else self._waiting).remove(mine)
            self._begin()

    def _moved(self) -> None:
        for tell in list(self._on_moved.values()):
            tell()

    def _begin(self) -> None:
        while self._waiting and len(self._running) < self._limit:
            turn = min(self._waiting, key=lambda turn: turn.rank)
            self._waiting.remove(turn)
            self._running.append(turn)
            self._on_moved.pop(turn, None)
            turn.begun.set()
