"""Workloads of simulations: drawn ones, and traces that others have published."""

from __future__ import annotations

import itertools
import random
import statistics
from collections import Counter
from math import exp, sqrt
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_actor.errors import InvalidInput
from sllm_actor.testing.traces import (
    azure_inferences,
    function_counts,
    function_minutes,
    mooncake,
    read_trace,
    seen_lengths,
)
from sllm_actor.testing.workloads import (
    LENGTHS,
    MAX_TOKENS,
    Arrival,
    Length,
    binned,
    binned_arrivals,
    bounded,
    expected_arrivals,
    gamma_arrivals,
    one_of,
    rate_scaled,
    spread,
    zipf,
)


def drawn(seed: int, seconds: float = 20_000.0, most: int | None = None) -> list[Arrival]:
    return gamma_arrivals(
        random.Random(seed), seconds=seconds, per_s=2.0, parts=zipf(4), lengths=LENGTHS["gsm8k"], cv=8.0, most=most
    )


def test_a_seed_fixes_all_requests_and_they_come_in_order() -> None:
    assert drawn(1) == drawn(1) == sorted(drawn(1), key=lambda one: (one.at_s, one.model))
    assert drawn(1) != drawn(2)


def test_of_all_requests_the_first_can_be_taken() -> None:
    assert drawn(1, most=100) == drawn(1)[:100]
    assert drawn(1, most=10**9) == drawn(1)


def test_gaps_of_one_model_vary_as_much_as_was_asked_for() -> None:
    moments = [one.at_s for one in drawn(1, 100_000.0) if one.model == 0]
    gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert 5.5 < statistics.stdev(gaps) / statistics.fmean(gaps) < 10.5


def test_a_rate_is_kept_by_moving_requests_together() -> None:
    scaled = rate_scaled(drawn(3), 0.5)
    assert len(scaled) / scaled[-1].at_s == pytest.approx(0.5)
    assert [one.model for one in scaled] == [one.model for one in drawn(3)]


def test_functions_are_dealt_to_models_in_turn() -> None:
    assert spread([1, 2, 3, 4], 2) == [0.4, 0.6]


def test_minutes_of_functions_are_dealt_to_models_and_joined() -> None:
    functions = [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9], [0, 0, 1, 0, 1]]
    assert binned(functions, 2, 2) == [[3, 8, 6], [11, 15, 9]]
    # A function that is never invoked is dealt to nobody, and nobody asks the last model.
    assert binned([[0.0] * 5, *functions], 2, 2) == binned(functions, 2, 2)
    assert binned(functions, 4, 5) == [[15], [35], [2], []]


@pytest.mark.parametrize("gaps", [0.01, 1.0, 30.0, 400.0])
def test_arrivals_of_a_process_that_begins_are_as_many_as_formulas_say(gaps: float) -> None:
    # Poisson's; and gaps of shape 2, whose sum has a closed form.
    assert expected_arrivals(gaps / 7, 7.0, 1.0) == pytest.approx(gaps)
    assert expected_arrivals(gaps / 7, 7.0, 1 / sqrt(2)) == pytest.approx(gaps - 1 / 4 + exp(-4 * gaps) / 4)


def test_arrivals_of_a_process_that_begins_are_as_many_as_are_drawn() -> None:
    dice, drawn = random.Random(5), 0
    for _ in range(4_000):
        at_s = dice.gammavariate(1 / 64, 64 / 0.1)
        while at_s < 3.0:
            drawn += 1
            at_s += dice.gammavariate(1 / 64, 64 / 0.1)
    # Sixteen and more, where 0.3 gaps fit into the time.
    assert expected_arrivals(0.1, 3.0, 8.0) == pytest.approx(drawn / 4_000, rel=0.05)
    assert drawn / 4_000 > 5


@pytest.mark.parametrize(("cv", "gaps"), [(0.1, 250.0), (1.0, 250.0), (8.0, 2_560.0), (32.0, 40_960.0)])
def test_what_is_summed_goes_over_into_what_holds_in_the_limit(cv: float, gaps: float) -> None:
    summed, limit = expected_arrivals(gaps, 1.0, cv), expected_arrivals(gaps + 1e-6, 1.0, cv)
    assert summed == pytest.approx(limit, rel=1e-6)


BINS = [[30.0, 0.0, 10.0], [], [0.0, 20.0, 0.0], [4.0, 4.0, 90.0]]


def replayed(seed: int, per_s: float = 2.0, cv: float = 8.0, seconds: float = 180.0) -> list[Arrival]:
    return binned_arrivals(
        random.Random(seed), BINS, bin_s=60, seconds=seconds, per_s=per_s, lengths=LENGTHS["gsm8k"], cv=cv
    )


@pytest.mark.parametrize(
    ("per_s", "cv", "seconds"), [(2.0, 8.0, 180.0), (0.1, 8.0, 150.0), (0.5, 1.0, 70.0), (0.5, 0.5, 180.0)]
)
def test_replayed_requests_come_at_the_rate_on_average(per_s: float, cv: float, seconds: float) -> None:
    counts = [len(replayed(seed, per_s, cv, seconds)) for seed in range(80)]
    # Three times as far as the mean is likely to be from it.
    allowed = 3 * statistics.stdev(counts) / sqrt(len(counts))
    assert statistics.fmean(counts) == pytest.approx(per_s * seconds, abs=allowed)
    assert allowed < per_s * seconds / 4


