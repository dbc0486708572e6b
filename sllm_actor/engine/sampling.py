"""Draw the next token of each generation from a batch's logits.

Counter-based: the random number depends on the seed, the choice and the position alone, so a sampler's state is the
answer's tokens, and no other row changes a draw. Whatever is rounded is computed row by row, so that the same logits
give the same token alone, in any batch and at any row.

The transforms and their order are vLLM's (v1/sample/sampler.py): constraint, least length, bias, repetition, frequency
and presence, temperature, min-p, top-k, top-p. Each alone is the same in transformers, which has min-p behind top-p:
there the nucleus counts the mass that min-p takes away.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import torch

from sllm_actor.domain import Sampling, TokenLogprobs
from sllm_actor.errors import GenerationFailed

_MASK = (1 << 64) - 1
# The choice is kept clear of the positions, which are less than 2**32.
_CHOICE_SHIFT = 32
# Tokens are sorted no further down than the draw goes: first those of these probabilities, in the end all.
_RUNGS = (1e-3, 1e-5, 0.0)
_FEW_TOKENS = 1024
# What a row can raise, and fails of: a number that its type does not hold, a grammar's library.
ROW_FAULTS = (RuntimeError, LookupError, ArithmeticError, ValueError, TypeError)


def _mix(value: int) -> int:
    """SplitMix64's finalizer (Steele, Lea, Flood: Fast splittable pseudorandom number generators)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, position: int, choice: int = 0) -> float:
    """Give the random number in [0, 1) for a position of a choice."""
    key = _mix(seed & _MASK)
    if choice:
        key = _mix(key ^ (choice << _CHOICE_SHIFT))
    return (_mix(key ^ position) >> 11) / (1 << 53)


class Constraint(Protocol):
    """What an answer must keep to, a grammar for example. It is as far as the answer's tokens are."""

    def mask(self, logits: torch.Tensor) -> None:
        """Set the logits of the tokens that may not come next to -inf, in place.

        logits: `[vocabulary]`, contiguous, float32 (float64 where the model's are), on the model's device.

        Raises:
            GenerationFailed: nothing can be said; this generation fails alone.
        """

    def accept(self, token_id: int) -> None:
        """Go on behind a token that has been drawn.

        Raises:
            GenerationFailed: the token breaks the constraint; this generation fails alone.
        """


class Drawn(NamedTuple):
    """A drawn token, and its log-probabilities where they were asked for."""

    token_id: int
    logprobs: TokenLogprobs | None


def _penalizes(sampling: Sampling) -> bool:
    return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0)


class _Counts:
    """How often each token was generated; those of the prompt are in it with 0. Grows by a token in constant time."""

    def __init__(self, prompt: Sequence[int], generated: Sequence[int], like: torch.Tensor) -> None:
        seen = [token for token in dict.fromkeys([*prompt, *generated]) if 0 <= token < len(like)]
        self._slots = {token: slot for slot, token in enumerate(seen)}
        self._ids = torch.tensor(seen, dtype=torch.long, device=like.device)
        self._times = torch.zeros(len(seen), dtype=like.dtype, device=like.device)
        for token in generated:
            if token in self._slots:
                self.note(token)

    def note(self, token: int) -> None:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot >= len(self._ids):
            self._ids = torch.cat([self._ids, self._ids.new_zeros(slot + 64)])
            self._times = torch.cat([self._times, self._times.new_zeros(slot + 64)])
        self._ids[slot] = token
        self._times[slot] += 1

    def penalize(self, logits: torch.Tensor, sampling: Sampling) -> None:
        ids, times = self._ids[: len(self._slots)], self._times[: len(self._slots)]
        values = logits[ids]
        if sampling.repetition_penalty != 1.0:
            repeated = sampling.repetition_penalty
            values = torch.where(values > 0, values / repeated, values * repeated)
        values -= sampling.frequency_penalty * times
        values -= sampling.presence_penalty * (times > 0).to(values.dtype)
        logits[ids] = values


