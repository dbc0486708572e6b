"""Drawing a token: greedy, seeded, within the nucleus, and refused where the numbers are no numbers."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_actor.domain import Sampling
from sllm_actor.engine.sampling import Sampler, _mix, draw_rows, uniform
from sllm_actor.errors import GenerationFailed

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def wish(temperature: float = 1.0, top_p: float = 1.0, seed: int = 0) -> Sampling:
    return Sampling(max_tokens=1, temperature=temperature, top_p=top_p, seed=seed)


def draw(logits: torch.Tensor, sampling: Sampling, position: int) -> int:
    """Draw from one row, for an answer that has come to `position`."""
    (drawn,) = draw_rows(logits.unsqueeze(0), [Sampler(sampling, [0], (), [0] * position)])
    if isinstance(drawn, GenerationFailed):
        raise drawn
    return drawn.token_id


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.log(torch.tensor(probabilities, dtype=torch.float64))


@pytest.mark.parametrize("dtype", FLOATS)
def test_greedy_takes_the_largest_and_of_equals_the_one_that_argmax_takes(dtype: torch.dtype) -> None:
    assert draw(torch.tensor([0.0, 3.0, -1.0], dtype=dtype), wish(0.0), 0) == 1
    equal = torch.tensor([1.0, 5.0, 5.0, 5.0] * 50, dtype=dtype)
    assert draw(equal, wish(0.0), 0) == int(torch.argmax(equal))


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_float_type_is_drawn_from(dtype: torch.dtype) -> None:
    logits = torch.tensor([0.5, 0.25, -8.0, 1.0], dtype=dtype)
    drawn = {draw(logits, wish(seed=seed), 0) for seed in range(200)}
    assert {0, 1, 3} <= drawn


def test_a_draw_depends_on_seed_and_position_alone_not_on_what_was_drawn_before() -> None:
    logits = torch.zeros(1000)
    places = [(seed, position) for seed in range(20) for position in range(20)]
    drawn = {place: draw(logits, wish(seed=place[0]), place[1]) for place in places}
    random.Random(5).shuffle(places)
    assert all(draw(logits, wish(seed=seed), position) == drawn[seed, position] for seed, position in places)
    assert len({drawn[seed, 0] for seed in range(20)}) > 10
    assert len({drawn[0, position] for position in range(20)}) > 10


def test_the_mixing_function_is_splitmix64() -> None:
    """The numbers are the published first outputs for these seeds (prng.di.unimi.it; rosettacode.org)."""
    assert _mix(0) == 0xE220A8397B1DCDAF
    assert _mix(1234567) == 6457827717110365317


def test_the_random_numbers_of_today_are_those_of_every_later_version() -> None:
    places = [(0, 0), (0, 1), (1, 0), (-1, 7), (2**63 - 1, 10**6)]
    numbers = [0.652448486374, 0.034011701304, 0.368189515652, 0.101349509252, 0.39273051041]
    assert [round(uniform(seed, position), 12) for seed, position in places] == numbers


def test_each_choice_has_numbers_of_its_own() -> None:
    numbers = [0.652448486374, 0.100326524025, 0.452285938692]
    assert [round(uniform(0, 0, choice), 12) for choice in range(3)] == numbers
    places = [(seed, choice, position) for seed in range(20) for choice in range(20) for position in range(20)]
    assert len({uniform(seed, position, choice) for seed, choice, position in places}) == len(places)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40))
def test_a_random_number_lies_in_the_half_open_unit_interval(seed: int, position: int) -> None:
    assert 0.0 <= uniform(seed, position) < 1.0


def test_random_numbers_are_spread_evenly_over_seeds_and_over_positions() -> None:
    for numbers in ([uniform(seed, 3) for seed in range(10_000)], [uniform(3, position) for position in range(10_000)]):
        counts = [sum(k / 10 <= number < (k + 1) / 10 for number in numbers) for k in range(10)]
        assert all(880 < count < 1120 for count in counts)  # Four standard deviations.
        lagged = sum((a - 0.5) * (b - 0.5) for a, b in itertools.pairwise(numbers)) / len(numbers) * 12
        assert abs(lagged) < 0.04


def test_the_distribution_is_the_models_own() -> None:
    wanted = [0.5, 0.3, 0.15, 0.05]
    counts = [0] * 4
    for seed in range(8000):
        counts[draw(logits_of(*wanted), wish(seed=seed), seed % 7)] += 1
    for count, probability in zip(counts, wanted, strict=True):
        assert abs(count - 8000 * probability) < 4 * math.sqrt(8000 * probability * (1 - probability))


def test_temperature_sharpens_and_flattens() -> None:
    logits = logits_of(0.6, 0.4)
    share = {
        temperature: sum(draw(logits, wish(temperature, seed=seed), 0) == 0 for seed in range(4000)) / 4000
        for temperature in (0.25, 1.0, 2.0)
    }
    for temperature, seen in share.items():
        first, second = 0.6 ** (1 / temperature), 0.4 ** (1 / temperature)
        assert abs(seen - first / (first + second)) < 0.035


def test_the_nucleus_is_the_shortest_that_reaches_its_mass() -> None:
    logits = logits_of(0.1, 0.4, 0.2, 0.3)
    for top_p, allowed in ((0.3, {1}), (0.5, {1, 3}), (0.69, {1, 3}), (0.75, {1, 3, 2}), (0.95, {0, 1, 2, 3})):
        assert {draw(logits, wish(top_p=top_p, seed=seed), 0) for seed in range(300)} == allowed


@settings(deadline=None)
@given(
    st.lists(st.floats(-30, 30), min_size=1, max_size=40),
    st.floats(0.001, 1.0),
    st.floats(0.05, 2.0),
    st.integers(0, 2**63 - 1),
    st.integers(0, 1000),
)
def test_no_draw_leaves_the_nucleus(
    values: list[float], top_p: float, temperature: float, seed: int, position: int
) -> None:
    logits = torch.tensor(values, dtype=torch.float64)
    token = draw(logits, wish(temperature, top_p, seed), position)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    better = float(probabilities[probabilities > probabilities[token]].sum())
    assert better < top_p + 1e-9
    assert probabilities[token] > 0


def test_a_token_of_no_probability_is_never_drawn() -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    assert {draw(logits, wish(seed=seed), 0) for seed in range(300)} == {1, 3}


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30])
def test_the_smallest_temperature_is_greedy_and_no_division_by_nothing(temperature: float) -> None:
    logits = torch.tensor([1.0, 900.0, 899.0, -math.inf, 3.0])
    assert {draw(logits, wish(temperature, seed=seed), 0) for seed in range(50)} == {1}


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(
    "values",
    [[math.nan, 1.0], [1.0, math.nan], [math.inf, 1.0], [-math.inf, -math.inf], [math.nan] * 3, [math.inf, -math.inf]],
)
def test_logits_that_are_no_numbers_fail_the_generation(values: list[float], temperature: float) -> None:
    for dtype in FLOATS:
        with pytest.raises(GenerationFailed, match="token 17"):
            draw(torch.tensor(values, dtype=dtype), wish(temperature), 17)
