"""What is learned of starts and answers: soon, for each model, and without being led astray by one bad day."""

from __future__ import annotations

import random
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_placement import node, view_of

from sllm_actor.actors.decision_log import Granted
from sllm_actor.domain import ModelName, NodeId, RequestId
from sllm_actor.messages.instances import Answered
from sllm_actor.policy.answer_times import AnswerTimes, learned_answer
from sllm_actor.policy.estimator import FIRST_LEAVE_S, HOST, SOURCE, SSD, Estimator, beside
from sllm_actor.policy.learned import packed, unpacked
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


def test_a_start_is_expected_to_take_what_those_beside_as_many_others_took_or_nearly_as_many() -> None:
    estimator = Estimator()
    for constant_s, others in ((0.1, 0), (0.4, 2), (0.4, 3), (0.9, 12)):
        estimator.learn_start(A, HOST, "x", 100, constant_s, others)
    expected = [estimator.constant_s(A, HOST, "x", 100, 0.0, others) for others in (0, 1, 2, 3, 7, 8)]
    assert expected == [0.1, 0.4, 0.4, 0.4, 0.9, 0.9]
    assert estimator.starts(A, HOST, "x") == 4


def test_one_bad_start_changes_a_models_constant_little() -> None:
    estimator = Estimator()
    for constant_s in (0.4, 0.5, 60.0, 0.6, 0.5):
        estimator.learn_start(A, HOST, "x", 100, constant_s)
    assert estimator.constant_s(A, HOST, "x", 100, 0.0) == 0.5


@pytest.mark.parametrize(("tier", "speed"), [(SSD, "ssd_bytes_per_s"), (SOURCE, "remote_bytes_per_s")])
def test_a_start_whose_bytes_were_guessed_tells_how_fast_they_come_and_nothing_else(tier: str, speed: str) -> None:
    """The guess was a minute, and it took ten seconds: the next one is not expected to take none."""
    taught = []
    for before, now in ((0.0, 6e9), (0.0, 0.0), (6e9, 6e9)):
        estimator, node_view = Estimator(), view_of([node("a", **cast(Any, {speed: now}))]).nodes[NodeId("a")]
        start = Granted(
            request_id=RequestId("r"), model=ModelName("m"), node=NodeId("a"), tier=tier, fingerprint="print",
            size_bytes=60 * 10**9, predicted_s=60.0, moving_s=60.0, granted_s=0.0, is_guess=not before,
        )  # fmt: skip
        start.teach(estimator, 10.1, node_view)
        taught.append(estimator.starts(NodeId("a"), tier, "print"))
    # Where nothing is known still, as of bytes that the page cache had, all of it is the constant.
    assert taught == [0, 1, 1]


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
    assert estimator.leave_s(NodeId("b")) == FIRST_LEAVE_S


def test_no_more_checkpoints_are_remembered_than_may_be() -> None:
    estimator = Estimator(max_checkpoints=2)
    for name in ("x", "y", "z"):
        estimator.learn_start(A, HOST, name, 100, 1.0)
    assert [estimator.starts(A, HOST, name) for name in ("x", "y", "z")] == [0, 1, 1]


def test_answers_teach_what_a_resume_and_a_token_take() -> None:
    times = AnswerTimes()
    for tokens in (10, 500, 1000, 40, 700) * 4:
        answered = Answered(computed_tokens=tokens, prefill_s=0.002 * tokens + 0.1, tokens=11, decode_s=0.5)
        times = learned_answer(times, answered)
    assert times.rising == times.resume.rising == pytest.approx((0.002, 0.1), rel=0.05)
    assert times.token_s == pytest.approx(0.05)
    nothing = Answered(computed_tokens=0, prefill_s=0.0, tokens=1, decode_s=0.0)
    assert learned_answer(times, nothing) == times


@pytest.mark.parametrize(("at_work", "threads", "others"), [(0, 0.4, 0), (2, 0.0, 2), (1, 8.6, 10)])
def test_a_start_has_beside_it_what_wants_the_cores_and_who_is_at_work(
    at_work: int, threads: float, others: int
) -> None:
    assert beside(at_work, threads) == others


