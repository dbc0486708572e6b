"""How late the event loop is: a callback that blocks shows up here, and is counted as a fault."""

from __future__ import annotations

import logging
from math import inf

from sllm_actor.runtime.clock import Clock

log = logging.getLogger(__name__)

INTERVAL_S = 0.02
TELL_EVERY_S = 60.0


class LoopLag:
    """Counts the times the loop was later than `fault_s`, and keeps the worst lag seen.

    The log hears of it in one line a minute, from `tell` on: what is late before is a start's own work.
    """

    def __init__(self, clock: Clock, fault_s: float) -> None:
        self._clock = clock
        self._fault_s = fault_s
        self.faults = 0
        self.worst_s = 0.0
        self._tell_at_s = inf
        self._told_faults = 0
        self._worst_untold_s = 0.0

    def tell(self) -> None:
        """Begin to log."""
        self._tell_at_s = self._clock.monotonic_s() + TELL_EVERY_S
        self._told_faults, self._worst_untold_s = self.faults, 0.0

    async def watch(self) -> None:
        """Measure until cancelled."""
        while True:
            begin_s = self._clock.monotonic_s()
            await self._clock.sleep(INTERVAL_S)
            lag_s = self._clock.monotonic_s() - begin_s - INTERVAL_S
            self.worst_s = max(self.worst_s, lag_s)
            self._worst_untold_s = max(self._worst_untold_s, lag_s)
            self.faults += lag_s > self._fault_s
            if begin_s >= self._tell_at_s:
                self._tell_of_last_minute()
                self._tell_at_s = begin_s + TELL_EVERY_S

    def _tell_of_last_minute(self) -> None:
        faults, worst_ms = self.faults - self._told_faults, self._worst_untold_s * 1e3
        if faults:
            log.warning("the event loop was late %d times in a minute, by up to %.0f ms", faults, worst_ms)
        self._told_faults, self._worst_untold_s = self.faults, 0.0
