"""What a request's wait for its first token was made of, from the record that its router keeps. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sllm_actor.domain import Span, Timeline


class Parts(NamedTuple):
    """Seconds of one wait, which they sum up to.

    `place`: no device for its model's start; `load`: its bytes and its engine; `slot`: its instances computed for
    others, and the end of a start behind its bytes; `prompt`: its own prompt.
    """

    place_s: float = 0.0
    load_s: float = 0.0
    slot_s: float = 0.0
    prompt_s: float = 0.0


def parts_of(timeline: Timeline, begin_s: float, first_token_s: float) -> Parts:
    """Split the wait of a request between two moments; who joined another's start has the rest of that in its wait."""
    until_s, place, load = first_token_s, list[Span](), list[Span]()
    for span in timeline.spans:
        if span.name == "prefill":
            until_s = min(until_s, span.begin_s)
        elif span.name == "placement":
            place.append(span)
        elif span.name in ("load", "engine"):
            load.append(span)
    place_s = _within(place, begin_s, until_s) if place else 0.0
    load_s = _within(load, begin_s, until_s) if load else 0.0
    return Parts(place_s, load_s, until_s - begin_s - place_s - load_s, first_token_s - until_s)


def _within(spans: Sequence[Span], begin_s: float, end_s: float) -> float:
    """Sum up what of them lies between two moments; where some lie over each other, once."""
    whole_s, covered_s = 0.0, begin_s
    for span in sorted(spans, key=lambda one: one.begin_s):
        from_s, to_s = max(span.begin_s, covered_s), min(span.end_s, end_s)
        if to_s > from_s:
            whole_s, covered_s = whole_s + to_s - from_s, to_s
    return whole_s
