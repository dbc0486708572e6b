"""Four ways to choose among what nodes offer, with one interface. Pure.

`startup_time` is ServerlessLLM's (OSDI '24, section 6); the others are the baselines that the paper compares with:
`availability` takes what is free, `locality_wait` waits for the node that holds the checkpoint, `preempt` ends less
urgent answers there (after Shepherd, NSDI '23).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from sllm_actor.domain import NodeId
from sllm_actor.messages.placement import InstanceView, PlaceModel
from sllm_actor.policy import moving
from sllm_actor.policy.cluster_view import ClusterView
from sllm_actor.policy.estimator import SSD, Estimator
from sllm_actor.policy.moving import Nearest
from sllm_actor.policy.node_view import NodeView
from sllm_actor.policy.offers import INF, Action, Offer, is_guess, is_restricted, offer_of, way_up
from sllm_actor.policy.soonest import soonest

# Candidates that an explanation shows.
SHOWN = 6
# Of the nodes that hold a checkpoint, so many are asked what would have to move.
HOLDERS_LOOKED_AT = 3
# Nobody waits for a better place to save less.
LEAST_SAVED_S = 0.05
NO_ROOM = "no node would have room, whichever idle instances were given up"


class Situation(NamedTuple):
    """All that a policy may look at. `able` are the actions that can be carried out.

    Who asks has let places go for a better one for `stood_back_s` so far, and so many `ahead` of it do.
    """

    view: ClusterView
    estimator: Estimator
    question: PlaceModel
    now_s: float
    waited_s: float = 0.0
    stood_back_s: float = 0.0
    ahead: int = 0
    locality_wait_s: float = 0.0
    able: Collection[Action] = frozenset(Action)

    def locality(self) -> NodeView | None:
        """Find the node that holds the checkpoint nearest to where it is computed."""
        found = moving.nearest(self.view, self.estimator, self.question)
        return found[0][1] if found else None


class Choice(NamedTuple):
    """Offers as the policy ranks them, and the one that it takes; None is to wait, and `why` says for what.

    `by_estimate` tells whether it took the soonest of those that can be carried out. Where a
    better place is waited for, it is to choose anew `again_s` later.
    """

    ranked: list[Offer]
    taken: Offer | None
    why: str = ""
    by_estimate: bool = True
    again_s: float = 0.0


Policy = Callable[[Situation], Choice]


def startup_time(situation: Situation) -> Choice:
    """Take what is soonest: a free place, one whose idle instances leave, or one that running inferences move from.

    Where an SSD would have to be read, a place on a busy node that has the bytes in host memory may be sooner still.
    """
    view, estimator, question = situation.view, situation.estimator, situation.question
    offers = soonest(view, estimator, question, SHOWN)
    holders = moving.nearest(view, estimator, question)
    moved = _soonest_by_moving(situation, holders, offers[0].estimate_s if offers else INF)
    choice = _first_possible(situation, [moved, *offers] if moved is not None else offers)
    better = _sooner_in_a_while(situation, holders, choice.taken) if choice.taken is not None else None
    if better is None:
        return choice
    why = f"{better.node} holds it in host memory, and is expected to have a place soon"
    return Choice(choice.ranked, None, why, again_s=better.within_s)


class _Awaited(NamedTuple):
    """A node whose place is waited for, and for how long at most."""

    node: NodeId
    within_s: float


def _sooner_in_a_while(situation: Situation, holders: Sequence[Nearest], taken: Offer) -> _Awaited | None:
    """Find a node that has the bytes in host memory and, with a place that it is expected to have, beats an offer.

    How long answers will run on is not known. Those that run have run as long on average (age and residual life of a
    stationary renewal process have one distribution), and of several that run alone on their instances the first ends
    the sooner, the more they are. They grow older while they are waited for: what would save a time is given up after
    a part of it. Bytes from a source come before a device, and meanwhile a place is taken wherever one is better.
    """
    view, question, reads = situation.view, situation.question, situation.view.nodes[taken.node]
    limit_s = question.timeout_s / 2 - situation.waited_s if question.timeout_s else INF
    # Nobody waits long for what a guess says, nor one that moves for what it leaves.
    if taken.tier != SSD or is_guess(reads.report, SSD) or is_restricted(question) or limit_s <= 0:
        return None
    way, first, saves_s, ages_s = way_up(reads, question), NodeId(""), 0.0, list[float]()
    for start_s, node in holders:
        if question.fingerprint not in node.on_host or start_s >= taken.estimate_s:
            break
        name = node.report.node
        ending = [one.running_s + view.age_s(name, situation.now_s) for one in _making_room(node, question)]
        if ending and not first:
            sooner_s = taken.estimate_s - start_s - situation.estimator.leave_s(name)
            first, saves_s = name, min(way.queue_s + way.move_s, sooner_s)
        ages_s += ending
    if len(ages_s) <= situation.ahead:
        return None
    # Of those that end, others have the first.
    ends = len(ages_s) / (situation.ahead + 1)
    spare_s = saves_s - situation.stood_back_s - statistics.fmean(ages_s) / ends
    return _Awaited(first, min(spare_s / (1 + 1 / ends), limit_s)) if spare_s > LEAST_SAVED_S else None


def _making_room(node: NodeView, question: PlaceModel) -> list[InstanceView]:
    """List the instances with one answer behind whose end there would be room, idle ones leaving, too."""
    missing, counted = node.missing(question), node.counted
    slots = missing.slots - counted.leaving_room.slots - counted.idle_room.slots
    host_bytes = missing.host_bytes - counted.leaving_room.host_bytes - counted.idle_room.host_bytes
    return [
        one
        for one in counted.busy
        if one.active == 1 and not one.kept and one.model != question.model
        if one.slots >= slots and one.host_bytes >= host_bytes
    ]


def _soonest_by_moving(situation: Situation, holders: Sequence[Nearest], best_s: float) -> Offer | None:
    """Give the soonest offer of the nodes that hold the checkpoint, where moving inferences away beats `best_s`."""
    view, estimator, question = situation.view, situation.estimator, situation.question
    best: Offer | None = None
    for start_s, node in holders[:HOLDERS_LOOKED_AT]:
        if start_s >= best_s:
            break
        offer = moving.migrate(view, estimator, question, node, situation.now_s) if node.counted.busy else None
        if offer is not None and offer.estimate_s < best_s:
            best, best_s = offer, offer.estimate_s
    return best


def availability(situation: Situation) -> Choice:
    """Take the first node by name that has a place free; where none has, the first whose idle instances can leave."""
    free: list[Offer] = []
    other: list[Offer] = []
    for name in situation.view.names:
        offer = offer_of(situation.view.nodes[name], situation.estimator, situation.question)
        if offer is not None:
            (free if offer.action is Action.START else other).append(offer)
            if len(free) == SHOWN:
                break
    return _first_possible(situation, [*free, *other][:SHOWN], by_estimate=False)


def locality_wait(situation: Situation) -> Choice:
    """Wait for a place on the node that holds the checkpoint, for at most `locality_wait_s`; then as `startup_time`."""
    node = situation.locality()
    offers = soonest(situation.view, situation.estimator, situation.question, SHOWN)
    if node is None:
        return _first_possible(situation, offers)
    here = offer_of(node, situation.estimator, situation.question)
    if here is not None:
        others = [offer for offer in offers if offer.node != here.node]
        return _first_possible(situation, [here, *others][:SHOWN], by_estimate=False)
    if situation.waited_s < situation.locality_wait_s:
        why = f"{node.report.node} holds it, and has no place yet"
        return Choice(offers, None, why, by_estimate=False, again_s=situation.locality_wait_s - situation.waited_s)
    return _first_possible(situation, offers)


def preempt(situation: Situation) -> Choice:
    """Start on the node that holds the checkpoint, ending less urgent inferences there; else as `startup_time`."""
    node = situation.locality()
    offers = soonest(situation.view, situation.estimator, situation.question, SHOWN)
    if node is None:
        return _first_possible(situation, offers)
    here = offer_of(node, situation.estimator, situation.question) or moving.preempt(
        situation.view, situation.estimator, situation.question, node, situation.now_s
    )
    if here is None:
        return _first_possible(situation, offers)
    others = [offer for offer in offers if offer.node != here.node]
    return _first_possible(situation, [here, *others][:SHOWN], by_estimate=False)


def _first_possible(situation: Situation, ranked: list[Offer], *, by_estimate: bool = True) -> Choice:
    """Take the first that can be carried out, with the instances that have to leave for it."""
    for index, offer in enumerate(ranked):
        if offer.action not in situation.able:
            continue
        if offer.action is Action.AWAIT:
            return Choice(ranked, None, f"an instance is leaving {offer.node}", by_estimate)
        if offer.action is Action.EVICT:
            leaving = moving.victims(situation.view.nodes[offer.node], situation.question)
            offer = ranked[index] = offer._replace(leaving=leaving)
        return Choice(ranked, offer, by_estimate=by_estimate)
    return Choice(ranked, None, NO_ROOM, by_estimate)


POLICIES: Mapping[str, Policy] = {
    policy.__name__: policy for policy in (startup_time, availability, locality_wait, preempt)
}
