"""When a client that is turned away may come again: an estimate from what the node knows, bounded. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from sllm_actor.messages.placement import PlaceModel
from sllm_actor.policy.node_view import NodeView
from sllm_actor.policy.offers import way_up

LEAST_S = 1.0
MOST_S = 60.0
# Without anything to go by.
UNKNOWN_S = 5.0
REMEMBERED = 16


def bounded(wait_s: float) -> float:
    """Keep an estimate within what is worth saying."""
    return min(max(wait_s, LEAST_S), MOST_S)


class Pace:
    """How often a place has become free of late."""

    def __init__(self) -> None:
        self._freed_s: deque[float] = deque(maxlen=REMEMBERED)

    def note(self, now_s: float) -> None:
        """Take note of a place that has become free."""
        self._freed_s.append(now_s)

    def next_s(self, now_s: float) -> float:
        """Estimate the seconds until the next one; the time since the last has its part in it."""
        if not self._freed_s:
            return UNKNOWN_S
        return bounded((now_s - self._freed_s[0]) / len(self._freed_s))


def placement_s(question: PlaceModel, nodes: Iterable[NodeView]) -> float:
    """Estimate when a start that found no room is worth another try: when the soonest node could have done with it."""
    ways = [way_up(node, question) for node in nodes]
    return bounded(max(min((way.queue_s + way.move_s for way in ways), default=0.0), UNKNOWN_S))


def rest_s(done_bytes: int, total_bytes: int, elapsed_s: float) -> float:
    """Estimate the seconds until the rest of a load has come, at the pace of what has."""
    if done_bytes <= 0 or elapsed_s <= 0:
        return UNKNOWN_S
    return bounded((total_bytes - done_bytes) * elapsed_s / done_bytes)
