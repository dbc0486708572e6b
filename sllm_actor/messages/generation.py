"""One generation: gateway to Router to InferenceWorker to engine, and its tokens on the way back."""

from __future__ import annotations

from sllm_actor.domain import FinishReason, ModelName, RequestId, Sampling, Span
from sllm_actor.messages.declare import message


@message("generation.ask")
class Generate:
    """Ask for tokens after `prompt` (token ids, little-endian uint32).

    A stream of `Tokens`, ended by one `Finished`. Fails with the typed error of whatever went wrong.
    `spans` is what the caller measured before it asked, for the request's timeline.
    """

    request_id: RequestId
    model: ModelName
    prompt: bytes
    sampling: Sampling
    arrived_s: float = 0.0
    spans: tuple[Span, ...] = ()


@message("generation.tokens")
class Tokens:
    """Newly generated tokens; `index` is the position of the first of them in the answer."""

    request_id: RequestId
    index: int
    token_ids: tuple[int, ...]


@message("generation.finished")
class Finished:
    """The last item of a stream; `reason` says why the generation ended."""

    request_id: RequestId
    reason: FinishReason
    prompt_tokens: int
    generated_tokens: int


@message("generation.timeline")
class GetTimeline:
    """Answered by the request's `Timeline`, or fails with `RequestNotFound`."""

    request_id: RequestId


@message("generation.list")
class ListRequests:
    """Answered by a tuple of the `Timeline` of every running and remembered request, newest first."""


@message("generation.locate")
class LocateRequest:
    """Answered by `RequestLocation`, or fails with `RequestNotFound`."""

    request_id: RequestId


@message("generation.location")
class RequestLocation:
    """Where a running request generates."""

    request_id: RequestId
    node: str
    instance_id: str
