"""How late the event loop is: a callback that blocks shows up here, and is logged as a fault."""

from __future__ import annotations

import logging

from sllm_actor.runtime.clock import Clock

log = logging.getLogger(__name__)

INTERVAL_S = 0.02


class LoopLag:
    """Counts the times the loop was later than `fault_s`, and keeps the worst lag seen."""

    def __init__(self, clock: Clock, fault_s: float) -> None:
        self._clock = clock
        self._fault_s = fault_s
        self.faults = 0
        self.worst_s = 0.0

    async def watch(self) -> None:
        """Measure until cancelled."""
        while True:
            begin_s = self._clock.monotonic_s()
            await self._clock.sleep(INTERVAL_S)
            lag_s = self._clock.monotonic_s() - begin_s - INTERVAL_S
            self.worst_s = max(self.worst_s, lag_s)
            if lag_s > self._fault_s:
                self.faults += 1
                log.warning("the event loop was blocked for %.0f ms", lag_s * 1e3)
