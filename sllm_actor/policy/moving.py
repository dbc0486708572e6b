"""Make room on the node that would be soonest, by moving what generates there, or by ending it. Pure.

Cost model: ServerlessLLM (OSDI '24, section 6.2). A migration takes `a · (t_in + t_out) + c`, for the destination
computes the prompt's and the answer's tokens anew, and the load of its model there; `t_out = d / t`, how long the
answer has been generated over the time of a token.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from sllm_actor.domain import NodeId, RequestId
from sllm_actor.messages.explanation import Term
from sllm_actor.messages.placement import InstanceView, PlaceModel
from sllm_actor.policy.cluster_view import ClusterView
from sllm_actor.policy.estimator import Estimator
from sllm_actor.policy.node_view import NodeView
from sllm_actor.policy.offers import (
    Action,
    Move,
    Offer,
    allows,
    first_action,
    leave_term,
    startup_s,
    way_up,
)
from sllm_actor.policy.room import Cost, Occupant, cheapest_to_leave
from sllm_actor.policy.soonest import soonest

# Each needs a look for its destination.
MAX_MOVED = 8
# Among the soonest offers of other nodes the first one that has room is looked for.
SOONEST_LOOKED_AT = 4


def tokens_so_far(instance: InstanceView, age_s: float) -> float:
    """Estimate `t_in + t_out` of what an instance generates; `age_s` is how old its report is."""
    running_s = instance.running_s + age_s * instance.active
    return instance.prompt_tokens + (running_s / instance.token_s if instance.token_s > 0 else 0.0)


def resume_s(instance: InstanceView, age_s: float) -> float:
    """Estimate how long another engine would take to come to where this one is, with all its requests."""
    return instance.resume_s_per_token * tokens_so_far(instance, age_s) + instance.resume_s * instance.active


def load_of(instance: InstanceView, question: PlaceModel, not_on: tuple[NodeId, ...]) -> PlaceModel:
    """Ask for an instance's model elsewhere, on behalf of who asks for another one."""
    return PlaceModel(
        request_id=RequestId(f"{question.request_id}-moves-{instance.instance_id}"),
        model=instance.model,
        fingerprint=instance.fingerprint,
        size_bytes=instance.size_bytes,
        host_bytes=instance.host_bytes,
        timeout_s=question.timeout_s,
        slots=instance.slots,
        priority=instance.priority,
        holders_only=instance.holders_only,
        not_on=not_on,
    )


def move_of(
    view: ClusterView, estimator: Estimator, instance: InstanceView, node: NodeView, question: PlaceModel, age_s: float,
    taken: Collection[NodeId] = (),
) -> Move | None:  # fmt: skip
    """Give the soonest move of an instance to a node that runs its model or has room for it; None where there is none.

    Of the nodes in `taken` the room is needed for others.
    """
    tokens, here = round(tokens_so_far(instance, age_s)), node.report.node
    to_resume_s = resume_s(instance, age_s)
    running = [
        (one.active, report.node)
        for report, one in view.running(instance.model)
        if report.node != here and not report.cordoned
    ]
    if running:
        return Move(instance, min(running)[1], None, 0.0, to_resume_s, tokens)
    load = load_of(instance, question, (here, *taken))
    offers = [one for one in soonest(view, estimator, load, SOONEST_LOOKED_AT) if one.action is Action.START]
    return Move(instance, offers[0].node, load, offers[0].estimate_s, to_resume_s, tokens) if offers else None


def migrate(
    view: ClusterView, estimator: Estimator, question: PlaceModel, node: NodeView, now_s: float
) -> Offer | None:
    """Give the offer of a node from which the cheapest choice of running inferences moves away first.

    Two that would load at one node may not both fit there: of those chosen each goes to a node of its own, and where
    there is none for one of them, a choice is made without it.
    """
    age_s = view.age_s(node.report.node, now_s)
    found = [move_of(view, estimator, one, node, question, age_s) for one in _movable(node)[:MAX_MOVED]]
    moves = {one.instance.instance_id: one for one in found if one is not None}
    while moves:
        movable = [Occupant(one.instance, Cost(one.seconds, 1)) for one in moves.values()]
        chosen = _cheapest(question, node, movable)
        if chosen is None:
            return None
        taken: set[NodeId] = set()
        settled: list[Move] = []
        for occupant in chosen:
            move = moves.get(occupant.instance.instance_id)
            if move is not None and move.load is not None and move.to in taken:
                move = move_of(view, estimator, move.instance, node, question, age_s, tuple(sorted(taken)))
                if move is None:
                    del moves[occupant.instance.instance_id]
                    break
            if move is not None:
                settled.append(move)
                taken |= {move.to} if move.load is not None else set()
        else:
            terms = [term for move in settled for term in _move_terms(move)]
            return _offer(estimator, question, node, chosen, Action.MIGRATE, terms, tuple(settled))
    return None


