"""One generation: gateway to Router to InferenceWorker to engine, and its tokens on the way back."""

from __future__ import annotations

from sllm_actor.domain import FinishReason, ModelName, NodeId, RequestId, Resume, Sampling, Span, TokenLogprobs
from sllm_actor.messages.declare import message


@message("generation.ask")
class Generate:
    """Ask for tokens after `prompt` (token ids, little-endian uint32).

    A stream of `Tokens`, ended by one `Finished`, and begun by `PromptLogprobs` where they are asked for. Fails with
    the typed error of whatever went wrong.
    `spans` is what the caller measured before it asked, for the request's timeline. One that goes on with an answer
    has its tokens so far in `generated`, packed like the prompt; what is new comes behind them. `grammar` is a compiled
    grammar as xgrammar writes it; of a LoRA adapter, `model` is the adapter's name and `base` that of the model that it
    runs on, whose engine knows it as `adapter`; all three may be empty. Of those who wait, the one of the lowest
    `priority` is first. From its end on the instance stays for `keep_alive_s` while it is idle, unless that is None,
    until another request says otherwise. `epoch` counts the instances that have had the request, and is on each of its
    tokens; where a migration has brought it, `migration_id` names what is prepared for it, to its engine `parked`.
    """

    request_id: RequestId
    model: ModelName
    prompt: bytes
    sampling: Sampling
    arrived_s: float = 0.0
    spans: tuple[Span, ...] = ()
    generated: bytes = b""
    resume: Resume = Resume.FAST
    grammar: str = ""
    adapter: str = ""
    base: str = ""
    priority: int = 0
    keep_alive_s: float | None = None
    epoch: int = 0
    migration_id: str = ""
    parked: str = ""


@message("generation.tokens")
class Tokens:
    """Newly generated tokens; `index` is the position of the first of them in the answer.

    `logprobs` has one entry for each where the request asked for them, else none. `epoch` is the request's.
    """

    request_id: RequestId
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    epoch: int = 0


@message("generation.prompt_logprobs")
class PromptLogprobs:
    """Those of the prompt's tokens, in order; `index` is the position of the first of them.

    The prompt's first token has none, so the first of these begins at 1; it may be empty.
    """

    request_id: RequestId
    index: int
    logprobs: tuple[TokenLogprobs, ...]


@message("generation.finished")
class Finished:
    """The last item of a stream; `reason` says why the generation ended.

    `cached_tokens` of the prompt had been computed already, for another request.
    """

    request_id: RequestId
    reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int = 0


@message("generation.migrated")
class Migrated:
    """The last item of a stream whose request goes on elsewhere: at the instance that has `migration_id` prepared.

    The stream has given all tokens that are known there. The Router asks for the rest in the next `epoch`.
    """

    request_id: RequestId
    migration_id: str
    instance_id: str
    model: ModelName
    node: NodeId
    worker: str
    address: str


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
    """Where a running request generates; `served` is the model whose instances answer it."""

    request_id: RequestId
    node: NodeId
    instance_id: str
    worker: str
    model: ModelName
    served: ModelName
    priority: int