@given(
    starts=st.lists(
        st.tuples(st.integers(0, 100), st.floats(0.01, 100.0)),
        min_size=1,
        max_size=60,
    ),
    others=st.integers(0, 100),
)
def test_what_is_expected_is_within_what_was_seen(starts: list[tuple[int, float]], others: int) -> None:
    estimator = Estimator()
    for beside_it, constant_s in starts:
        estimator.learn_start(A, HOST, "x", 100, constant_s, beside_it)
    seen = [constant_s for _, constant_s in starts]
    assert min(seen) <= estimator.constant_s(A, HOST, "x", 100, 0.0, others) <= max(seen)


def test_of_too_many_nodes_the_one_that_was_not_heard_of_for_longest_is_forgotten() -> None:
    estimator = Estimator(max_nodes=2)
    for name in ("a", "b", "a", "c"):
        estimator.learn_start(NodeId(name), HOST, "x", 100, 1.0)
    assert [estimator.starts(NodeId(name), HOST, "x") for name in ("a", "b", "c")] == [2, 0, 1]
    assert estimator.changed == {"a", "b", "c"}
    assert estimator.of_node(NodeId("b")) is None


STARTS = st.lists(
    st.tuples(
        st.sampled_from((HOST, SSD, SOURCE)),
        st.sampled_from(("x", "y", "z")),
        st.floats(-10.0, 100.0),
        st.integers(0, 40),
    ),
    max_size=40,
)


@given(starts=STARTS, left_s=st.none() | st.floats(0.0, 10.0))
def test_what_is_kept_is_all_that_was_learned(starts: list[tuple[str, str, float, int]], left_s: float | None) -> None:
    before, after = Estimator(), Estimator()
    for tier, name, constant_s, others in starts:
        before.learn_start(A, tier, name, 100 + ord(name), constant_s, others)
    if left_s is not None:
        before.learn_leave(A, left_s)
    kept = before.of_node(A)
    assert (kept is None) == (not starts and left_s is None)
    if kept is None:
        return
    read = unpacked(packed(kept))
    assert read == kept
    after.restore(A, read)
    for tier in (HOST, SSD, SOURCE):
        for name in ("x", "y", "z", "another"):
            for others in (0, 1, 2, 4, 8, 16):
                one, other = (it.constant_s(A, tier, name, 300, 5.0, others) for it in (before, after))
                assert one == other
    assert before.leave_s(A) == after.leave_s(A)


def test_what_is_kept_is_bounded_and_does_not_replace_what_is_newer() -> None:
    before, after = Estimator(), Estimator()
    for number in range(200):
        for others in (0, 1, 2, 4, 8, 16) * 5:
            before.learn_start(A, HOST, f"{number:064x}", 100, 1.0 / 3, others)
    kept = before.of_node(A)
    assert kept is not None
    assert len(packed(kept)) < 25_000
    after.learn_start(A, HOST, "x", 100, 0.5)
    after.restore(A, kept)
    assert after.starts(A, HOST, f"{199:064x}") == 0
    full = Estimator(max_nodes=0)
    full.restore(A, kept)
    assert full.starts(A, HOST, f"{199:064x}") == 0


NOTHING: dict[str, Any] = {"version": 1, "leave_s": None, "lines": {}, "starts": []}


@pytest.mark.parametrize(
    "wrong",
    [
        {"version": 2}, {"leave_s": float("nan")}, {"starts": [["ssd", "x", [[float("inf")]]]]}, {"starts": 7},
        {"starts": [["ssd", "x", []]] * 65}, {"lines": {"ssd": [1]}},
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_not(wrong: dict[str, Any]) -> None:
    assert unpacked(msgspec.msgpack.encode(NOTHING)) is not None
    assert unpacked(msgspec.msgpack.encode(NOTHING | wrong)) is None
    assert unpacked(b"\xc1") is None
