"""Learn what a start takes beside its bytes: from the starts that ended, for each node, tier and checkpoint. Pure.

A start is estimated as `q + n / b` (ServerlessLLM, OSDI '24, section 6) and a constant: the engine, the skeleton, the
attaching, less what of them went on while bytes came. It is learned for each level of load by itself: beside others
who want the machine's cores, engines or not, a start takes several times as long. What was never seen costs nothing;
one other start on a node already gives the constant of all its models.
"""

from __future__ import annotations

import statistics
from collections import OrderedDict
from collections.abc import Collection
from typing import NamedTuple

from sllm_actor.domain import NodeId
from sllm_actor.policy.changes import Changes
from sllm_actor.policy.learned import KEPT_CHECKPOINTS, LearnedNode, LearnedStarts
from sllm_actor.policy.line_fit import Line, learned

WINDOW = 5
# Of load: nobody else, one, two or three, four to seven, eight to fifteen, and more.
LEVELS = 6
MAX_NODES, MAX_CHECKPOINTS = 2048, 1024
# Until a node has been seen to give up an instance.
FIRST_LEAVE_S = 0.2
WEIGHT = 0.3

HOST, SSD, SOURCE = "host memory", "ssd", "source"


class _Seen(NamedTuple):
    starts: tuple[float, ...]
    median_s: float


_Levels = tuple[_Seen | None, ...]
_NOTHING: _Levels = (None,) * LEVELS


def beside(at_work: int, threads: float) -> int:
    """Tell how many a start has beside it: threads that want the machine's cores, and the node's engines at work.

    These count once more, since some have been granted or asked after the threads were counted.
    """
    return at_work + round(threads)


def _level(others: int) -> int:
    return min(others.bit_length(), LEVELS - 1)


class _Node:
    """What was learned of one node."""

    def __init__(self) -> None:
        self.seen: OrderedDict[tuple[str, str], _Levels] = OrderedDict()
        self.lines: dict[str, Line] = {}
        self.leave_s: float | None = None


