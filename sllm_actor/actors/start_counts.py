"""What a node's starts of models were made of, counted since the node began."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from sllm_actor.domain import Span


class StartCounts:
    """Owns the counts. Belongs to one event loop."""

    def __init__(self) -> None:
        self.placements = 0
        self.failed: Counter[str] = Counter()
        self._loads: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0])

    def started(self, spans: Iterable[Span]) -> None:
        """Note a start; its loads by the tier that the bytes came from."""
        for span in spans:
            if span.name == "load":
                load = self._loads[span.tier]
                load[0] += 1
                load[1] += span.end_s - span.begin_s
                load[2] += span.size_bytes

    def observe(self) -> dict[str, Any]:
        """Give the counts: loads have a number, seconds and bytes for each tier."""
        loads = {
            tier: {"count": int(count), "seconds": seconds, "bytes": int(size_bytes)}
            for tier, (count, seconds, size_bytes) in self._loads.items()
        }
        return {"placements": self.placements, "failed": dict(self.failed), "loads": loads}