class _Transforms:
    """What a sampling changes of the logits before temperature, as tensors; tokens outside the vocabulary are none."""

    def __init__(self, sampler: Sampler, prompt: Sequence[int], generated: Sequence[int], like: torch.Tensor) -> None:
        sampling = sampler.sampling
        bias = {token: value for token, value in sampling.logit_bias if 0 <= token < len(like)}
        unwanted = [token for token in sampler.unwanted if 0 <= token < len(like)]
        self._unwanted = torch.tensor(unwanted, dtype=torch.long, device=like.device)
        self._biased = torch.tensor(list(bias), dtype=torch.long, device=like.device)
        self._bias = torch.tensor(list(bias.values()), dtype=like.dtype, device=like.device)
        self.counts = _Counts(prompt, generated, like) if _penalizes(sampling) else None

    def apply(self, logits: torch.Tensor, sampling: Sampling, position: int) -> None:
        if position < sampling.min_tokens:
            logits[self._unwanted] = -math.inf
        logits[self._biased] += self._bias
        if self.counts is not None:
            self.counts.penalize(logits, sampling)


class Sampler:
    """How one generation's tokens are drawn, and those that it has so far.

    `generated` are the tokens of an answer that goes on, `position` is that of the next. `ends` are the tokens that end
    the answer. Whoever sets a `constraint` has had it accept the tokens so far.
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], eos_token_ids: Collection[int], generated: Sequence[int] = ()
    ) -> None:
        self.sampling = sampling
        self.constraint: Constraint | None = None
        self.ends = frozenset(sampling.stop_token_ids) | frozenset(() if sampling.ignore_eos else eos_token_ids)
        # Before the least length not even an end that would be ignored is drawn, as in vLLM.
        self.unwanted = self.ends | frozenset(eos_token_ids)
        self.position = len(generated)
        self._prompt = prompt
        self._generated = generated
        self._transforms: _Transforms | None = None
        self._always_changes = bool(sampling.logit_bias) or _penalizes(sampling)

    def changes_logits(self) -> bool:
        """Tell whether the next token is drawn from anything but the model's own logits."""
        return self._always_changes or self.constraint is not None or self.position < self.sampling.min_tokens

    def transform(self, logits: torch.Tensor) -> None:
        """Apply all that comes before temperature, in place. logits: `[vocabulary]`, float32 or float64.

        Raises:
            GenerationFailed: the constraint can't say what may come.
        """
        if self._transforms is None:
            self._transforms = _Transforms(self, self._prompt, self._generated, logits)
        if self.constraint is not None:
            self.constraint.mask(logits)
        self._transforms.apply(logits, self.sampling, self.position)

    def note(self, token: int) -> None:
        """Take a token as drawn.

        Raises:
            GenerationFailed: the constraint does not take it.
        """
        if self.constraint is not None:
            self.constraint.accept(token)
        self.position += 1
        if self._transforms is not None and self._transforms.counts is not None:
            self._transforms.counts.note(token)


