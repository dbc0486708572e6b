"""What happened to a request between its arrival and its first token, span by span."""

from __future__ import annotations

import msgspec

from sllm_actor.domain.names import ModelName, RequestId


class Span(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One part of a start, on the machine's monotonic clock. Spans overlap where work does.

    `size_bytes` is what the span moved, 0 where it moved nothing; `tier` names the tier it came from.
    """

    name: str
    begin_s: float
    end_s: float
    size_bytes: int = 0
    tier: str = ""


class Timeline(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The record of one request. `cold`: it had to wait for an instance to be started.

    `first_token_s` and `end_s` are moments of the monotonic clock, like the spans' borders, and 0.0
    until they have come. `instance_id` is the instance on `node` that answers, which had `beside` other requests when
    this one came to it; `start_of` is the request whose start this one waited for, often itself.
    """

    request_id: RequestId
    model: ModelName
    cold: bool
    arrived_s: float
    spans: tuple[Span, ...]
    first_token_s: float
    end_s: float
    prompt_tokens: int
    generated_tokens: int
    outcome: str
    instance_id: str = ""
    node: str = ""
    beside: int = 0
    start_of: str = ""
