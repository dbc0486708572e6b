"""From a checked request to what is asked of the Router: one wish for each choice of each prompt."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence

import msgspec

from sllm_actor.domain import Model, RequestId, Sampling
from sllm_actor.errors import InvalidRequest
from sllm_actor.frontend.answer import Wish, max_tokens
from sllm_actor.frontend.schema import ChatRequest, CompletionRequest


def sampling_of(model: Model, prompt_tokens: int, body: ChatRequest | CompletionRequest) -> Sampling:
    """Say how the first choice's tokens are drawn; where the request is silent, the model's own defaults hold.

    Raises:
        InvalidRequest: the prompt is too long, or a field does not fit the model; `param` names it.
    """
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    check_vocabulary("logit_bias", bias, model)
    check_vocabulary("stop_token_ids", body.stop_token_ids or (), model)
    limit = _limit(model, prompt_tokens, body)
    if body.min_tokens > limit:
        raise InvalidRequest(
            f"min_tokens: {body.min_tokens} is more than the {limit} that the answer may have", param="min_tokens"
        )
    return Sampling(
        max_tokens=limit,
        temperature=_or(body.temperature, model.default_temperature),
        top_p=_or(body.top_p, model.default_top_p),
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        top_k=model.default_top_k if body.top_k is None else max(body.top_k, 0),
        min_p=_or(body.min_p, model.default_min_p),
        repetition_penalty=_or(body.repetition_penalty, model.default_repetition_penalty),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=tuple(bias.items()),
        min_tokens=body.min_tokens,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos,
        top_logprobs=body.wanted_logprobs(),
        prompt_logprobs=body.wants_prompt_logprobs(),
    )


def _limit(model: Model, prompt_tokens: int, body: ChatRequest | CompletionRequest) -> int:
    asked = body.limit()
    limit = max_tokens(model, prompt_tokens, asked)
    if asked is None and model.default_max_tokens is not None:
        return min(limit, model.default_max_tokens)
    return limit


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def check_vocabulary(field: str, token_ids: Iterable[int], model: Model) -> None:
    """Compare token ids with the model's vocabulary.

    Raises:
        InvalidRequest: one is outside of it.
    """
    largest = max(token_ids, default=0)
    if largest >= model.vocabulary_tokens:
        raise InvalidRequest(
            f"{field}: token {largest} is outside the vocabulary of {model.vocabulary_tokens}", param=field
        )


def of_choices(wishes: Sequence[Wish], n: int) -> list[Wish]:
    """Multiply each prompt's wish by its choices, prompt after prompt.

    The first has the request's own id, the k-th after it the id `ID-k`.
    """
    choices: list[Wish] = []
    for wish in wishes:
        for choice in range(n):
            number = len(choices)
            request_id = RequestId(f"{wish.request_id}-{number}") if number else wish.request_id
            sampling = msgspec.structs.replace(wish.sampling, choice=choice)
            choices.append(wish._replace(request_id=request_id, sampling=sampling))
    return choices
