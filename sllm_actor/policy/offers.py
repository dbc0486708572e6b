"""What each node could do for a model that is to start, and how long that would take. Pure."""

from __future__ import annotations

import enum
from typing import NamedTuple

from sllm_actor.domain import NodeId
from sllm_actor.messages.explanation import Term
from sllm_actor.messages.placement import InstanceView, NodeReport, PlaceModel
from sllm_actor.policy.estimator import HOST, SOURCE, SSD, Estimator
from sllm_actor.policy.node_view import NodeView

INF = float("inf")


class Action(enum.StrEnum):
    """What happens first on the node: nothing, or instances leave it (await: they do so already)."""

    START = "start"
    AWAIT = "await"
    EVICT = "evict"
    MIGRATE = "migrate"
    PREEMPT = "preempt"


class Move(NamedTuple):
    """An instance that generates and goes on at another node: its model runs there already, or is loaded first.

    `load` asks for that load; `tokens` are what is computed anew for its answers.
    """

    instance: InstanceView
    to: NodeId
    load: PlaceModel | None
    load_s: float
    resume_s: float
    tokens: int

    @property
    def seconds(self) -> float:
        """How long it takes until all of it is there."""
        return self.load_s + self.resume_s


class Offer(NamedTuple):
    """A node's part in a decision; offers compare by their estimates, equal ones by name.

    Of those `leaving`, the ones of `moves` go on elsewhere.
    """

    estimate_s: float
    node: NodeId
    action: Action
    tier: str
    leaving: tuple[InstanceView, ...] = ()
    first: tuple[Term, ...] = ()
    moves: tuple[Move, ...] = ()


class Way(NamedTuple):
    """The way up from the highest tier that holds the checkpoint."""

    tier: str
    queue_s: float
    size_bytes: int
    bytes_per_s: float

    @property
    def move_s(self) -> float:
        """How long the bytes take, once it is their turn."""
        if not self.size_bytes:
            return 0.0
        return self.size_bytes / self.bytes_per_s if self.bytes_per_s > 0 else INF


def way_up(node: NodeView, question: PlaceModel) -> Way:
    """Find the way to host memory, where a CPU engine computes: bytes that are there need no further move."""
    report, fingerprint = node.report, question.fingerprint
    if fingerprint in node.on_host:
        return Way(HOST, 0.0, 0, 0.0)
    if fingerprint in node.on_ssd:
        return Way(SSD, report.disk_queues_s.get(fingerprint, 0.0), question.size_bytes, node.ssd_bytes_per_s)
    return Way(SOURCE, report.remote_queue_s, question.size_bytes, node.remote_bytes_per_s)


def is_guess(report: NodeReport, tier: str) -> bool:
    """Tell whether a node has not seen yet how fast bytes come from a tier."""
    return not {SSD: report.ssd_bytes_per_s, SOURCE: report.remote_bytes_per_s}.get(tier, INF)


def startup_s(node: NodeView, estimator: Estimator, question: PlaceModel, way: Way) -> float:
    """Estimate a start on a node that has room."""
    return way.move_s + rest_s(node, estimator, question, way, Action.START)


def rest_s(node: NodeView, estimator: Estimator, question: PlaceModel, way: Way, action: Action) -> float:
    """Estimate all of a start but the moving of its bytes, which depends on nothing but those.

    It is told in whole microseconds, so that two that differ do so still with the same on top of both.
    """
    constant_s = estimator.constant_s(
        node.report.node, way.tier, question.fingerprint, question.size_bytes, way.move_s, node.counted.beside
    )
    leave_s = 0.0 if action is Action.START else estimator.leave_s(node.report.node)
    return round(way.queue_s + constant_s + leave_s, 6)


def start_terms(node: NodeView, estimator: Estimator, question: PlaceModel) -> tuple[Term, ...]:
    """Give the parts of that estimate, with what they were made of."""
    way, name = way_up(node, question), node.report.node
    constant_s = estimator.constant_s(
        name, way.tier, question.fingerprint, question.size_bytes, way.move_s, node.counted.beside
    )
    starts = estimator.starts(name, way.tier, question.fingerprint)
    bytes_in: dict[str, float] = {"size_bytes": way.size_bytes}
    if way.size_bytes:
        bytes_in["bytes_per_s"] = way.bytes_per_s
    return (
        Term(name="queue", seconds=way.queue_s, inputs={}),
        Term(name="bytes", seconds=way.move_s, inputs=bytes_in),
        Term(
            name="engine",
            seconds=constant_s,
            inputs={"starts_seen": starts, "at_work": node.counted.at_work, "beside": node.counted.beside},
        ),
    )


def leave_term(estimator: Estimator, node: NodeId) -> Term:
    """The part that idle instances take to leave, which they do together."""
    return Term(name="leave", seconds=estimator.leave_s(node), inputs={})


def first_action(node: NodeView, question: PlaceModel) -> Action | None:
    """Tell what must happen before the model could start there; None where idle instances are not enough.

    Nothing starts on a node that is cordoned, nor on one that lacks what can't be fetched.
    """
    if node.report.cordoned or not allows(question, node.report.node):
        return None
    if question.holders_only and not node.holds(question.fingerprint):
        return None
    slots, host_bytes = node.missing(question)
    if slots <= 0 and host_bytes <= 0:
        return Action.START
    _, leaving, idle, *_ = node.counted
    if slots <= leaving.slots and host_bytes <= leaving.host_bytes:
        return Action.AWAIT
    if slots <= leaving.slots + idle.slots and host_bytes <= leaving.host_bytes + idle.host_bytes:
        return Action.EVICT
    return None


def offer_of(node: NodeView, estimator: Estimator, question: PlaceModel) -> Offer | None:
    """Give what the node could do without touching what generates; None where that is nothing."""
    action = first_action(node, question)
    if action is None:
        return None
    way = way_up(node, question)
    estimate_s = way.move_s + rest_s(node, estimator, question, way, action)
    return Offer(estimate_s, node.report.node, action, way.tier)


def is_restricted(question: PlaceModel) -> bool:
    """Tell whether whoever asks would not have it everywhere."""
    return bool(question.not_on or question.only_on)


def allows(question: PlaceModel, node: NodeId) -> bool:
    """Tell whether whoever asks would have it there."""
    return node not in question.not_on and question.only_on in ("", node)