class Estimator:
    """Owns what was learned; the same starts in the same order teach it the same.

    `changed` are the nodes of which something was learned since somebody has last emptied it; `changes` are for all who
    keep what depends on what was learned, and forgotten.
    """

    def __init__(self, max_nodes: int = MAX_NODES, max_checkpoints: int = MAX_CHECKPOINTS) -> None:
        self._max_nodes = max_nodes
        self._max_checkpoints = max_checkpoints
        self._nodes: OrderedDict[NodeId, _Node] = OrderedDict()
        self.changed: set[NodeId] = set()
        self.changes = Changes()
        # Of which nodes a start that fetched a checkpoint is known.
        self._fetched: dict[str, dict[NodeId, None]] = {}

    def constant_s(
        self, node: NodeId, tier: str, fingerprint: str, size_bytes: int, move_s: float, others: int = 0
    ) -> float:
        """Estimate what a start takes beside its queue and its bytes, beside so many others.

        It is negative where a start was sooner than its bytes could come from the SSD: the page cache had them.
        """
        known = self._nodes.get(node)
        if known is None:
            return 0.0
        levels = known.seen.get((tier, fingerprint))
        if levels is not None:
            constant_s = _nearest(levels, _level(others)).median_s
        else:
            line = known.lines.get(tier)
            constant_s = line.at(size_bytes) if line is not None else 0.0
        return max(constant_s, -move_s if tier == SSD else 0.0)

    def starts(self, node: NodeId, tier: str, fingerprint: str) -> int:
        """Tell from how many starts of this checkpoint its constants are known."""
        known = self._nodes.get(node)
        levels = known.seen.get((tier, fingerprint), ()) if known is not None else ()
        return sum(len(seen.starts) for seen in levels if seen is not None)

    def learn_start(
        self, node: NodeId, tier: str, fingerprint: str, size_bytes: int, constant_s: float, others: int = 0
    ) -> None:
        """Take in what a start took beside the queue and the bytes that were expected of it."""
        known, key, level = self._changing(node), (tier, fingerprint), _level(others)
        levels = known.seen.pop(key, _NOTHING)
        before = levels[level]
        starts = (*before.starts, constant_s)[-WINDOW:] if before else (constant_s,)
        known.seen[key] = (*levels[:level], _seen(starts), *levels[level + 1 :])
        self._note(node, key)
        if len(known.seen) > self._max_checkpoints:
            oldest, _ = known.seen.popitem(last=False)
            self._forget(node, oldest)
        known.lines[tier] = learned(known.lines.get(tier, Line()), size_bytes, constant_s)

    def leave_s(self, node: NodeId) -> float:
        """Estimate how long an idle instance takes to leave."""
        known = self._nodes.get(node)
        return FIRST_LEAVE_S if known is None or known.leave_s is None else known.leave_s

    def learn_leave(self, node: NodeId, leave_s: float) -> None:
        """Take in how long one took."""
        known = self._changing(node)
        known.leave_s = leave_s if known.leave_s is None else (1 - WEIGHT) * known.leave_s + WEIGHT * leave_s

    def _changing(self, node: NodeId) -> _Node:
        """Give what is known of a node, which something is to be added to; who was not heard of for longest goes."""
        known = self._nodes.setdefault(node, _Node())
        self._nodes.move_to_end(node)
        self.changed.add(node)
        if len(self._nodes) > self._max_nodes:
            gone, forgotten = self._nodes.popitem(last=False)
            self.changed.add(gone)
            for key in forgotten.seen:
                self._forget(gone, key)
            self.changes.note(gone)
        self.changes.note(node)
        return known

    def _note(self, node: NodeId, key: tuple[str, str]) -> None:
        tier, fingerprint = key
        if tier == SOURCE:
            self._fetched.setdefault(fingerprint, {})[node] = None

    def _forget(self, node: NodeId, key: tuple[str, str]) -> None:
        tier, fingerprint = key
        if tier == SOURCE:
            del self._fetched[fingerprint][node]
            if not self._fetched[fingerprint]:
                del self._fetched[fingerprint]

    def fetched_by(self, fingerprint: str) -> Collection[NodeId]:
        """List the nodes of which a start is known that has fetched a checkpoint."""
        return self._fetched.get(fingerprint, {})

    def of_node(self, node: NodeId) -> LearnedNode | None:
        """Give what is to be kept of a node: of its checkpoints the last that started; None where it is unknown."""
        known = self._nodes.get(node)
        if known is None:
            return None
        newest = list(known.seen.items())[-KEPT_CHECKPOINTS:]
        starts = tuple(
            LearnedStarts(tier, fingerprint, tuple(seen.starts if seen else () for seen in levels))
            for (tier, fingerprint), levels in newest
        )
        return LearnedNode(leave_s=known.leave_s, lines=dict(known.lines), starts=starts)

    def restore(self, node: NodeId, kept: LearnedNode) -> None:
        """Begin with what was kept of a node, unless something newer is known of it, or too many are known."""
        if node in self._nodes or len(self._nodes) >= self._max_nodes:
            return
        known = self._nodes[node] = _Node()
        known.leave_s, known.lines = kept.leave_s, dict(kept.lines)
        for tier, fingerprint, seen in kept.starts:
            levels = [_seen(starts[-WINDOW:]) if starts else None for starts in seen[:LEVELS]]
            if any(levels):
                known.seen[tier, fingerprint] = (*levels, *_NOTHING[len(levels) :])
                self._note(node, (tier, fingerprint))
        self.changes.note(node)


def _seen(starts: tuple[float, ...]) -> _Seen:
    return _Seen(starts, statistics.median(starts))


def _nearest(levels: _Levels, level: int) -> _Seen:
    """Give what was seen at the level of load that is nearest; of two, at the higher one."""
    seen = [(abs(at - level), -at, one) for at, one in enumerate(levels) if one is not None]
    return min(seen)[2]
