"""Decide where a model starts, or what must leave for it first, or that it waits. Pure: no clock, no I/O."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import NamedTuple

from sllm_actor.domain import NodeId
from sllm_actor.errors import DestinationFailed, ModelTooLarge, SllmError
from sllm_actor.messages.explanation import Explanation, Term
from sllm_actor.messages.placement import InstanceView, NodeReport, PlaceModel
from sllm_actor.policy.cluster_view import ClusterView
from sllm_actor.policy.explaining import explain
from sllm_actor.policy.offers import Action, Offer, is_restricted
from sllm_actor.policy.policies import POLICIES, Situation
from sllm_actor.units import format_bytes

# What leaves running inferences alone, and all that the actors can carry out.
QUIET = frozenset({Action.START, Action.AWAIT, Action.EVICT})
ABLE = frozenset(Action)


class Start(NamedTuple):
    """There is room on the node: start there, in the sum of these terms."""

    report: NodeReport
    estimate_s: float
    tier: str
    explanation: Explanation
    terms: tuple[Term, ...]


class Evict(NamedTuple):
    """These idle instances of the node leave first."""

    report: NodeReport
    victims: tuple[InstanceView, ...]
    explanation: Explanation


class MakeRoom(NamedTuple):
    """What generates on the node moves or ends first, as the offer says, and idle instances leave with it."""

    report: NodeReport
    offer: Offer
    explanation: Explanation


class Wait(NamedTuple):
    """There is no room, and none to be made, or it is being made already.

    Where some places would not do, or only a better one is awaited, which is decided anew `again_s` later, it does not
    hold up those who asked later.
    """

    reason: str
    holds_up: bool = True
    again_s: float = 0.0


Decision = Start | Evict | MakeRoom | Wait


def decide(situation: Situation, policy: str, given_up: tuple[str, ...] = ()) -> Decision:
    """Place one start; `given_up` are instances that have left for it already."""
    choice = POLICIES[policy](situation)
    if choice.taken is None:
        holds_up = not choice.again_s and not is_restricted(situation.question)
        return Wait(choice.why, holds_up, choice.again_s)
    offer, report = choice.taken, situation.view.nodes[choice.taken.node].report
    explanation = explain(situation, policy, choice, given_up)
    if offer.action is Action.START:
        assert explanation.chosen is not None, "something was taken"
        return Start(report, offer.estimate_s, offer.tier, explanation, explanation.chosen.terms)
    if offer.action is Action.EVICT:
        return Evict(report, offer.leaving, explanation)
    assert offer.action in (Action.MIGRATE, Action.PREEMPT), f"nobody can {offer.action}"
    return MakeRoom(report, offer, explanation)


class Waiter(NamedTuple):
    """A start that waits for room, and since when."""

    question: PlaceModel
    since_s: float


def in_order(waiting: Sequence[Waiter], now_s: float) -> list[int]:
    """Give the places of those that wait, who are in order of arrival, in the order in which they are served.

    The lowest priority is first, and of equals who came first. But one that has waited for half of its time goes
    before all who have not, so that however many urgent ones come, nobody waits in vain for a node that serves.
    """

    def rank(place: int) -> tuple[bool, int]:
        question, since_s = waiting[place]
        is_late = now_s - since_s >= question.timeout_s / 2
        return not is_late, 0 if is_late else question.priority

    return sorted(range(len(waiting)), key=rank)


def limits_of(report: NodeReport) -> tuple[object, ...]:
    """Give what of a report `refusal` depends on, but for cordons and what runs behind them."""
    return report.slots, report.host_pool_bytes, report.pinned_host_bytes


def refusal(question: PlaceModel, view: ClusterView, members: Set[NodeId], gone: Set[NodeId]) -> SllmError | None:
    """Say why who asks would wait in vain; a member that was not heard of yet may have the room.

    Where there are no `members`, all nodes are taken for such; those `gone` have ended, whatever their leases say.
    """
    node = NodeId(question.only_on)
    if node and (node in gone or (members and node not in members)):
        return DestinationFailed(f"{node} has left the cluster", param="to")
    if members and question.not_on and not members - set(question.not_on) - gone:
        return DestinationFailed(f"there is no other node for {question.model}", param="to")
    if node in view.nodes and view.nodes[node].report.cordoned and not _runs_on(question, view, node):
        return DestinationFailed(f"{node} is cordoned: nothing starts there", param="to")
    # Last, since it looks at all members: whether every one has reported.
    if (reason := fits_nowhere(question, view)) and members <= view.nodes.keys():
        return ModelTooLarge(reason, param="model")
    return None


def _runs_on(question: PlaceModel, view: ClusterView, node: NodeId) -> bool:
    return any(report.node == node for report, _ in view.running(question.model))


def fits_nowhere(question: PlaceModel, view: ClusterView) -> str:
    """Say why no node that has reported could start the model, whatever else left it; empty where one could."""
    print_, host_bytes = question.fingerprint, question.host_bytes
    if any(
        host_bytes <= node.unpinned_bytes(print_) and question.slots <= node.report.slots
        for node in view.nodes.values()
        if node.report.slots
    ):
        return ""
    workers = [node for node in view.nodes.values() if node.report.slots]
    if not workers:  # One that has slots may come yet.
        return ""
    nodes = [node for node in workers if question.slots <= node.report.slots]
    if not nodes:
        slots = max(node.report.slots for node in workers)
        return f"{question.model} needs {question.slots} slots of one node, no node has more than {slots}"
    node = max(nodes, key=lambda node: (node.report.host_pool_bytes, node.unpinned_bytes(print_)))
    pool_bytes = node.report.host_pool_bytes
    needs, has = format_bytes(host_bytes), format_bytes(pool_bytes)
    missing = f"{question.model} needs {needs} of host memory, the pool has {has}"
    if host_bytes > pool_bytes:
        return f"{missing}: raise host_pool_bytes"
    pinned = format_bytes(pool_bytes - node.unpinned_bytes(print_))
    return f"{missing}, of which other models have {pinned} pinned: unpin one, or raise host_pool_bytes"
