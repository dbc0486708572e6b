"""Learn what a start takes beside its bytes: from the starts that ended, for each node, tier and checkpoint. Pure.

A start is estimated as `q + n / b` (ServerlessLLM, OSDI '24, section 6) and a constant: the engine, the skeleton, the
attaching, less what of them went on while bytes came. It is learned for each level of load by itself: beside engines
that compute or come up a start takes several times as long. What was never seen costs nothing; one other start on a
node already gives the constant of all its models.
"""

from __future__ import annotations

import statistics
from collections import OrderedDict
from typing import NamedTuple

from sllm_actor.domain import NodeId
from sllm_actor.policy.line_fit import Line, learned

WINDOW = 5
# Of load: none, one engine at work, two or three, four to seven, and more.
LEVELS = 5
MAX_REMEMBERED = 100_000
# Until a node has been seen to give up an instance.
FIRST_LEAVE_S = 0.2
WEIGHT = 0.3

HOST, SSD, SOURCE = "host memory", "ssd", "source"


class _Seen(NamedTuple):
    starts: tuple[float, ...]
    median_s: float


_Levels = tuple[_Seen | None, ...]
_NOTHING: _Levels = (None,) * LEVELS


def _level(at_work: int) -> int:
    return min(at_work.bit_length(), LEVELS - 1)


class Estimator:
    """Owns what was learned; the same starts in the same order teach it the same."""

    def __init__(self, max_remembered: int = MAX_REMEMBERED) -> None:
        self._max_remembered = max_remembered
        self._seen: OrderedDict[tuple[NodeId, str, str], _Levels] = OrderedDict()
        self._lines: dict[tuple[NodeId, str], Line] = {}
        self._leave_s: dict[NodeId, float] = {}

    def constant_s(
        self, node: NodeId, tier: str, fingerprint: str, size_bytes: int, move_s: float, at_work: int = 0
    ) -> float:
        """Estimate what a start takes beside its queue and its bytes, where so many engines are at work on the node.

        It is negative where a start was sooner than its bytes could come from the SSD: the page cache had them.
        """
        levels = self._seen.get((node, tier, fingerprint))
        if levels is not None:
            constant_s = _nearest(levels, _level(at_work)).median_s
        else:
            line = self._lines.get((node, tier))
            constant_s = line.at(size_bytes) if line is not None else 0.0
        return max(constant_s, -move_s if tier == SSD else 0.0)

    def starts(self, node: NodeId, tier: str, fingerprint: str) -> int:
        """Tell from how many starts of this checkpoint its constants are known."""
        return sum(len(seen.starts) for seen in self._seen.get((node, tier, fingerprint), ()) if seen is not None)

    def learn_start(
        self, node: NodeId, tier: str, fingerprint: str, size_bytes: int, constant_s: float, at_work: int = 0
    ) -> None:
        """Take in what a start took beside the queue and the bytes that were expected of it."""
        key, level = (node, tier, fingerprint), _level(at_work)
        levels = self._seen.pop(key, _NOTHING)
        before = levels[level]
        starts = (*before.starts, constant_s)[-WINDOW:] if before else (constant_s,)
        self._seen[key] = (*levels[:level], _Seen(starts, statistics.median(starts)), *levels[level + 1 :])
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


def _nearest(levels: _Levels, level: int) -> _Seen:
    """Give what was seen at the level of load that is nearest; of two, at the higher one."""
    seen = [(abs(at - level), -at, one) for at, one in enumerate(levels) if one is not None]
    return min(seen)[2]
