"""Heartbeats of one link: they measure the round trip, and end a link whose peer has been silent for too long."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from sllm_actor.errors import NodeUnreachable
from sllm_actor.runtime.clock import Clock
from sllm_actor.runtime.failure_detector import FailureDetector
from sllm_actor.runtime.letters import Beat, Echo
from sllm_actor.runtime.limits import Limits

if TYPE_CHECKING:
    from sllm_actor.runtime.link import Link


REMEMBERED_BEATS = 64
# Of an interval: a beat that comes later by more says that this process was held up.
LATE_SHARE = 0.4


class Heartbeat:
    """Beats while the link is open. Belongs to one event loop."""

    def __init__(self, link: Link, clock: Clock, limits: Limits) -> None:
        self.round_trip_s = 0.0
        self.gave_up = False
        self._link = link
        self._clock = clock
        self._interval_s = limits.heartbeat_s
        self._threshold = limits.phi_threshold
        self._acceptable_pause_s = limits.acceptable_pause_s
        self._detector: FailureDetector | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._last_s = 0.0
        self._stamps: deque[int] = deque(maxlen=REMEMBERED_BEATS)

    def start(self) -> None:
        """Begin to beat and to judge."""
        self._last_s = now_s = self._clock.monotonic_s()
        self._detector = FailureDetector(self._interval_s, self._acceptable_pause_s, now_s)
        self._later()

    def _later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._beat)

    def _beat(self) -> None:
        assert self._detector is not None
        now_s = self._clock.monotonic_s()
        late_s = now_s - self._last_s - self._interval_s
        if late_s > self._interval_s * LATE_SHARE:
            # We ourselves were not listening: that is no fault of the peer's.
            self._detector.excuse(late_s)
        self._last_s = now_s
        if self._detector.phi(now_s) > self._threshold:
            self.gave_up = True
            self._link.close(NodeUnreachable(f"{self._link.peer_name} has been silent for too long"))
            # It would not answer a polite end either.
            self._link.abort()
            return
        stamp = int(now_s * 1e9)
        self._stamps.append(stamp)
        self._link.send_control(Beat(stamp=stamp), None)
        self._later()

    def hear_beat(self, beat: Beat) -> None:
        """Echo a heartbeat, however much waits: a busy link is a living one."""
        self._link.send_control(Echo(stamp=beat.stamp), None)

    def hear_echo(self, echo: Echo) -> None:
        """Learn from an echo how far away the peer is, and that it lives; what was not said has no echo."""
        if self._detector is not None and echo.stamp in self._stamps:
            self._stamps.remove(echo.stamp)
            now_s = self._clock.monotonic_s()
            self.round_trip_s = max(0.0, now_s - echo.stamp / 1e9)
            self._detector.heartbeat(now_s)

    def stop(self) -> None:
        """Beat no more."""
        if self._timer is not None:
            self._timer.cancel()
