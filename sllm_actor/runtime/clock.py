"""The only place that reads a clock. Everything else is given one, so that time can be virtual."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Time as an actor may know it."""

    def monotonic_s(self) -> float:
        """Seconds since some fixed moment; never goes back."""

    def wall_s(self) -> float:
        """Seconds since 1970 (UTC), for people only: it may jump."""

    async def sleep(self, duration_s: float) -> None:
        """Return after `duration_s` seconds of this clock."""


class SystemClock:
    """The machine's own clocks. CLOCK_MONOTONIC is one clock for all processes of a machine."""

    # The functions themselves: a call of these stands in the way of every message.
    monotonic_s = staticmethod(time.monotonic)
    wall_s = staticmethod(time.time)

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)


class LoopClock:
    """The running loop's own time, for both; on a virtual loop it is as virtual as the timers."""

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()

    def wall_s(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)
