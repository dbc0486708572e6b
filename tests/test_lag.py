"""How late the event loop is: counted always, and told in one line a minute once the node is ready."""

from __future__ import annotations

import pytest

from sllm_actor.runtime.lag import INTERVAL_S, TELL_EVERY_S, LoopLag


class Over(Exception):
    """The clock has come to its end."""


class LateClock:
    """A clock whose sleeps end as late as is written down for them, in seconds, and not at all after the last."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.late_s: list[float] = []

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        if not self.late_s:
            raise Over
        self.now_s += duration_s + self.late_s.pop(0)


async def watched(lag: LoopLag, clock: LateClock, *late_s: float) -> None:
    clock.late_s = list(late_s)
    with pytest.raises(Over):
        await lag.watch()


async def test_faults_are_counted_and_told_once_a_minute_from_the_moment_on_when_the_node_is_ready(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = LateClock()
    lag = LoopLag(clock, 0.05)
    quiet = [0.0] * int(TELL_EVERY_S / INTERVAL_S + 2)
    await watched(lag, clock, 0.5, 0.06, *quiet)
    assert (lag.faults, caplog.messages) == (2, [])
    assert lag.worst_s == pytest.approx(0.5)
    lag.tell()
    await watched(lag, clock, 0.07, 0.2, 0.04, *quiet, *quiet)
    assert lag.faults == 4
    assert caplog.messages == ["the event loop was late 2 times in a minute, by up to 200 ms"]
    await watched(lag, clock, 0.09, *quiet)
    assert caplog.messages[1:] == ["the event loop was late 1 times in a minute, by up to 90 ms"]
