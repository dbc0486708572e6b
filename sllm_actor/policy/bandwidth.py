"""Learn a tier's bandwidth from the loads that were seen. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Protocol

WEIGHT = 0.3
SMALLEST_BYTES = 4 * 1024 * 1024


def corrected(estimate_bytes_per_s: float, size_bytes: int, duration_s: float) -> float:
    """Move the estimate towards an observed load (exponential average); where there is none, the load gives it.

    Loads too small to tell bandwidth from latency leave it as it is.
    """
    if size_bytes < SMALLEST_BYTES or duration_s <= 0:
        return estimate_bytes_per_s
    if estimate_bytes_per_s <= 0:
        return size_bytes / duration_s
    return (1 - WEIGHT) * estimate_bytes_per_s + WEIGHT * size_bytes / duration_s


class Counted(Protocol):
    """What has gone one way so far, and the time during which anything was on it."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def busy_s(self) -> float: ...


class ObservedWay:
    """The estimate of one way's bandwidth, from what its counters say at each look: 0 until they tell one."""

    def __init__(self, counted: Counted) -> None:
        self.bytes_per_s = 0.0
        self._seen = counted

    def learn(self, counted: Counted) -> None:
        """Take in what has gone this way since the last look."""
        before, self._seen = self._seen, counted
        size_bytes, busy_s = counted.size_bytes - before.size_bytes, counted.busy_s - before.busy_s
        self.bytes_per_s = corrected(self.bytes_per_s, size_bytes, busy_s)


class Bandwidths:
    """What the nodes of a cluster have seen of one kind of way; `first_bytes_per_s` is assumed until one has."""

    def __init__(self, first_bytes_per_s: float) -> None:
        self._first_bytes_per_s = first_bytes_per_s
        self._seen: list[float] = []

    def change(self, before_bytes_per_s: float, bytes_per_s: float) -> None:
        """Have one of them see another bandwidth than before; 0 is none."""
        if before_bytes_per_s == bytes_per_s:
            return
        if before_bytes_per_s > 0:
            del self._seen[bisect_left(self._seen, before_bytes_per_s)]
        if bytes_per_s > 0:
            insort(self._seen, bytes_per_s)

    @property
    def usual(self) -> float:
        """What a node may expect that has seen nothing yet: the middle of what the others have."""
        return self._seen[len(self._seen) // 2] if self._seen else self._first_bytes_per_s
