"""Tell in words how a request came to its instance. Pure."""

from __future__ import annotations

from sllm_actor.domain import Timeline
from sllm_actor.messages.explanation import Explained, Explanation


def explained_warm(timeline: Timeline) -> Explained:
    """Explain a request that found its model running, or has found nothing yet."""
    if not timeline.instance_id:
        text = f"it has not come to an instance: {timeline.outcome}"
    else:
        others = "no other request" if not timeline.beside else f"{timeline.beside} other request(s)"
        text = f"was routed to running instance {timeline.instance_id} on {timeline.node}, which had {others}"
    return _of(timeline, text, None)


def explained_undecided(timeline: Timeline) -> Explained:
    """Explain a request that waits for a decision still, or whose decision is forgotten."""
    waiting = timeline.outcome == "running" and not timeline.instance_id
    text = "it waits for a place: nothing is decided yet" if waiting else "no decision about its start is remembered"
    return _of(timeline, text, None)


def explained(decision: Explanation, timeline: Timeline | None = None) -> Explained:
    """Explain a request that had to wait for a start."""
    text = decision.reason
    if timeline is None:
        return Explained(
            request_id=decision.request_id, model=decision.model, text=text, start_of=decision.request_id,
            decision=decision,
        )  # fmt: skip
    if timeline.start_of != timeline.request_id:
        text = f"waited for the start that request {timeline.start_of} had begun: {text}"
    return _of(timeline, text, decision)


def _of(timeline: Timeline, text: str, decision: Explanation | None) -> Explained:
    return Explained(
        request_id=timeline.request_id,
        model=timeline.model,
        text=text,
        instance_id=timeline.instance_id,
        node=timeline.node,
        beside=timeline.beside,
        start_of=timeline.start_of,
        decision=decision,
    )
