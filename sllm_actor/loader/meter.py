"""What goes one way, and for how long anything was on it, however many are under way at once. Thread-safe."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sllm_actor.loader.mover import PathFacts
from sllm_actor.runtime.clock import Clock


class Meter:
    """Counts bytes, and the time during which at least one was under way."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._under_way = 0  # Guarded by _lock, as is the rest.
        self._since_s = 0.0
        self._busy_s = 0.0
        self._size_bytes = 0

    def begin(self) -> None:
        """Say that something is under way."""
        with self._lock:
            if self._under_way == 0:
                self._since_s = self._clock.monotonic_s()
            self._under_way += 1

    def end(self, size_bytes: int) -> None:
        """Say that it has ended, and what it has moved."""
        with self._lock:
            self._size_bytes += size_bytes
            self._under_way -= 1
            if self._under_way == 0:
                self._busy_s += self._clock.monotonic_s() - self._since_s

    @contextmanager
    def running(self) -> Iterator[None]:
        """Be under way for as long as the block; what it has moved is for `add`."""
        self.begin()
        try:
            yield
        finally:
            self.end(0)

    def add(self, size_bytes: int) -> None:
        """Count bytes."""
        with self._lock:
            self._size_bytes += size_bytes

    def facts(self) -> PathFacts:
        """Tell what has been counted so far."""
        with self._lock:
            running_s = self._clock.monotonic_s() - self._since_s if self._under_way else 0.0
            return PathFacts(self._size_bytes, self._busy_s + running_s)
