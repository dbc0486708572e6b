"""What goes one way, and for how long anything was on it: on the event loop, where several may be under way at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sllm_actor.loader.mover import PathFacts
from sllm_actor.runtime.clock import Clock


class Meter:
    """Counts bytes, and the time during which at least one was running."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._running = 0
        self._since_s = 0.0
        self._busy_s = 0.0
        self._size_bytes = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Be running for as long as the block."""
        if self._running == 0:
            self._since_s = self._clock.monotonic_s()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if self._running == 0:
                self._busy_s += self._clock.monotonic_s() - self._since_s

    def add(self, size_bytes: int) -> None:
        """Count bytes."""
        self._size_bytes += size_bytes

    def facts(self) -> PathFacts:
        """Tell what has been counted so far."""
        running_s = self._clock.monotonic_s() - self._since_s if self._running else 0.0
        return PathFacts(self._size_bytes, self._busy_s + running_s)
