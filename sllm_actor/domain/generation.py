"""What a client asks of one generation, and how it can end."""

from __future__ import annotations

import enum

import msgspec


class FinishReason(enum.StrEnum):
    """Why a generation ended by itself; errors and cancels are not finishes."""

    STOP = "stop"
    LENGTH = "length"


class Resume(enum.StrEnum):
    """How an engine takes up an answer that another one began.

    FAST computes prompt and tokens together, EXACT replays the tokens one by one, in the shapes in which they were
    computed first.
    """

    FAST = "fast"
    EXACT = "exact"


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are drawn.

    `temperature` 0 means greedy. The random number for a position depends on `seed`, `choice` and that position
    alone, so no sampler state exists that a migration would have to move. The defaults change nothing: `top_k` 0 keeps
    all tokens, `min_p` is a share of the likeliest token's probability, penalties are those of OpenAI (presence,
    frequency: what was generated) and of transformers (repetition: the prompt, too), `logit_bias` is added to the
    logits of tokens, no end is drawn before `min_tokens`, `stop_token_ids` end an answer like the model's own ends,
    which `ignore_eos` ignores. `top_logprobs` None asks for no log-probabilities, k for those of the drawn token and
    of the k likeliest; with `prompt_logprobs` the prompt's tokens have them, too, and `max_tokens` may be 0.
    """

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    choice: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int | None = None
    prompt_logprobs: bool = False


class TokenLogprobs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Logarithms of probabilities before temperature, penalties and bias: the drawn token's, the likeliest's."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class EngineLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much an engine takes on; `prefill_chunk_tokens` of prompts are computed between two tokens of an answer."""

    slots: int
    kv_cache_bytes: int
    prefill_chunk_tokens: int
