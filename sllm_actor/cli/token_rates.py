"""Tokens a second between two looks at a node: in all, by instance, by request. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sllm_actor.cli.seen import SeenRequest


class TokenRates(NamedTuple):
    """Tokens a second since the look before, `over_s` seconds ago; 0.0 where there was none: since first tokens."""

    over_s: float
    in_all: float
    instances: dict[str, float]
    requests: dict[str, float]


def rates_between(before: Mapping[str, int], requests: Iterable[SeenRequest], over_s: float) -> TokenRates:
    """Give the rates of requests that had so many tokens `before`, by their ids; one that is new had none."""
    came = {one.request_id: one.generated_tokens - before.get(one.request_id, 0) for one in requests}
    return _summed(requests, {name: max(0, tokens) / over_s for name, tokens in came.items()}, over_s)


def rates_so_far(requests: Iterable[SeenRequest], now_s: float) -> TokenRates:
    """Give the rates of what runs since the first token of each, for who has looked once only."""
    each = {
        one.request_id: one.generated_tokens / max(now_s - one.first_token_s, 1e-3)
        for one in requests
        if is_streaming(one)
    }
    return _summed(requests, each, 0.0)


def is_streaming(request: SeenRequest) -> bool:
    """Tell whether tokens of it come."""
    return bool(request.first_token_s and not request.end_s)


def is_waiting(request: SeenRequest) -> bool:
    """Tell whether it waits for its first token."""
    return not request.first_token_s and not request.end_s


def _summed(requests: Iterable[SeenRequest], each: Mapping[str, float], over_s: float) -> TokenRates:
    running = {one.request_id for one in requests if not one.end_s}
    instances: Counter[str] = Counter()
    for one in requests:
        if one.instance_id:
            instances[one.instance_id] += each.get(one.request_id, 0.0)  # type: ignore[assignment]
    shown = {name: rate for name, rate in each.items() if name in running}
    return TokenRates(over_s, sum(each.values()), dict(instances), shown)
