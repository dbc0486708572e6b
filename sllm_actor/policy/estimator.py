"""Learn what a start takes beside its bytes: from the starts that ended, for each node, tier and checkpoint. Pure.

A start is estimated as `q + n / b` (ServerlessLLM, OSDI '24, section 6) and a constant: the engine, the skeleton, the
attaching, less what of them went on while bytes came. What was never seen costs nothing; one other start on a node
already gives the constant of all its models.
"""

from __future__ import annotations

import statistics
from collections import OrderedDict
from typing import NamedTuple

from sllm_actor.domain import NodeId
from sllm_actor.policy.line_fit import Line, learned

WINDOW = 9
MAX_REMEMBERED = 100_000
# Until a node has been seen to give up an instance.
FIRST_LEAVE_S = 0.2
WEIGHT = 0.3

HOST, SSD, SOURCE = "host memory", "ssd", "source"


class _Seen(NamedTuple):
    starts: tuple[float, ...]
    median_s: float


class Estimator:
    """Owns what was learned; the same starts in the same order teach it the same."""

    def __init__(self, max_remembered: int = MAX_REMEMBERED) -> None:
        self._max_remembered = max_remembered
        self._seen: OrderedDict[tuple[NodeId, str, str], _Seen] = OrderedDict()
        self._lines: dict[tuple[NodeId, str], Line] = {}
        self._leave_s: dict[NodeId, float] = {}

    def constant_s(self, node: NodeId, tier: str, fingerprint: str, size_bytes: int, move_s: float) -> float:
        """Estimate what a start takes beside its queue and its bytes.

        It is negative where a start was sooner than its bytes could come from the SSD: the page cache had them.
        """
        seen = self._seen.get((node, tier, fingerprint))
        if seen is not None:
            constant_s = seen.median_s
        else:
            line = self._lines.get((node, tier))
            constant_s = line.at(size_bytes) if line is not None else 0.0
        return max(constant_s, -move_s if tier == SSD else 0.0)

    def starts(self, node: NodeId, tier: str, fingerprint: str) -> int:
        """Tell from how many starts of this checkpoint its constant is known."""
        seen = self._seen.get((node, tier, fingerprint))
        return len(seen.starts) if seen is not None else 0

    def learn_start(self, node: NodeId, tier: str, fingerprint: str, size_bytes: int, constant_s: float) -> None:
        """Take in what a start took beside the queue and the bytes that were expected of it."""
        key = node, tier, fingerprint
        before = self._seen.pop(key, None)
        starts = (*before.starts, constant_s)[-WINDOW:] if before else (constant_s,)
        self._seen[key] = _Seen(starts, statistics.median(starts))
        if len(self._seen) > self._max_remembered:
            self._seen.popitem(last=False)
        self._lines[node, tier] = learned(self._lines.get((node, tier), Line()), size_bytes, constant_s)

    def leave_s(self, node: NodeId) -> float:
        """Estimate how long an idle instance takes to leave."""
        return self._leave_s.get(node, FIRST_LEAVE_S)

    def learn_leave(self, node: NodeId, leave_s: float) -> None:
        """Take in how long one took."""
        before_s = self._leave_s.get(node)
        self._leave_s[node] = leave_s if before_s is None else (1 - WEIGHT) * before_s + WEIGHT * leave_s

    def forget(self, node: NodeId) -> None:
        """Forget a node that has gone for good."""
        self._leave_s.pop(node, None)
        self._lines = {key: line for key, line in self._lines.items() if key[0] != node}
        for key in [key for key in self._seen if key[0] == node]:
            del self._seen[key]
