"""Python's search for cycles by the clock: often through what is young, seldom through everything."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest

from sllm_actor.cli.collecting import BUSY_S, QUIET_S, YOUNG_EVERY_S, look_for_cycles


class Over(Exception):
    """The clock has come to its end."""


class Clock:
    """A clock that ends each sleep at once, until so many seconds are over."""

    def __init__(self, seconds: float, at_each: Callable[[], None]) -> None:
        self._now_s = 1000.0
        self._end_s = self._now_s + seconds
        self._at_each = at_each

    def monotonic_s(self) -> float:
        return self._now_s

    def wall_s(self) -> float:
        return self._now_s

    async def sleep(self, duration_s: float) -> None:
        self._now_s += duration_s
        if self._now_s > self._end_s:
            raise Over
        self._at_each()


class Ring:
    """Holds itself, so that only a pass finds it."""

    def __init__(self) -> None:
        self.self = self


def old_ring() -> weakref.ref[Ring]:
    """Give a cycle that nobody holds and that no pass through what is young meets any more."""
    ring = Ring()
    gc.collect()
    return weakref.ref(ring)


async def look(seconds: float, *, is_quiet: bool, at_each: Callable[[], None] = lambda: None) -> None:
    with pytest.raises(Over):
        await look_for_cycles(lambda: is_quiet, Clock(seconds, at_each))


async def test_what_is_young_is_looked_through_at_each_turn_of_the_clock_and_what_is_old_is_not() -> None:
    old, young = old_ring(), [weakref.ref(Ring())]
    left = []

    def next_ring() -> None:
        assert not gc.isenabled(), "Python's own passes are off"
        left.append(young[-1]() is not None)
        young.append(weakref.ref(Ring()))

    await look(10 * YOUNG_EVERY_S, is_quiet=False, at_each=next_ring)
    assert [ring() for ring in young[:-1]] == [None] * (len(young) - 1)
    assert left == [True] + [False] * (len(left) - 1)
    assert old() is not None
    assert gc.isenabled()


@pytest.mark.parametrize(("is_quiet", "after_s"), [(True, QUIET_S), (False, BUSY_S)])
async def test_everything_is_looked_through_soon_in_quiet_and_at_last_where_there_is_none(
    is_quiet: bool, after_s: float
) -> None:
    old = old_ring()
    await look(after_s - 1.0, is_quiet=is_quiet)
    assert old() is not None
    await look(after_s + 1.0, is_quiet=is_quiet)
    assert old() is None