def _movable(node: NodeView) -> list[InstanceView]:
    """List what generates there and may leave: what has to run at all times stays where it is."""
    return [one for one in node.counted.busy if not one.kept]


def _move_terms(move: Move) -> tuple[Term, ...]:
    instance = move.instance
    recomputed = {
        "tokens": float(move.tokens), "answers": float(instance.active), "a": instance.resume_s_per_token,
        "c": instance.resume_s,
    }  # fmt: skip
    return (
        Term(name=f"load {instance.model} at {move.to}", seconds=move.load_s, inputs={}),
        Term(name=f"resume {instance.instance_id}", seconds=move.resume_s, inputs=recomputed),
    )


def preempt(
    view: ClusterView, estimator: Estimator, question: PlaceModel, node: NodeView, now_s: float
) -> Offer | None:
    """Give the offer of a node on which less urgent inferences are ended, to be resumed later or elsewhere."""
    age_s = view.age_s(node.report.node, now_s)
    less_urgent = [one for one in _movable(node) if one.priority > question.priority]
    ending = [Occupant(one, Cost(resume_s(one, age_s), 1)) for one in less_urgent]
    chosen = _cheapest(question, node, ending)
    if chosen is None:
        return None
    # Nobody waits for what they lose: it is shown, and no part of the estimate.
    lost = [one for one in chosen if one.instance.active]
    tokens = sum(round(tokens_so_far(one.instance, age_s)) for one in lost)
    term = Term(name="preempt", seconds=0.0, inputs={"instances": float(len(lost)), "tokens": float(tokens)})
    return _offer(estimator, question, node, chosen, Action.PREEMPT, [term], ())


def _cheapest(question: PlaceModel, node: NodeView, busy: list[Occupant]) -> tuple[Occupant, ...] | None:
    idle = [Occupant(one, Cost(0.0, 1)) for one in node.counted.idle]
    missing, awaited = node.missing(question), node.counted.leaving_room
    return cheapest_to_leave([*idle, *busy], missing.slots - awaited.slots, missing.host_bytes - awaited.host_bytes)


def _offer(
    estimator: Estimator, question: PlaceModel, node: NodeView, chosen: tuple[Occupant, ...], action: Action,
    terms: list[Term], moves: tuple[Move, ...],
) -> Offer | None:  # fmt: skip
    """Give the offer of a choice; None where nothing that generates is in it."""
    if not any(occupant.instance.active for occupant in chosen):
        return None
    way, name = way_up(node, question), node.report.node
    # An instance is stopped when its answers have gone, as an idle one is.
    first = (*terms, leave_term(estimator, name))
    estimate_s = sum(term.seconds for term in first) + startup_s(node, estimator, question, way)
    leaving = tuple(occupant.instance for occupant in chosen)
    return Offer(estimate_s, name, action, way.tier, leaving, first, moves)


def victims(node: NodeView, question: PlaceModel) -> tuple[InstanceView, ...]:
    """Choose the idle instances that leave for a model: as few and as long idle as can be."""
    assert first_action(node, question) is Action.EVICT
    missing, awaited = node.missing(question), node.counted.leaving_room
    # Those that have been idle the longest are the least loss.
    idle = [Occupant(one, Cost(0.0, 1 + rank)) for rank, one in enumerate(node.counted.idle)]
    chosen = cheapest_to_leave(idle, missing.slots - awaited.slots, missing.host_bytes - awaited.host_bytes)
    assert chosen is not None, "there is room for it where all idle instances leave"
    return tuple(occupant.instance for occupant in chosen)


class Nearest(NamedTuple):
    """A node that holds a checkpoint, and how soon it would start there if there were room."""

    start_s: float
    node: NodeView


def nearest(view: ClusterView, estimator: Estimator, question: PlaceModel) -> list[Nearest]:
    """List the nodes that hold the checkpoint, by how soon it would start there if there were room."""
    holding = [view.nodes[name] for name in view.holders(question.fingerprint)]
    fitting = [
        Nearest(startup_s(node, estimator, question, way_up(node, question)), node)
        for node in holding
        if not node.report.cordoned
        and allows(question, node.report.node)
        and question.slots <= node.report.slots
        and question.host_bytes <= node.unpinned_bytes(question.fingerprint)
    ]
    return sorted(fitting, key=lambda one: (one.start_s, one.node.report.node))
