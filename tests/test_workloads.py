"""Workloads of simulations: drawn ones, and traces that others have published."""

from __future__ import annotations

import itertools
import random
import statistics
from pathlib import Path

import pytest

from sllm_actor.errors import InvalidInput
from sllm_actor.testing.traces import azure_inferences, function_counts, mooncake, read_trace, seen_lengths
from sllm_actor.testing.workloads import (
    LENGTHS,
    MAX_TOKENS,
    Arrival,
    Length,
    bounded,
    gamma_arrivals,
    one_of,
    rate_scaled,
    spread,
    zipf,
)


def drawn(seed: int, seconds: float = 20_000.0) -> list[Arrival]:
    return gamma_arrivals(
        random.Random(seed), seconds=seconds, per_s=2.0, parts=zipf(4), lengths=LENGTHS["gsm8k"], cv=8.0
    )


def test_a_seed_fixes_all_requests_and_they_come_in_order() -> None:
    assert drawn(1) == drawn(1) == sorted(drawn(1))
    assert drawn(1) != drawn(2)


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
