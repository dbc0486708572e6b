"""Make room on the node that would be soonest, by moving what generates there, or by ending it. Pure.

Cost model: ServerlessLLM (OSDI '24, section 6.2). A migration takes `a · (t_in + t_out) + c`, for the destination
computes the prompt's and the answer's tokens anew, and the load of its model there; `t_out = d / t`, how long the
answer has been generated over the time of a token.
"""

from __future__ import annotations

from sllm_actor.messages.explanation import Term
from sllm_actor.messages.placement import InstanceView, PlaceModel
from sllm_actor.policy.cluster_view import ClusterView, NodeView
from sllm_actor.policy.estimator import Estimator
from sllm_actor.policy.offers import Action, Offer, first_action, leave_term, soonest, startup_s, way_up
from sllm_actor.policy.room import Cost, Occupant, cheapest_to_leave

# Each needs a look for its destination.
MAX_MOVED = 8


def tokens_so_far(instance: InstanceView, age_s: float) -> float:
    """Estimate `t_in + t_out` of what an instance generates; `age_s` is how old its report is."""
    running_s = instance.running_s + age_s * instance.active
    return instance.prompt_tokens + (running_s / instance.token_s if instance.token_s > 0 else 0.0)


def resume_s(instance: InstanceView, age_s: float) -> float:
    """Estimate how long another engine would take to come to where this one is, with all its requests."""
    return instance.resume_s_per_token * tokens_so_far(instance, age_s) + instance.resume_s * instance.active


def load_elsewhere_s(
    view: ClusterView, estimator: Estimator, instance: InstanceView, node: NodeView, question: PlaceModel
) -> float | None:
    """Estimate the soonest start of an instance's model on another node that has room; None where there is none."""
    moved = PlaceModel(
        request_id=question.request_id,
        model=instance.model,
        fingerprint=instance.fingerprint,
        size_bytes=instance.size_bytes,
        host_bytes=instance.host_bytes,
        timeout_s=question.timeout_s,
        slots=instance.slots,
    )
    offers = soonest(view, estimator, moved, 2)
    elsewhere = [one.estimate_s for one in offers if one.node != node.report.node and one.action is Action.START]
    return elsewhere[0] if elsewhere else None


def migrate(
    view: ClusterView, estimator: Estimator, question: PlaceModel, node: NodeView, now_s: float
) -> Offer | None:
    """Give the offer of a node from which the cheapest choice of running inferences moves away first."""
    age_s = view.age_s(node.report.node, now_s)
    movable = []
    for instance in node.busy[:MAX_MOVED]:
        load_s = load_elsewhere_s(view, estimator, instance, node, question)
        if load_s is not None:
            movable.append(Occupant(instance, Cost(load_s + resume_s(instance, age_s), 1)))
    return _made_room(estimator, question, node, movable, Action.MIGRATE, "migrate", age_s)


def preempt(
    view: ClusterView, estimator: Estimator, question: PlaceModel, node: NodeView, now_s: float
) -> Offer | None:
    """Give the offer of a node on which less urgent inferences are ended: what they have computed is lost."""
    age_s = view.age_s(node.report.node, now_s)
    less_urgent = [one for one in node.busy if one.priority > question.priority]
    ending = [Occupant(one, Cost(resume_s(one, age_s), 1)) for one in less_urgent]
    return _made_room(estimator, question, node, ending, Action.PREEMPT, "preempt", age_s)


def _made_room(
    estimator: Estimator, question: PlaceModel, node: NodeView, busy: list[Occupant], action: Action, name: str,
    age_s: float,
) -> Offer | None:  # fmt: skip
    idle = [Occupant(one, Cost(0.0, 1)) for one in node.idle]
    missing, awaited = node.missing(question), node.leaving_room
    chosen = cheapest_to_leave([*idle, *busy], missing.slots - awaited.slots, missing.host_bytes - awaited.host_bytes)
    if chosen is None:
        return None
    moved = [occupant for occupant in chosen if occupant.instance.active]
    way = way_up(node, question)
    terms = [
        Term(
            name=name,
            seconds=sum(occupant.cost.seconds for occupant in moved),
            inputs={
                "instances": len(moved),
                "tokens": round(sum(tokens_so_far(occupant.instance, age_s) for occupant in moved)),
            },
        )
    ]
    if len(moved) < len(chosen) or awaited.slots:
        terms.append(leave_term(estimator, node.report.node))
    return Offer(
        sum(term.seconds for term in terms) + startup_s(node, estimator, question, way),
        node.report.node,
        action,
        way.tier,
        tuple(occupant.instance for occupant in chosen),
        tuple(terms),
    )


def victims(node: NodeView, question: PlaceModel) -> tuple[InstanceView, ...]:
    """Choose the idle instances that leave for a model: as few and as long idle as can be."""
    assert first_action(node, question) is Action.EVICT
    missing, awaited = node.missing(question), node.leaving_room
    # Those that have been idle the longest are the least loss.
    idle = [Occupant(one, Cost(0.0, 1 + rank)) for rank, one in enumerate(node.idle)]
    chosen = cheapest_to_leave(idle, missing.slots - awaited.slots, missing.host_bytes - awaited.host_bytes)
    assert chosen is not None, "there is room for it where all idle instances leave"
    return tuple(occupant.instance for occupant in chosen)


def locality(view: ClusterView, estimator: Estimator, question: PlaceModel) -> NodeView | None:
    """Find the node where the model would start soonest if it had room; None where no node holds the checkpoint."""
    holding = [view.nodes[name] for name in view.holders(question.fingerprint)]
    fitting = [
        node
        for node in holding
        if not node.report.cordoned
        and question.slots <= node.report.slots
        and question.host_bytes <= node.unpinned_bytes(question.fingerprint)
    ]
    return min(
        fitting,
        key=lambda node: (startup_s(node, estimator, question, way_up(node, question)), node.report.node),
        default=None,
    )
