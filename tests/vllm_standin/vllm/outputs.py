"""What a request brings."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.logprobs import Logprob


@dataclass
class CompletionOutput:
    """One of a request's answers; its tokens are those since the last output, where deltas are asked for."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    """All answers of a request, as far as they are."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int | None = None
