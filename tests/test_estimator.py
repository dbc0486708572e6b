"""What is learned of starts and answers: soon, for each model, and without being led astray by one bad day."""

from __future__ import annotations

import random

import pytest

from sllm_actor.domain import NodeId
from sllm_actor.messages.instances import Answered
from sllm_actor.policy.answer_times import AnswerTimes, learned_answer
from sllm_actor.policy.estimator import FIRST_LEAVE_S, HOST, SOURCE, SSD, Estimator
from sllm_actor.policy.line_fit import Line, learned

A = NodeId("a")


def test_a_line_is_found_through_noise_and_outliers() -> None:
    draw, line = random.Random(7), Line()
    for _ in range(200):
        x = draw.uniform(10, 2000)
        y = 0.001 * x + 0.5 + draw.uniform(-0.02, 0.02)
        line = learned(line, x, y * 50 if draw.random() < 0.05 else y)
    assert line.at(1000) == pytest.approx(1.5, rel=0.1)
    assert line.rising == pytest.approx((0.001, 0.5), rel=0.3)


def test_a_line_follows_what_has_changed() -> None:
    line = Line()
    for number in range(300):
        x = float(1 + number % 7)
        line = learned(line, x, (2.0 if number < 100 else 4.0) * x)
    assert line.at(5.0) == pytest.approx(20.0, rel=0.05)


def test_points_that_are_all_alike_give_a_constant_and_no_slope() -> None:
    line = Line()
    assert (line.at(9.0), line.rising) == (0.0, (0.0, 0.0))
    for _ in range(9):
        line = learned(line, 100.0, 3.0)
    assert line.slope == 0.0
    assert line.at(1e9) == pytest.approx(3.0)


def test_a_and_c_are_never_negative() -> None:
    falling = Line()
    for x in (1.0, 2.0, 3.0, 4.0):
        falling = learned(falling, x, 10.0 - x)
    assert falling.slope == pytest.approx(-1.0)
    slope, constant = falling.rising
    assert slope == 0.0
    assert constant > 0


def test_one_start_teaches_its_node_and_more_teach_the_model() -> None:
    estimator = Estimator()
    assert estimator.constant_s(A, HOST, "x", 100, 0.0) == 0.0
    estimator.learn_start(A, HOST, "x", 100, 0.4)
    assert estimator.constant_s(A, HOST, "x", 100, 0.0) == 0.4
    assert estimator.constant_s(A, HOST, "another", 100, 0.0) == pytest.approx(0.4)
    assert estimator.constant_s(NodeId("b"), HOST, "x", 100, 0.0) == 0.0
    assert estimator.constant_s(A, SSD, "x", 100, 1.0) == 0.0
    assert (estimator.starts(A, HOST, "x"), estimator.starts(A, HOST, "another")) == (1, 0)


def test_a_start_is_expected_to_take_what_those_beside_as_many_engines_took_or_nearly_as_many() -> None:
    estimator = Estimator()
    for constant_s, at_work in ((0.1, 0), (0.4, 2), (0.4, 3), (0.9, 100)):
        estimator.learn_start(A, HOST, "x", 100, constant_s, at_work)
    expected = [estimator.constant_s(A, HOST, "x", 100, 0.0, at_work) for at_work in (0, 1, 2, 3, 7, 8)]
    assert expected == [0.1, 0.4, 0.4, 0.4, 0.9, 0.9]
    assert estimator.starts(A, HOST, "x") == 4


def test_one_bad_start_changes_a_models_constant_little() -> None:
    estimator = Estimator()
    for constant_s in (0.4, 0.5, 60.0, 0.6, 0.5):
        estimator.learn_start(A, HOST, "x", 100, constant_s)
    assert estimator.constant_s(A, HOST, "x", 100, 0.0) == 0.5


def test_what_the_page_cache_had_may_save_all_of_the_move_and_no_more_and_a_fetch_is_never_sooner_than_its_bytes() -> (
    None
):
    estimator = Estimator()
    for tier in (SSD, SOURCE):
        estimator.learn_start(A, tier, "x", 100, -5.0)
    assert estimator.constant_s(A, SSD, "x", 100, 9.0) == -5.0
    assert estimator.constant_s(A, SSD, "x", 100, 3.0) == -3.0
    assert estimator.constant_s(A, SOURCE, "x", 100, 9.0) == 0.0


def test_how_long_a_node_takes_to_give_up_an_instance_is_learned() -> None:
    estimator = Estimator()
    assert estimator.leave_s(A) == FIRST_LEAVE_S
    for _ in range(30):
        estimator.learn_leave(A, 2.0)
    assert estimator.leave_s(A) == pytest.approx(2.0)
    estimator.forget(A)
    assert estimator.leave_s(A) == FIRST_LEAVE_S


def test_no_more_checkpoints_are_remembered_than_may_be() -> None:
    estimator = Estimator(max_remembered=2)
    for name in ("x", "y", "z"):
        estimator.learn_start(A, HOST, name, 100, 1.0)
    assert [estimator.starts(A, HOST, name) for name in ("x", "y", "z")] == [0, 1, 1]


def test_answers_teach_what_a_resume_and_a_token_take() -> None:
    times = AnswerTimes()
    for tokens in (10, 500, 1000, 40, 700) * 4:
        answered = Answered(computed_tokens=tokens, prefill_s=0.002 * tokens + 0.1, tokens=11, decode_s=0.5)
        times = learned_answer(times, answered)
    assert times.resume.rising == pytest.approx((0.002, 0.1), rel=0.05)
    assert times.token_s == pytest.approx(0.05)
    nothing = Answered(computed_tokens=0, prefill_s=0.0, tokens=1, decode_s=0.0)
    assert learned_answer(times, nothing) == times