def test_requests_are_replayed_to_each_model_in_each_interval_as_the_trace_has_them() -> None:
    found = Counter((one.model, int(one.at_s // 60)) for one in replayed(1, per_s=100.0, cv=1.0))
    whole = sum(map(sum, BINS))
    for model, row in enumerate(BINS):
        for number, count in enumerate(row):
            assert found[model, number] == pytest.approx(18_000 * count / whole, rel=0.1)


@given(
    rows=st.lists(st.lists(st.sampled_from([0.0, 1.0, 700.0]), min_size=4, max_size=4), min_size=1, max_size=5),
    seconds=st.floats(1, 240), cv=st.sampled_from([0.5, 1.0, 8.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_nothing_is_replayed_where_nobody_asks_or_when_the_time_is_over(
    rows: list[list[float]], seconds: float, cv: float, seed: int
) -> None:
    def drawn() -> list[Arrival]:
        return binned_arrivals(
            random.Random(seed), rows, bin_s=60, seconds=seconds, per_s=1.0, lengths=LENGTHS["gsm8k"], cv=cv
        )

    if not any(count for row in rows for number, count in enumerate(row) if 60 * number < seconds):
        with pytest.raises(InvalidInput, match="nobody asks"):
            drawn()
        return
    found = drawn()
    assert found == drawn() and [one.at_s for one in found] == sorted(one.at_s for one in found)
    assert all(0 <= one.at_s < seconds and rows[one.model][int(one.at_s // 60)] for one in found)


def test_requests_that_are_too_bursty_to_be_so_few_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"6 intervals .* of 32\) have more than 0\.018 of them"):
        replayed(1, per_s=0.0001, cv=32.0)


def test_a_prompt_and_its_answer_fit_the_context() -> None:
    assert bounded(5_000, 5_000) == Length(MAX_TOKENS // 2, MAX_TOKENS // 2)
    assert bounded(0, 0) == Length(1, 1)
    dice = random.Random(0)
    for draw in (*LENGTHS.values(), one_of([Length(7, 9)])):
        assert all(sum(draw(dice)) <= MAX_TOKENS for _ in range(1_000))


def test_azures_inferences_are_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,3960,109\n"
    )
    first, second = azure_inferences(path)
    assert first == Arrival(0.0, 0, 374, 44)
    assert second.at_s == pytest.approx(4.314579) and second[1:] == (0, 1024, 109)
    assert seen_lengths(path) == [Length(374, 44), Length(1024, 109)]


def test_mooncakes_traces_are_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 1500, "input_length": 10, "output_length": 5, "hash_ids": [1]}\n\n')
    assert mooncake(path) == read_trace(path) == [Arrival(1.5, 0, 10, 5)]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,2\n", "line 2: TIMESTAMP 'now' is no time"),
        ("a.csv", "TIMESTAMP,ContextTokens\n2023-11-16 18:15:46,1\n", "line 2: GeneratedTokens is null, no number"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,-1,2\n", "ContextTokens is -1"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "it has no request"),
        ("a.jsonl", '{"timestamp": 1}\n', "line 1: Object missing required field `input_length`"),
        ("a.jsonl", '{"timestamp": -1, "input_length": 1, "output_length": 1}\n', "line 1: a number below 0"),
        ("a.txt", "", "ends with .csv or .jsonl"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_trace_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InvalidInput, match=said):
        read_trace(path)


def test_a_trace_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"absent\.csv"):
        read_trace(tmp_path / "absent.csv")


def test_invocations_of_functions_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "inv.csv"
    path.write_text("HashFunction,minute_1,minute_2\na,1,2\nb,0,4\n")
    assert function_counts(path) == [3.0, 4.0]
    path.write_text("HashFunction,minute_1\na,many\n")
    with pytest.raises(InvalidInput, match='line 2: minute_1 is "many", no number'):
        function_counts(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InvalidInput, match="no column is called minute_1"):
        function_counts(path)


def test_the_first_minutes_of_functions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "inv.csv"
    path.write_text("HashFunction,minute_1,minute_2,minute_3\na,1,2,9\nb,0,4,9\n")
    assert list(function_minutes(path, 2)) == [[1.0, 2.0], [0.0, 4.0]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("HashFunction,minute_1\na,1\n", "has 1 minutes, and 2 are needed: no column is minute_2"),
        ("HashFunction,minute_1,minute_2\na,1,many\n", 'line 2: minute_2 is "many", no number'),
        ("HashFunction,minute_1,minute_2\na,1\n", "line 2: minute_2 is null, no number"),
        ("HashFunction,minute_1,minute_2\na,1,-1\n", "line 2: minute_2 is -1"),
        ("HashFunction,minute_1,minute_2\na,1,nan\n", "line 2: minute_2 is nan"),
        ("HashFunction,minute_1,minute_2\na,1,2,3\n", "line 2: it has more columns than the first line names"),
        ("a,b\n1,2\n", "no column is called minute_1"),
    ],
)
def test_what_is_wrong_in_minutes_of_functions_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "inv.csv"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=said):
        list(function_minutes(path, 2))
