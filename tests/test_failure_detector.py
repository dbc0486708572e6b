"""The failure detector: silence is suspicious by how unusual it is, and one's own sleep is no fault of the peer's."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_actor.runtime.failure_detector import HISTORY_INTERVALS, FailureDetector
from sllm_actor.runtime.limits import Limits

LIMITS = Limits()
INTERVAL_S = LIMITS.heartbeat_s
PAUSE_S = LIMITS.acceptable_pause_s
THRESHOLD = LIMITS.phi_threshold


def detector(now_s: float = 0.0) -> FailureDetector:
    return FailureDetector(INTERVAL_S, PAUSE_S, now_s)


def steady(beats: int, jitter_s: float = 0.0) -> tuple[FailureDetector, float]:
    """A detector that has heard so many heartbeats, a little early and a little late in turn; and when the last was."""
    made, now_s = detector(), 0.0
    for beat in range(beats):
        now_s += INTERVAL_S + (jitter_s if beat % 2 else -jitter_s)
        made.heartbeat(now_s)
    return made, now_s


def patience_s(made: FailureDetector, since_s: float) -> float:
    """Find how long a silence the detector bears."""
    silent_s = 0.0
    while made.phi(since_s + silent_s) <= THRESHOLD:
        silent_s += 0.01
        assert silent_s < 1000
    return silent_s


def test_a_peer_that_beats_is_never_suspected() -> None:
    made, now_s = detector(), 0.0
    for _ in range(500):
        now_s += INTERVAL_S
        assert made.phi(now_s) < 1
        made.heartbeat(now_s)


def test_a_peer_that_falls_silent_is_suspected_soon_after_the_acceptable_pause() -> None:
    for made, last_s in (steady(5), steady(500), steady(500, jitter_s=0.2 * INTERVAL_S)):
        assert made.phi(last_s + PAUSE_S) < THRESHOLD
        assert INTERVAL_S + PAUSE_S < patience_s(made, last_s) < PAUSE_S + 2 * INTERVAL_S + 0.02


def test_a_silent_node_is_missed_within_two_seconds_and_one_held_up_for_one_is_not() -> None:
    """It is looked at once an interval, and the last echo may be of an interval ago when a node is held up."""
    for made, last_s in (steady(5), steady(500), steady(500, jitter_s=0.9 * INTERVAL_S)):
        assert made.phi(last_s + 1.0 + INTERVAL_S) < THRESHOLD
        assert made.phi(last_s + 2.0 - INTERVAL_S + 0.001) > THRESHOLD


@pytest.mark.parametrize("silence_s", [0.5, 2.0, 30.0])
def test_a_silence_that_is_asked_for_is_kept_to(silence_s: float) -> None:
    limits = Limits().silent_within(silence_s)
    made = FailureDetector(limits.heartbeat_s, limits.acceptable_pause_s, 0.0)
    assert made.phi(silence_s * 5 / 8) < limits.phi_threshold
    assert made.phi(silence_s - limits.heartbeat_s + 0.001) > limits.phi_threshold


def test_a_peer_that_never_beats_is_suspected_too() -> None:
    assert PAUSE_S < patience_s(detector(100.0), 100.0) < PAUSE_S + 4 * INTERVAL_S


def test_an_irregular_peer_is_borne_with_longer_than_a_regular_one() -> None:
    regular, last_s = steady(100)
    irregular, irregular_last_s = steady(100, jitter_s=0.8 * INTERVAL_S)
    assert patience_s(irregular, irregular_last_s) > patience_s(regular, last_s) + INTERVAL_S / 4


def test_a_heartbeat_ends_the_suspicion() -> None:
    made, last_s = steady(10)
    assert made.phi(last_s + 60) > THRESHOLD
    made.heartbeat(last_s + 60)
    assert made.phi(last_s + 60) < 1


def test_one_long_silence_teaches_nothing() -> None:
    made, last_s = steady(10)
    before_s = patience_s(made, last_s)
    made.heartbeat(last_s + 3600)
    assert math.isclose(patience_s(made, last_s + 3600), before_s, abs_tol=0.02)


def test_time_that_we_slept_ourselves_is_not_held_against_the_peer_and_teaches_nothing() -> None:
    made, last_s = steady(10)
    before_s = patience_s(made, last_s)
    made.excuse(20.0)
    assert math.isclose(patience_s(made, last_s), before_s + 20.0, abs_tol=0.02)
    made.heartbeat(last_s + PAUSE_S)
    assert math.isclose(patience_s(made, last_s + PAUSE_S), before_s, abs_tol=0.02)


def test_old_intervals_are_forgotten() -> None:
    made, now_s = steady(50, jitter_s=0.8 * INTERVAL_S)
    for _ in range(HISTORY_INTERVALS):
        now_s += INTERVAL_S
        made.heartbeat(now_s)
    regular, last_s = steady(HISTORY_INTERVALS + 2)
    assert math.isclose(patience_s(made, now_s), patience_s(regular, last_s), abs_tol=0.02)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 100), max_size=30), st.lists(st.floats(0, 1e6), min_size=2, max_size=10))
def test_suspicion_is_a_number_that_only_grows_with_silence(beats_s: list[float], silences_s: list[float]) -> None:
    made, now_s = detector(), 0.0
    for gap_s in beats_s:
        now_s += gap_s
        made.heartbeat(now_s)
    suspicions = [made.phi(now_s + silent_s) for silent_s in sorted(silences_s)]
    assert not any(math.isnan(phi) or phi < 0 for phi in suspicions)
    assert all(before <= after + 1e-9 for before, after in pairwise(suspicions))
    assert made.phi(now_s + 1e9) == math.inf
