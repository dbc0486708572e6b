"""What a sampling makes of logits: against a plain calculation, and against transformers' own processors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sllm_actor.domain import Sampling
from sllm_actor.engine import sampling as module
from sllm_actor.engine.sampling import Drawn, Sampler, draw_rows, uniform
from sllm_actor.errors import GenerationFailed

VOCABULARY = 60
PROMPT = [3, 4, 3, 9]
GENERATED = [7, 9, 7, 7, 50]
ENDS = (1, 2)


def wish(**changes: Any) -> Sampling:
    return Sampling(**({"max_tokens": 9, "temperature": 0.0, "top_p": 1.0, "seed": 0} | changes))


def with_seed(sampling: Sampling, seed: int) -> Sampling:
    return msgspec.structs.replace(sampling, seed=seed)


def logits_of(seed: int, tokens: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def transformed(logits: torch.Tensor, sampling: Sampling, generated: Sequence[int] = GENERATED) -> torch.Tensor:
    changed = logits.clone()
    Sampler(sampling, PROMPT, ENDS, generated).transform(changed)
    return changed


def draw(logits: torch.Tensor, sampling: Sampling, generated: Sequence[int] = GENERATED) -> int:
    (drawn,) = draw_rows(logits.unsqueeze(0), [Sampler(sampling, PROMPT, ENDS, generated)])
    assert isinstance(drawn, Drawn), drawn
    return drawn.token_id


def by_hand(logits: torch.Tensor, sampling: Sampling, generated: Sequence[int]) -> list[float]:
    """Calculate what comes before temperature, token by token."""
    bias = dict(sampling.logit_bias)
    values = []
    for token, value in enumerate(logits.tolist()):
        if token in (*ENDS, *sampling.stop_token_ids) and len(generated) < sampling.min_tokens:
            value = -math.inf
        value += bias.get(token, 0.0)
        if token in PROMPT or token in generated:
            value = value / sampling.repetition_penalty if value > 0 else value * sampling.repetition_penalty
        value -= sampling.frequency_penalty * generated.count(token)
        value -= sampling.presence_penalty * (token in generated)
        values.append(value)
    return values


def draw_by_hand(logits: Sequence[float], sampling: Sampling, position: int) -> int:
    """Draw with whole sorts of Python's numbers, in the order of the transforms that vLLM has."""
    best = max(logits)
    weights = {token: math.exp((value - best) / sampling.temperature) for token, value in enumerate(logits)}
    weights = {token: weight for token, weight in weights.items() if weight >= sampling.min_p}
    ordered = sorted(weights, key=lambda token: (-weights[token], token))
    if sampling.top_k:
        ordered = [token for token in ordered if weights[token] >= weights[ordered[: sampling.top_k][-1]]]
    whole = sum(weights[token] for token in ordered)
    mass, kept = 0.0, []
    for token in ordered:
        kept.append(token)
        mass += weights[token] / whole
        if mass >= sampling.top_p:
            break
    target, reached = uniform(sampling.seed, position, sampling.choice) * mass, 0.0
    for token in kept:
        reached += weights[token] / whole
        if reached > target:
            return token
    return kept[-1]


penalties = st.builds(
    wish,
    repetition_penalty=st.floats(0.1, 2),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-100, 100), max_size=5).map(
        lambda bias: tuple(bias.items())
    ),
    min_tokens=st.integers(0, 9),
    stop_token_ids=st.sampled_from([(), (5,), (5, 9)]),
)


@given(st.integers(0, 10**6), penalties, st.lists(st.integers(0, VOCABULARY - 1), max_size=12))
def test_penalties_bias_and_least_length_are_those_calculated_by_hand(
    seed: int, sampling: Sampling, generated: list[int]
) -> None:
    logits = logits_of(seed)
    wanted = torch.tensor(by_hand(logits, sampling, generated), dtype=torch.float64)
    assert torch.allclose(transformed(logits, sampling, generated), wanted, rtol=1e-12, atol=1e-12)


@given(st.integers(0, 10**6), penalties, st.lists(st.integers(0, VOCABULARY - 1), max_size=12))
def test_a_sampler_that_goes_on_is_as_far_as_one_that_drew_the_tokens(
    seed: int, sampling: Sampling, generated: list[int]
) -> None:
    logits = logits_of(seed)
    drew = Sampler(sampling, PROMPT, ENDS)
    for token in generated:
        drew.transform(logits.clone())
        drew.note(token)
    changed = logits.clone()
    drew.transform(changed)
    assert torch.equal(changed, transformed(logits, sampling, generated))