def draw_rows(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[Drawn | GenerationFailed]:
    """Draw a token for each row and note it in the row's sampler. logits: `[rows, vocabulary]`, any float type.

    A row whose logits are not finite, or whose transforms leave no token, fails alone: its error stands in its place,
    and its sampler stays as it was.
    """
    assert logits.dim() == 2
    assert len(logits) == len(samplers)
    # The maximum of numbers with a NaN among them is NaN.
    best = logits.max(dim=-1)
    finite = torch.isfinite(best.values).tolist()
    greedy = best.indices.tolist()
    outcomes: list[Drawn | GenerationFailed] = []
    for row, sampler in enumerate(samplers):
        try:
            if not finite[row]:
                raise GenerationFailed(f"the model's logits at token {sampler.position} are not finite")
            outcomes.append(_draw_row(logits[row], sampler, greedy[row]))
        except GenerationFailed as error:
            outcomes.append(error)
        except ROW_FAULTS as error:
            outcomes.append(GenerationFailed(f"token {sampler.position} can't be drawn: {error}"))
    return outcomes


def _draw_row(logits: torch.Tensor, sampler: Sampler, likeliest: int) -> Drawn:
    sampling = sampler.sampling
    token = likeliest
    if sampler.changes_logits():
        # Whatever is written must not reach the batch's own numbers.
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        sampler.transform(wide)
        best = wide.max(dim=-1)
        token = int(best.indices)
        if not math.isfinite(best.values):
            raise GenerationFailed(f"no token is left that may come at token {sampler.position}")
    else:
        wide = logits
    if sampling.temperature > 0.0:
        token = _sample(wide, token, sampling, sampler.position)
    logprobs = None if sampling.top_logprobs is None else logprobs_of(logits, token, sampling.top_logprobs)
    sampler.note(token)
    return Drawn(token, logprobs)


def _sample(logits: torch.Tensor, likeliest: int, sampling: Sampling, position: int) -> int:
    """Draw from what temperature, min-p, top-k and top-p leave of a row."""
    # The likeliest token stands at 0, so that the smallest temperature makes no infinity of it.
    scaled = logits.double()
    scaled = (scaled - scaled[likeliest]) / sampling.temperature
    floor = min(math.log(sampling.min_p), 0.0) if sampling.min_p > 0.0 else -math.inf
    if 0 < sampling.top_k < len(scaled):
        floor = max(floor, float(torch.topk(scaled, sampling.top_k, sorted=False).values.min()))
    token_ids = None
    if floor > -math.inf:
        # Those that equal the last of the top-k are kept with it: so do vLLM and transformers.
        token_ids = (scaled >= floor).nonzero().flatten()
        scaled = scaled[token_ids]
    drawn = _nucleus(torch.softmax(scaled, dim=-1), sampling.top_p, uniform(sampling.seed, position, sampling.choice))
    return drawn if token_ids is None else int(token_ids[drawn])


def _nucleus(probabilities: torch.Tensor, top_p: float, number: float) -> int:
    """Draw from the shortest run of likeliest tokens whose mass reaches `top_p`; of equals the first goes first.

    The random number is scaled into that mass. probabilities: `[tokens]`, float64.
    """
    for rung in _RUNGS if len(probabilities) > _FEW_TOKENS else _RUNGS[-1:]:
        token_ids, cumulative = _ordered(probabilities, rung)
        reached = float(cumulative[-1]) if len(cumulative) else 0.0
        enough = reached >= top_p if top_p < 1.0 else reached > number
        if enough:
            break
    last = len(cumulative) - 1
    mass = 1.0
    if top_p < 1.0:
        last = min(int(torch.searchsorted(cumulative, top_p)), last)
        mass = float(cumulative[last])
    return int(token_ids[min(int(torch.searchsorted(cumulative, number * mass, right=True)), last)])


def _ordered(probabilities: torch.Tensor, least: float) -> tuple[torch.Tensor, torch.Tensor]:
    """List the tokens of at least this probability, likeliest first, and the mass up to and with each of them.

    They are exactly the beginning of the whole list, and where there are few of them, much faster to sort.
    """
    token_ids = ((probabilities >= least) & (probabilities > 0.0)).nonzero().flatten()
    values, order = torch.sort(probabilities[token_ids], descending=True, stable=True)
    return token_ids[order], torch.cumsum(values, dim=-1)


def logprobs_of(logits: torch.Tensor, token: int, top: int) -> TokenLogprobs:
    """Look a token and the `top` likeliest ones up in the model's own distribution. logits: `[vocabulary]`."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    values = torch.log_softmax(wide, dim=-1)
    likeliest: list[tuple[int, float]] = []
    if top > 0:
        count = min(top, len(values))
        least = torch.topk(values, count, sorted=False).values.min()
        token_ids = (values >= least).nonzero().flatten()
        ordered, order = torch.sort(values[token_ids], descending=True, stable=True)
        likeliest = list(zip(token_ids[order][:count].tolist(), ordered[:count].tolist(), strict=True))
    return TokenLogprobs(logprob=float(values[token]), top=tuple(likeliest))
