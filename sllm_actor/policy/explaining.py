"""Tell why a node was chosen: what each could have done, part by part, and what would have changed it. Pure."""

from __future__ import annotations

from sllm_actor.messages.explanation import Candidate, Explanation, Flip, Term
from sllm_actor.messages.placement import PlaceModel
from sllm_actor.policy.cluster_view import ClusterView
from sllm_actor.policy.estimator import SSD
from sllm_actor.policy.offers import INF, Action, Move, Offer, leave_term, start_terms, way_up
from sllm_actor.policy.policies import SHOWN, Choice, Situation
from sllm_actor.units import format_bytes, format_seconds


def explain(situation: Situation, policy: str, choice: Choice, given_up: tuple[str, ...] = ()) -> Explanation:
    """Describe a choice; `given_up` are instances that have left for it already."""
    shown = [_candidate(situation, offer) for offer in choice.ranked[: SHOWN + 1]]
    question, taken = situation.question, choice.taken
    chosen = shown[choice.ranked.index(taken)] if taken is not None else None
    rest = [one for one in shown if one is not chosen and one.possible]
    runner_up = rest[0] if rest and chosen is not None else None
    return Explanation(
        request_id=question.request_id,
        model=question.model,
        policy=policy,
        reason=reason(situation, taken) + _passed_over(shown, chosen) if taken is not None else choice.why,
        candidates=tuple(shown),
        more=len(situation.view.nodes) - len({one.node for one in shown}),
        chosen=chosen,
        runner_up=runner_up,
        flip=_flip(chosen, runner_up, choice.by_estimate) if chosen is not None and runner_up is not None else None,
        given_up=given_up,
        waited_s=situation.waited_s,
        outcome="granted",
        predicted_s=taken.estimate_s if taken is not None else 0.0,
    )


def _candidate(situation: Situation, offer: Offer) -> Candidate:
    node = situation.view.nodes[offer.node]
    first = offer.first
    if offer.action in (Action.EVICT, Action.AWAIT):
        first = (leave_term(situation.estimator, offer.node),)
    return Candidate(
        node=offer.node,
        action=offer.action,
        tier=offer.tier,
        estimate_s=offer.estimate_s,
        terms=(*first, *start_terms(node, situation.estimator, situation.question)),
        leaving=tuple(instance.instance_id for instance in offer.leaving),
        possible=offer.action in situation.able,
    )


def reason(situation: Situation, taken: Offer) -> str:
    """Say in one sentence why the node is soonest, or whatever else its policy wants."""
    node, question = situation.view.nodes[taken.node], situation.question
    way = way_up(node, question)
    if taken.action is Action.MIGRATE:
        return f"{taken.node} has it soonest, once {', '.join(map(_going, taken.moves))}{_idle(taken)}"
    if taken.action is Action.PREEMPT:
        ended = ", ".join(one.instance_id for one in taken.leaving if one.active)
        return f"{taken.node} has it soonest, and ends less urgent answers, to be resumed: {ended}{_idle(taken)}"
    if taken.action is not Action.START:
        names = ", ".join(instance.model for instance in taken.leaving)
        return f"{taken.node} gives up what has been idle the longest: {names}"
    if not way.size_bytes:
        return f"{taken.node} holds it in host memory"
    does = "reads" if way.tier == SSD else "fetches"
    if way.bytes_per_s <= 0:
        return f"{taken.node} {does} {format_bytes(way.size_bytes)} at an unknown bandwidth"
    return (
        f"{taken.node} {does} {format_bytes(way.size_bytes)} at {way.bytes_per_s / 1e9:.2f} GB/s"
        f" after a queue of {format_seconds(way.queue_s)}: {format_seconds(taken.estimate_s)}"
    )


def _going(move: Move) -> str:
    answers = "1 answer" if move.instance.active == 1 else f"{move.instance.active} answers"
    return f"{move.instance.instance_id} with {answers} has moved to {move.to}"


def _idle(taken: Offer) -> str:
    idle = [one.instance_id for one in taken.leaving if not one.active]
    return f"; idle ones leave: {', '.join(idle)}" if idle else ""


def _passed_over(shown: list[Candidate], chosen: Candidate | None) -> str:
    """Name what would have come before, had it not failed already, or were it not for others to be left alone."""
    before = shown[: shown.index(chosen)] if chosen is not None else []
    able = [one for one in before if not one.possible]
    if not able:
        return ""
    one = able[0]
    names = ", ".join(one.leaving)
    estimate = format_seconds(one.estimate_s)
    return f"; to {one.action} {names} on {one.node} would have taken {estimate}, which is not tried (again)"


def _flip(chosen: Candidate, runner_up: Candidate, by_estimate: bool) -> Flip:
    """Find the change of one term, the smallest in relation to it, with which the runner-up would have been chosen."""
    if not by_estimate:
        text = f"with no room on {chosen.node}, {runner_up.node} would have been chosen"
        return Flip(node=chosen.node, term="room", from_s=0.0, to_s=0.0, text=text)
    if runner_up.estimate_s == chosen.estimate_s:
        text = f"{chosen.node} and {runner_up.node} are equal, and their names decide: any change would"
        return Flip(node=runner_up.node, term="queue", from_s=0.0, to_s=0.0, text=text)
    gap_s = runner_up.estimate_s - chosen.estimate_s
    if gap_s == INF:
        text = f"{runner_up.node} might have been chosen had its bandwidth been known"
        return Flip(node=runner_up.node, term="bytes", from_s=INF, to_s=0.0, text=text)
    longer = [(chosen.node, term, term.seconds + gap_s) for term in chosen.terms]
    shorter = [(runner_up.node, term, term.seconds - gap_s) for term in runner_up.terms if term.seconds >= gap_s]
    node, term, to_s = min([*longer, *shorter], key=lambda change: (_relative(change[1], gap_s), change[1].name))
    more = "more" if to_s > term.seconds else "less"
    text = (
        f"{runner_up.node} would have been chosen had {_name(term)} on {node} taken {more} than {format_seconds(to_s)},"
        f" not {format_seconds(term.seconds)}{_as_bandwidth(term, to_s, more)}"
    )
    return Flip(node=node, term=term.name, from_s=term.seconds, to_s=to_s, text=text)


def _relative(term: Term, gap_s: float) -> float:
    return gap_s / abs(term.seconds) if term.seconds else INF


def _name(term: Term) -> str:
    return {"queue": "the queue", "bytes": "the bytes", "engine": "the engine"}.get(term.name, f"the {term.name}")


def _as_bandwidth(term: Term, to_s: float, more: str) -> str:
    if term.name != "bytes" or not term.inputs.get("size_bytes") or to_s <= 0:
        return ""
    bytes_per_s = term.inputs["size_bytes"] / to_s
    return f" (a bandwidth {'below' if more == 'more' else 'above'} {bytes_per_s / 1e9:.2f} GB/s)"


def refused(question: PlaceModel, policy: str, why: str, waited_s: float) -> Explanation:
    """Describe a question for which no place was found in time."""
    return Explanation(
        request_id=question.request_id, model=question.model, policy=policy, reason=why, candidates=(), more=0,
        chosen=None, runner_up=None, flip=None, waited_s=waited_s, outcome="waited in vain",
    )  # fmt: skip


def why_in_vain(question: PlaceModel, view: ClusterView) -> str:
    """Say why no node that could start the model had a place for it in time."""
    if question.holders_only and not view.holders(question.fingerprint):
        return "no node that could be asked has its folder"
    if not any(node.report.slots for node in view.nodes.values()):
        return "no node with the role worker is there"
    return "all of them are busy"