def processed(processor: Any, logits: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    scores: torch.Tensor = processor(torch.tensor([list(ids)]), logits.unsqueeze(0).clone())[0]
    return scores


@given(st.integers(0, 10**6), st.floats(0.1, 3))
def test_the_repetition_penalty_is_transformers_own(seed: int, penalty: float) -> None:
    logits = logits_of(seed)
    wanted = processed(RepetitionPenaltyLogitsProcessor(penalty), logits, [*PROMPT, *GENERATED])
    assert torch.allclose(transformed(logits, wish(repetition_penalty=penalty)), wanted)


def test_bias_and_least_length_are_transformers_own() -> None:
    logits = logits_of(1).float()
    bias = {5: 2.5, 6: -100.0, 7: 100.0}
    wanted = processed(SequenceBiasLogitsProcessor({(token,): by for token, by in bias.items()}), logits, [0])
    assert torch.equal(transformed(logits, wish(logit_bias=tuple(bias.items()))), wanted)
    whole = [*PROMPT, *GENERATED]
    for least in (len(GENERATED), len(GENERATED) + 1):
        shortest = MinNewTokensLengthLogitsProcessor(len(PROMPT), least, list(ENDS), device="cpu")
        wanted = processed(shortest, logits, whole)
        assert torch.equal(transformed(logits, wish(min_tokens=least)), wanted)


restrictions = st.builds(
    wish,
    temperature=st.floats(0.2, 2),
    top_k=st.integers(0, 70),
    top_p=st.floats(0.05, 1),
    min_p=st.sampled_from([0.0, 0.001, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**63 - 1),
    choice=st.integers(0, 3),
)


@settings(max_examples=300)
@given(st.integers(0, 10**6), restrictions)
def test_a_draw_is_the_one_calculated_by_hand(seed: int, sampling: Sampling) -> None:
    logits = logits_of(seed)
    assert draw(logits, sampling) == draw_by_hand(logits.tolist(), sampling, len(GENERATED))


@settings(max_examples=300)
@given(st.integers(0, 10**6), restrictions)
def test_a_draw_is_from_what_transformers_own_warpers_leave(seed: int, sampling: Sampling) -> None:
    scores = processed(TemperatureLogitsWarper(sampling.temperature), logits_of(seed), [0])
    if sampling.min_p:
        scores = processed(MinPLogitsWarper(sampling.min_p), scores, [0])
    if sampling.top_k:
        scores = processed(TopKLogitsWarper(sampling.top_k), scores, [0])
    if sampling.top_p < 1:
        scores = processed(TopPLogitsWarper(sampling.top_p), scores, [0])
    left = scores.isfinite().nonzero().flatten().tolist()
    drawn = {draw(logits_of(seed), with_seed(sampling, number)) for number in range(20)}
    assert drawn <= set(left)
    plain = wish(temperature=1.0, seed=sampling.seed, choice=sampling.choice)
    assert draw(logits_of(seed), sampling) == draw_by_hand(scores.tolist(), plain, len(GENERATED))


def test_of_equals_the_top_k_keeps_all() -> None:
    logits = torch.tensor([1.0, 5.0, 3.0, 3.0, 3.0, -1.0])
    assert {draw(logits, wish(temperature=1.0, top_k=2, seed=seed)) for seed in range(200)} == {1, 2, 3, 4}
    assert {draw(logits, wish(temperature=1.0, top_k=1, seed=seed)) for seed in range(200)} == {1}


def test_a_top_k_beyond_the_vocabulary_keeps_all() -> None:
    for seed in range(50):
        free = draw(logits_of(3), wish(temperature=2.0, seed=seed))
        assert free == draw(logits_of(3), wish(temperature=2.0, seed=seed, top_k=10**6))
        assert free == draw(logits_of(3), wish(temperature=2.0, seed=seed, top_k=VOCABULARY))


def test_a_bias_bans_a_token_or_forces_it() -> None:
    logits = torch.zeros(10)
    banned = wish(temperature=1.0, logit_bias=((4, -100.0),))
    assert all(draw(logits, with_seed(banned, seed)) != 4 for seed in range(200))
    assert draw(logits, wish(temperature=0.0, logit_bias=((4, -100.0),))) == 0
    forced = wish(temperature=1.0, logit_bias=((4, 100.0),))
    assert all(draw(logits, with_seed(forced, seed)) == 4 for seed in range(200))


def test_tokens_outside_the_vocabulary_change_nothing() -> None:
    outside = (-1, VOCABULARY, 2**40)
    odd = wish(
        logit_bias=tuple((token, 100.0) for token in outside),
        stop_token_ids=outside,
        min_tokens=9,
        repetition_penalty=1.5,
        frequency_penalty=0.5,
    )
    even = wish(min_tokens=9, repetition_penalty=1.5, frequency_penalty=0.5)
    changed = logits_of(4)
    Sampler(odd, [*PROMPT, *outside], ENDS, [*GENERATED, *outside]).transform(changed)
    assert torch.equal(changed, transformed(logits_of(4), even))


def test_no_end_is_drawn_before_the_least_length_and_any_after_it() -> None:
    logits = torch.full((10,), -50.0)
    logits[[1, 2, 5]] = torch.tensor([3.0, 2.0, 2.5])
    sampler = Sampler(wish(min_tokens=3, stop_token_ids=(5,)), PROMPT, ENDS)
    tokens = []
    for _ in range(4):
        (drawn,) = draw_rows(logits.unsqueeze(0), [sampler])
        assert isinstance(drawn, Drawn)
        tokens.append(drawn.token_id)
    assert tokens == [0, 0, 0, 1]
    assert sampler.ends == {1, 2, 5}
    assert Sampler(wish(ignore_eos=True, stop_token_ids=(5,)), PROMPT, ENDS).ends == {5}


@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999, 0.9999999, 1.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_sorting_only_as_far_as_a_draw_goes_changes_no_draw(
    top_p: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = 5000
    # Steps of a quarter: many are equal, also at the ends of what is sorted first.
    logits = torch.round(logits_of(5, tokens) * 4) / 4 * scale
    wishes = [wish(temperature=1.0, top_p=top_p, seed=seed) for seed in range(60)]
    fast = [draw(logits, sampling) for sampling in wishes]
    monkeypatch.setattr(module, "_RUNGS", (0.0,))
    assert [draw(logits, sampling) for sampling in wishes] == fast
    assert (len(set(fast)) > 20) == (scale == 0.01 or (scale == 1.0 and top_p > 0.1))


def test_a_draw_from_the_far_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.full((4000,), -12.0, dtype=torch.float64)
    logits[7] = 0.0
    for number, wanted in ((0.0, {7}), (0.5, {7}), (1 - 2**-53, {3999})):
        monkeypatch.setattr(module, "uniform", lambda *_, number=number: number)
        assert {draw(logits, wish(temperature=1.0))} == wanted


@pytest.mark.parametrize("top", [0, 1, 5, VOCABULARY, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_logprobs_are_those_of_the_models_own_distribution(top: int, dtype: torch.dtype) -> None:
    logits = logits_of(6).to(dtype)
    asked = wish(temperature=0.5, top_k=3, logit_bias=((30, 9.0),), presence_penalty=1.0, top_logprobs=top)
    (drawn,) = draw_rows(logits.unsqueeze(0), [Sampler(asked, PROMPT, ENDS, GENERATED)])
    assert isinstance(drawn, Drawn)
    assert drawn.logprobs is not None
    wanted = torch.log_softmax(logits.double(), dim=-1)
    assert drawn.logprobs.logprob == pytest.approx(float(wanted[drawn.token_id]), abs=1e-5)
    assert [value for _, value in drawn.logprobs.top] == pytest.approx(
        sorted(wanted.tolist(), reverse=True)[:top], abs=1e-5
    )
    assert all(value == pytest.approx(float(wanted[token]), abs=1e-5) for token, value in drawn.logprobs.top)
    assert len({token for token, _ in drawn.logprobs.top}) == min(top, VOCABULARY)


def test_of_equally_likely_tokens_the_first_are_listed() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 0.0]])
    (drawn,) = draw_rows(logits, [Sampler(wish(top_logprobs=4), PROMPT, ENDS)])
    assert isinstance(drawn, Drawn)
    assert drawn.logprobs is not None
    assert [token for token, _ in drawn.logprobs.top] == [1, 3, 0, 2]


def test_where_none_are_asked_for_there_are_no_logprobs() -> None:
    (drawn,) = draw_rows(torch.zeros(1, 4), [Sampler(wish(), PROMPT, ENDS)])
    assert drawn == Drawn(0, None)


@pytest.mark.parametrize(
    "broken",
    [
        {"logit_bias": ((1, math.inf),)}, {"logit_bias": ((1, math.nan),)}, {"logit_bias": ((1, 1e308),)},
        {"repetition_penalty": 0.0}, {"repetition_penalty": math.nan},
        {"presence_penalty": -math.inf}, {"frequency_penalty": math.nan},
        {"temperature": math.inf, "logit_bias": ((0, -math.inf),)},
        {"min_tokens": 9, "stop_token_ids": tuple(range(8))},
    ],
)  # fmt: skip
def test_numbers_that_leave_no_token_fail_their_row_alone(broken: dict[str, Any]) -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5, -1.0, 3.0, 0.25, -7.0, 1.5]] * 3, dtype=torch.float16)
    samplers = [Sampler(wish(**changes), [4, 7], ENDS, [7]) for changes in ({}, broken, {})]
    first, failed, last = draw_rows(logits, samplers)
    assert first == last == Drawn(4, None)
    assert isinstance(failed, GenerationFailed)
    assert [sampler.position for sampler in samplers] == [2, 1, 2]
