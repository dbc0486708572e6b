"""What nobody can better, and what those come to who take requests as they come: `sllm_actor.testing.oracle`."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sllm_actor.testing.oracle import (
    first_come_begins_s,
    least_begins_s,
    mean_waits_s,
)
from sllm_actor.testing.workloads import Arrival
from sllm_actor.testing.world import SYSTEMS, Description, Models, World

WORK = st.lists(st.tuples(st.floats(0, 50), st.floats(0, 20)), max_size=30)
SMALL = World(Description(nodes=2, copies=1, models=(Models(shape="opt-6.7b", count=4),)), SYSTEMS["ours"])
ARRIVALS = st.lists(st.builds(Arrival, st.floats(0, 50), st.integers(0, 3), st.integers(1, 99), st.integers(1, 999)))


def test_the_least_sum_of_begins_is_met_by_a_burst_of_equal_answers_and_by_those_that_find_a_slot() -> None:
    # Four of 2 s on two slots: two begin at once, two behind them.
    assert least_begins_s([(1.0, 2.0)] * 4, 2) == pytest.approx(2 * 1.0 + 2 * 3.0)
    # Each finds a slot free, and what came before a pause does not make up for what comes in a crowd.
    assert least_begins_s([(0.0, 5.0), (4.0, 5.0)], 2) == 4.0
    assert least_begins_s([(0.0, 2.0), *[(100.0, 2.0)] * 4], 2) == pytest.approx(2 * 100.0 + 2 * 102.0)


def test_no_order_of_work_begins_sooner_than_the_bound_says() -> None:
    dice = random.Random(3)
    for _ in range(40):
        work = [(dice.uniform(0, 4), dice.uniform(0.1, 3)) for _ in range(5)]
        best_s = min(sum(_begins_s(order, 2)) for order in itertools.permutations(work))
        assert least_begins_s(work, 2) <= best_s + 1e-9


def _begins_s(order: Sequence[tuple[float, float]], slots: int) -> Iterator[float]:
    free_s = [0.0] * slots
    for release_s, length_s in order:
        begin_s = max(heapq.heappop(free_s), release_s)
        heapq.heappush(free_s, begin_s + length_s)
        yield begin_s


@given(work=WORK, slots=st.integers(1, 5))
@example(work=[(1.5, 5e-324)], slots=1)
def test_those_who_take_work_as_it_comes_never_begin_sooner_than_the_bound_says(
    work: list[tuple[float, float]], slots: int
) -> None:
    begins_s = first_come_begins_s(work, slots)
    assert begins_s == pytest.approx(sum(_begins_s(sorted(work, key=lambda one: one[0]), slots)))
    assert least_begins_s(work, slots) <= begins_s * (1 + 1e-9) + 1e-9


def test_work_is_begun_as_it_comes_however_short_it_is() -> None:
    # One slot has the long one until 10; on the other 0.5 to 1, then 1 to 5, and the last though it is shorter.
    assert first_come_begins_s([(0.0, 10.0), (0.5, 0.5), (0.5, 4.0), (0.75, 1.0)], 2) == 0.0 + 0.5 + 1.0 + 5.0
    # Of those that come at once, whoever is first in the line.
    assert first_come_begins_s([(0.0, 9.0), (0.0, 1.0)], 1) == 9.0
    assert first_come_begins_s([(0.0, 1.0), (0.0, 9.0)], 1) == 1.0
    assert first_come_begins_s([], 3) == 0.0


def test_of_equal_answers_in_one_burst_nobody_could_do_better_than_as_they_come() -> None:
    burst = [Arrival(1.0, 2, 50, 100)] * 24
    least_s, first_come_s, _ = mean_waits_s(SMALL, burst)
    assert first_come_s == pytest.approx(least_s)
    # Eight devices, three answers on each, behind the start of the model.
    speed = SMALL.speed(2)
    whole_s = speed.prefill_s_per_token * 50 + (speed.step_s + speed.row_s) * 99
    assert first_come_s == pytest.approx(mean_waits_s(SMALL, burst[:1]).first_come_s + whole_s)


@given(arrivals=ARRIVALS)
def test_who_takes_requests_as_they_come_has_them_wait_no_less_than_the_oracle(arrivals: list[Arrival]) -> None:
    waits = mean_waits_s(SMALL, arrivals)
    assert waits.least_s <= waits.first_come_s * (1 + 1e-9) + 1e-9


def test_foresight_of_lengths_is_what_tells_the_two_apart() -> None:
    one = World(Description(nodes=1, devices=1, models=(Models(shape="opt-6.7b", count=1),)), SYSTEMS["ours"])
    mixed = [Arrival(0.0, 0, 50, new_tokens) for new_tokens in (1000, 10, 10, 10)]
    waits = mean_waits_s(one, mixed)
    assert waits.first_come_s > 3 * waits.least_s
    assert mean_waits_s(one, mixed[::-1]).first_come_s == pytest.approx(waits.least_s)
    assert mean_waits_s(one, []) == (0.0, 0.0, 0.0)
