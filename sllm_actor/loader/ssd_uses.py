"""When models of the SSD tier were last used, in the books and, a little later, on the disk.

The time of a model's record is its last use, so that what is evicted first survives a restart.
"""

from __future__ import annotations

import contextlib

from sllm_actor.errors import WriteFailed
from sllm_actor.loader import ssd_files
from sllm_actor.loader.ssd_quota import HeldModel, Quota
from sllm_actor.loader.ssd_record import RECORD_NAME
from sllm_actor.loader.ssd_work import DiskWork
from sllm_actor.runtime.clock import Clock

# Uses are told apart on the disk by this much, also where the clock stands still or goes back.
_TICK_S = 1e-5


class LastUses:
    """Gives times that only grow, and writes them beside the work. Belongs to one event loop."""

    def __init__(self, quota: Quota, clock: Clock, work: DiskWork) -> None:
        self._quota = quota
        self._clock = clock
        self._work = work
        self._latest_s = max((held.last_used_s for held in quota.all()), default=0.0)
        self._touched: set[str] = set()
        self._writing = False

    def now_s(self) -> float:
        """Seconds since 1970, later than any that was given before."""
        self._latest_s = max(self._clock.wall_s(), self._latest_s + _TICK_S)
        return self._latest_s

    def touch(self, held: HeldModel) -> None:
        """Note that a model is used now; a power cut may forget it."""
        held.last_used_s = self.now_s()
        self._touched.add(held.model_id)
        if not self._writing:
            self._writing = True
            self._work.spawn(self._write(), "last-uses")

    async def _write(self) -> None:
        try:
            while self._touched:
                held = self._quota.models.get(self._touched.pop())
                if held is not None:
                    with contextlib.suppress(WriteFailed):
                        await self._work.aside(ssd_files.stamp, held.path / RECORD_NAME, held.last_used_s)
        finally:
            self._writing = False
