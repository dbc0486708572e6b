"""Loads that go one way wait for each other here: the sooner one is through, the sooner the next one has it all.

A way is a disk, a device of a GPU's kind, or the network. Knows how much is still to come on each, and so when a load
that is asked for now would begin: the scheduler's `q`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from operator import attrgetter

# The way of a queue that has no other.
ONE_WAY = frozenset({""})


class Turn:
    """The place of one load in the queue; whoever has it tells what has arrived."""

    def __init__(
        self, size_bytes: int, priority: int, number: int, ways: frozenset[str], moved: Callable[[Turn], None]
    ) -> None:
        self._moved = moved
        self.ways = ways
        self.size_bytes = size_bytes
        self.arrived_bytes = 0
        self.rank = (-priority, number)
        self.begun = asyncio.Event()

    def arrive(self, arrived_bytes: int) -> None:
        """Note how much has arrived by now."""
        self.arrived_bytes = arrived_bytes
        self._moved(self)


class LoadQueue:
    """Lets `limit` loads go at once on each way: the most urgent first, equal ones in the order of their asking.

    A load begins when all its ways are free. Those on other ways do not wait for it; on its own nobody overtakes it.
    """

    def __init__(self, limit: int, bytes_per_s: Callable[[str], float]) -> None:
        assert limit > 0, limit
        self._limit = limit
        self._bytes_per_s = bytes_per_s
        self._waiting: list[Turn] = []
        self._on_moved: dict[Turn, Callable[[], None]] = {}
        self._running: list[Turn] = []
        self._numbers = itertools.count()

    def remaining_bytes(self, way: str = "") -> int:
        """Count what is still to come of all loads that run or wait."""
        if not self._running and not self._waiting:
            return 0
        turns = (turn for turn in (*self._running, *self._waiting) if way in turn.ways)
        return sum(max(0, turn.size_bytes - turn.arrived_bytes) for turn in turns)

    def remaining_s(self, way: str = "") -> float:
        """Tell when all that is known now will be through, at the bandwidth that was observed last."""
        remaining_bytes = self.remaining_bytes(way)
        if not remaining_bytes:
            return 0.0
        bytes_per_s = self._bytes_per_s(way)
        return remaining_bytes / bytes_per_s if bytes_per_s > 0 else 0.0

    @property
    def ways(self) -> set[str]:
        """The ways on which anything runs or waits."""
        return {way for turn in (*self._running, *self._waiting) for way in turn.ways}

    @property
    def waiting(self) -> int:
        """How many loads wait."""
        return len(self._waiting)

    @asynccontextmanager
    async def turn(
        self,
        size_bytes: int,
        priority: int = 0,
        on_moved: Callable[[], None] | None = None,
        ways: frozenset[str] = ONE_WAY,
    ) -> AsyncIterator[Turn]:
        """Wait for the turn of a load of `size_bytes`, and have it until the block ends.

        While it waits, `on_moved` is called whenever something arrives for others on its ways.
        """
        mine = Turn(size_bytes, priority, next(self._numbers), ways, self._moved)
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

    def _moved(self, moved: Turn) -> None:
        for turn, tell in list(self._on_moved.items()):
            if turn.ways & moved.ways:
                tell()

    def _begin(self) -> None:
        taken = Counter(way for turn in self._running for way in turn.ways)
        for turn in sorted(self._waiting, key=attrgetter("rank")):
            if all(taken[way] < self._limit for way in turn.ways):
                self._waiting.remove(turn)
                self._running.append(turn)
                self._on_moved.pop(turn, None)
                turn.begun.set()
            # Also for one that goes on waiting: what comes after it would only make it wait longer.
            taken.update(turn.ways)
