"""What a node's starts of models were made of, counted since the node began."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from sllm_actor.domain import Span

# How far an estimate was from the start that was observed, in parts of the latter.
ERROR_RATIOS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 1.0, 2.0, 5.0)


class StartCounts:
    """Owns the counts. Belongs to one event loop."""

    def __init__(self) -> None:
        self.placements = 0
        # Answers that went on elsewhere after their instance had gone.
        self.recovered = 0
        # Answers that were ended for more urgent requests, and went on later.
        self.preempted = 0
        # What making room by moving or ending running answers came to.
        self.rooms: Counter[str] = Counter()
        # What came of bytes that were to come before a device was taken for them.
        self.fetches: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self._errors: defaultdict[str, list[int]] = defaultdict(lambda: [0] * (len(ERROR_RATIOS) + 1))
        self._error_sums: defaultdict[str, float] = defaultdict(float)
        self._loads: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0])

    def started(self, spans: Iterable[Span]) -> None:
        """Note a start, or what came to host memory before one: loads by the tier that the bytes came from."""
        for span in spans:
            if span.name == "load":
                load = self._loads[span.tier]
                load[0] += 1
                load[1] += span.end_s - span.begin_s
                load[2] += span.size_bytes

    def estimated(self, tier: str, predicted_s: float, observed_s: float) -> None:
        """Note a start that was expected to take `predicted_s`, from the tier that was then the highest."""
        if observed_s <= 0:
            return
        ratio = abs(predicted_s - observed_s) / observed_s
        self._errors[tier][bisect_left(ERROR_RATIOS, ratio)] += 1
        self._error_sums[tier] += ratio

    def observe(self) -> dict[str, Any]:
        """Give the counts: loads have a number, seconds and bytes for each tier, errors of estimates a histogram."""
        loads = {
            tier: {"count": int(count), "seconds": seconds, "bytes": int(size_bytes)}
            for tier, (count, seconds, size_bytes) in self._loads.items()
        }
        errors = {
            tier: {"counts": list(counts), "sum": self._error_sums[tier]} for tier, counts in self._errors.items()
        }
        return {
            "placements": self.placements,
            "recovered": self.recovered,
            "preempted": self.preempted,
            "rooms": dict(self.rooms),
            "fetches": dict(self.fetches),
            "failed": dict(self.failed),
            "loads": loads,
            "estimate_errors": {"bounds": ERROR_RATIOS, "tiers": errors},
        }
