"""Tell where a start's bytes come before a device is taken for it. Pure.

A device that waits for bytes computes nothing, and others wait for it.
"""

from __future__ import annotations

from typing import NamedTuple

from sllm_actor.messages.placement import PlaceModel
from sllm_actor.policy.cluster_view import ClusterView
from sllm_actor.policy.estimator import SOURCE
from sllm_actor.policy.node_view import NodeView
from sllm_actor.policy.offers import way_up
from sllm_actor.policy.placement import Decision, Evict, MakeRoom, Start

# Bytes that are expected so soon are as good as there: meanwhile an engine is taken, and is told where they lie.
AHEAD_S = 0.5
# Of the nodes with the shortest queues of fetches so many are looked at.
LOOKED_AT = 8


class Arrival:
    """When bytes are expected: as estimated, until some have come; then by how fast those did."""

    def __init__(self, now_s: float, expected_s: float) -> None:
        self._moving_from_s = now_s
        self._expected_s = expected_s
        self._has_begun = False

    def hear(self, done_bytes: int, total_bytes: int, now_s: float) -> None:
        """Take in how much has come; nothing as long as others have their turn."""
        if not done_bytes:
            self._moving_from_s = now_s
            return
        self._has_begun = True
        self._expected_s = now_s + (now_s - self._moving_from_s) * (total_bytes - done_bytes) / done_bytes

    def left_s(self, now_s: float) -> float:
        """Tell in how long they are expected; where nothing has come, not before something has."""
        left_s = self._expected_s - now_s
        return left_s if self._has_begun else max(left_s, 2 * AHEAD_S)


def bytes_s(decision: Start | Evict) -> float:
    """Tell how long a start would have a device and wait for what is not on its node."""
    chosen = decision.explanation.chosen
    assert chosen is not None, "something was taken"
    if chosen.tier != SOURCE:
        return 0.0
    return sum(term.seconds for term in chosen.terms if term.name in ("queue", "bytes"))


def come_first(decision: Decision, bytes_first_s: float) -> bool:
    """Tell whether what was decided would have a device wait for longer than that."""
    return isinstance(decision, Start | Evict) and bytes_s(decision) > bytes_first_s


def waits_for_bytes(decision: Decision, left_s: float, bytes_first_s: float) -> bool:
    """Tell whether a start goes on to wait for bytes that are expected in `left_s`, whatever else could be done."""
    if isinstance(decision, MakeRoom):
        return decision.offer.estimate_s > left_s > 0
    return come_first(decision, bytes_first_s)


class Fetcher(NamedTuple):
    """A node that could fetch bytes, and how long that would take."""

    node: NodeView
    seconds: float


def soonest_to_fetch(view: ClusterView, question: PlaceModel, bytes_first_s: float) -> Fetcher | None:
    """Choose who fetches what no node has, while all devices are taken: the one whose queue is the shortest.

    None where a node has it, whose device it may wait for, or it comes at once.
    """
    if question.holders_only or view.holders(question.fingerprint):
        return None
    for queue_s, name in view.by_remote_queue[:LOOKED_AT]:
        node = view.nodes[name]
        if not node.report.cordoned and question.slots <= node.report.slots and has_room(node, question):
            seconds = queue_s + way_up(node, question).move_s
            return Fetcher(node, seconds) if seconds > bytes_first_s else None
    return None


def has_room(node: NodeView, question: PlaceModel) -> bool:
    """Tell whether the bytes have a place in host memory without any instance leaving."""
    return node.missing(question).host_bytes <= 0


def places(node: NodeView) -> int:
    """Count the instances that could start on a node once bytes are there, at least one."""
    free, leaving, idle, *_ = node.counted
    return max(1, free.slots + leaving.slots + idle.slots)
