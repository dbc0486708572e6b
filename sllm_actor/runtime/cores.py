"""How many want the machine's cores: what starts now takes its turn among them."""

from __future__ import annotations

import math
from pathlib import Path

from sllm_actor.runtime.clock import Clock

LOADAVG = Path("/proc/loadavg")
INTERVAL_S = 0.05
# What was seen so long ago counts a third.
MEMORY_S = 0.2


class CoreDemand:
    """Owns a running average, which `watch` keeps: of the threads of all processes that run or wait for a core."""

    def __init__(self, clock: Clock, loadavg: Path = LOADAVG) -> None:
        self._clock = clock
        self._loadavg = loadavg
        self.threads = 0.0

    async def watch(self) -> None:
        """Look again and again until cancelled."""
        while True:
            begin_s = self._clock.monotonic_s()
            await self._clock.sleep(INTERVAL_S)
            self.look(self._clock.monotonic_s() - begin_s)

    def look(self, since_s: float) -> None:
        """Take in what the kernel says now; whoever reads it runs, too, and does not count."""
        running = int(self._loadavg.read_text().split()[3].partition("/")[0])
        kept = math.exp(-since_s / MEMORY_S)
        self.threads = kept * self.threads + (1 - kept) * max(0, running - 1)
