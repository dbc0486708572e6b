"""Rows of one batch: none changes another's draw, and what is wrong with one fails that one alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_actor.domain import Sampling
from sllm_actor.engine.sampling import Drawn, Sampler, draw_rows
from sllm_actor.errors import GenerationFailed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def wish(**changes: Any) -> Sampling:
    return Sampling(**({"max_tokens": 9, "temperature": 0.0, "top_p": 1.0, "seed": 0} | changes))


MIXED = (
    wish(),
    wish(temperature=1.0, seed=1, top_logprobs=3),
    wish(temperature=0.7, top_p=0.9, seed=2),
    wish(temperature=1.5, top_k=40, min_p=0.01, seed=3, choice=2),
    wish(repetition_penalty=1.3, frequency_penalty=0.4, top_logprobs=0),
    wish(temperature=2.0, seed=4, logit_bias=((5, 3.0), (6, -3.0)), presence_penalty=0.5, min_tokens=5),
    wish(temperature=1.0, top_p=0.9999, seed=5, top_logprobs=20),
)
wishes = st.builds(
    wish,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    top_k=st.sampled_from([0, 1, 20]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    seed=st.integers(0, 2**63 - 1),
    choice=st.integers(0, 2),
    top_logprobs=st.sampled_from([None, 0, 5]),
)


def sampler_of(sampling: Sampling) -> Sampler:
    return Sampler(sampling, [5, 6, 7], (1,), [8, 9])


def alone(logits: torch.Tensor, sampling: Sampling) -> Drawn:
    (drawn,) = draw_rows(logits.clone().unsqueeze(0), [sampler_of(sampling)])
    assert isinstance(drawn, Drawn), drawn
    return drawn


@settings(max_examples=60, deadline=None)
@given(st.lists(wishes, min_size=1, max_size=9), st.integers(0, 10**6), st.sampled_from(DTYPES), st.randoms())
def test_a_row_draws_the_same_alone_in_any_batch_and_at_any_place(
    asked: list[Sampling], seed: int, dtype: torch.dtype, random: Any
) -> None:
    rows = torch.randn(len(asked), 2000, generator=torch.Generator().manual_seed(seed)).mul(3).to(dtype)
    single = [alone(rows[k], sampling) for k, sampling in enumerate(asked)]
    for _ in range(3):
        order = random.sample(range(len(asked)), random.randint(1, len(asked)))
        assert draw_rows(rows[order], [sampler_of(asked[k]) for k in order]) == [single[k] for k in order]


@pytest.mark.parametrize("dtype", DTYPES)
def test_so_does_a_row_of_a_large_vocabulary_that_is_computed_by_several_threads(dtype: torch.dtype) -> None:
    rows = torch.randn(len(MIXED), 150_001, generator=torch.Generator().manual_seed(2)).mul(3).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = [alone(rows[k], sampling) for k, sampling in enumerate(MIXED)]
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for order in (range(len(MIXED)), range(len(MIXED) - 1, -1, -1), (6, 2, 2)):
                drawn = draw_rows(rows[list(order)], [sampler_of(MIXED[k]) for k in order])
                assert drawn == [single[k] for k in order]
    finally:
        torch.set_num_threads(before)


def test_rows_that_lie_apart_in_memory_draw_what_they_draw_together() -> None:
    rows = torch.randn(len(MIXED), 3, 500, generator=torch.Generator().manual_seed(3))
    last = rows[:, -1]
    assert not last.is_contiguous()
    samplers = [sampler_of(sampling) for sampling in MIXED]
    assert draw_rows(last, samplers) == [alone(last[k], sampling) for k, sampling in enumerate(MIXED)]


def test_the_batchs_own_numbers_stay_as_they_are() -> None:
    for dtype in (torch.float64, *DTYPES):
        rows = torch.randn(len(MIXED), 500, generator=torch.Generator().manual_seed(4)).to(dtype)
        before = rows.clone()
        draw_rows(rows, [sampler_of(sampling) for sampling in MIXED])
        assert torch.equal(rows, before)


def test_no_rows_draw_nothing() -> None:
    assert draw_rows(torch.empty(0, 10), []) == []


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [1.0, math.nan], [math.inf, 1.0], [-math.inf, -math.inf]])
def test_a_row_that_is_no_numbers_fails_alone(bad: list[float]) -> None:
    good = [1.0, 2.0]
    for dtype, sampling in itertools.product((torch.float64, *DTYPES), (wish(), wish(temperature=1.0, top_k=1))):
        samplers = [Sampler(sampling, [0], (), [0] * position) for position in (3, 17, 5)]
        first, failed, last = draw_rows(torch.tensor([good, bad, good], dtype=dtype), samplers)
        assert first == last == Drawn(1, None)
        assert isinstance(failed, GenerationFailed)
        assert "token 17" in failed.message
        assert [sampler.position for sampler in samplers] == [4, 17, 6]


class Only:
    """A constraint that allows some tokens, one after the other."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        self.accepted: list[int] = []

    def mask(self, logits: torch.Tensor) -> None:
        assert logits.dtype == torch.float32
        assert logits.is_contiguous()
        allowed = self.tokens[len(self.accepted) : len(self.accepted) + 1]
        kept = logits[allowed].clone()
        logits.fill_(-math.inf)
        logits[allowed] = kept

    def accept(self, token_id: int) -> None:
        if token_id != self.tokens[len(self.accepted)]:
            raise GenerationFailed(f"token {token_id} is not allowed")
        self.accepted.append(token_id)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_constraint_says_what_may_come_and_hears_what_came(dtype: torch.dtype, temperature: float) -> None:
    free, bound = sampler_of(wish()), sampler_of(wish(temperature=temperature, top_logprobs=1))
    bound.constraint = only = Only([3, 0, 2])
    rows = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]] * 2, dtype=dtype)
    for token in (3, 0, 2):
        other, drawn = draw_rows(rows, [free, bound])
        assert isinstance(drawn, Drawn)
        assert isinstance(other, Drawn)
        assert (other.token_id, drawn.token_id) == (4, token)
        assert drawn.logprobs is not None
        assert drawn.logprobs.top[0][0] == 4, "log-probabilities are the model's own"
    other, failed = draw_rows(rows, [free, bound])
    assert isinstance(other, Drawn)
    assert isinstance(failed, GenerationFailed)
    assert "no token is left" in failed.message
    assert only.accepted == [3, 0, 2]


class Broken(Only):
    def mask(self, logits: torch.Tensor) -> None:
        raise RuntimeError("the grammar's library is at its end")


class Deaf(Only):
    def mask(self, logits: torch.Tensor) -> None:
        pass


@pytest.mark.parametrize(("kind", "reason"), [(Broken, "at its end"), (Deaf, "not allowed")])
def test_a_constraint_that_fails_fails_its_row_alone(kind: type[Only], reason: str) -> None:
    samplers = [sampler_of(wish()) for _ in range(3)]
    samplers[1].constraint = kind([0])
    first, failed, last = draw_rows(torch.tensor([[0.0, 1.0]] * 3), samplers)
    assert first == last == Drawn(1, None)
    assert isinstance(failed, GenerationFailed)
    assert reason in failed.message
    assert samplers[1].position == 2
