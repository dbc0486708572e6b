"""What leaves a node so that a model fits: as cheap as the cheapest of all subsets."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st
from test_placement import instance

from sllm_actor.policy.room import Cost, Occupant, cheapest_to_leave


def occupant(name: str, seconds: float, *, slots: int = 1, host_bytes: int = 1, loss: int = 0) -> Occupant:
    return Occupant(instance(name, host_bytes=host_bytes, slots=slots), Cost(seconds, loss))


def names(chosen: tuple[Occupant, ...] | None) -> list[str]:
    assert chosen is not None
    return sorted(one.instance.instance_id for one in chosen)


def test_one_that_spans_two_devices_is_cheaper_than_two_that_have_one_each() -> None:
    pair = [occupant("x", 3.0), occupant("y", 3.0)]
    assert names(cheapest_to_leave([*pair, occupant("wide", 5.0, slots=2)], 2, 0)) == ["wide"]
    assert names(cheapest_to_leave([*pair, occupant("wide", 7.0, slots=2)], 2, 0)) == ["x", "y"]


def test_memory_counts_beside_devices() -> None:
    small, large = occupant("small", 1.0, host_bytes=1), occupant("large", 2.0, host_bytes=5)
    assert names(cheapest_to_leave([small, large], 1, 1)) == ["small"]
    assert names(cheapest_to_leave([small, large], 1, 5)) == ["large"]
    assert names(cheapest_to_leave([small, large], 1, 6)) == ["large", "small"]


def test_nothing_leaves_where_nothing_is_missing_and_all_are_not_enough_where_too_much_is() -> None:
    one = occupant("one", 1.0)
    assert cheapest_to_leave([one], 0, 0) == ()
    assert cheapest_to_leave([one], -3, -10) == ()
    assert cheapest_to_leave([one], 2, 0) is None
    assert cheapest_to_leave([one], 1, 2) is None
    assert cheapest_to_leave([], 10**12, 0) is None


def test_of_equal_costs_in_time_the_lesser_loss_decides() -> None:
    assert names(cheapest_to_leave([occupant("a", 0.0, loss=2), occupant("b", 0.0, loss=1)], 1, 0)) == ["b"]


occupants = st.lists(
    st.builds(
        lambda seconds, slots, host_bytes, loss: occupant(
            "i", float(seconds), slots=slots, host_bytes=host_bytes, loss=loss
        ),
        st.integers(0, 20), st.integers(0, 4), st.integers(0, 9), st.integers(0, 3),
    ),
    max_size=8,
)  # fmt: skip


def cost_of(chosen: tuple[Occupant, ...]) -> Cost:
    return Cost(sum(one.cost.seconds for one in chosen), sum(one.cost.loss for one in chosen))


@given(occupants, st.integers(0, 8), st.integers(0, 30))
def test_the_choice_costs_what_the_best_of_all_subsets_costs(
    there: list[Occupant], slots: int, host_bytes: int
) -> None:
    enough = [
        subset
        for size in range(len(there) + 1)
        for subset in itertools.combinations(there, size)
        if sum(one.instance.slots for one in subset) >= slots
        and sum(one.instance.host_bytes for one in subset) >= host_bytes
    ]
    chosen = cheapest_to_leave(there, slots, host_bytes)
    if not enough:
        assert chosen is None
        return
    assert chosen is not None
    assert sum(one.instance.slots for one in chosen) >= slots
    assert sum(one.instance.host_bytes for one in chosen) >= host_bytes
    assert cost_of(chosen) == min(cost_of(subset) for subset in enough)


@given(occupants, st.integers(0, 8), st.integers(0, 30))
def test_with_few_ways_kept_it_still_finds_one_wherever_there_is_one(
    there: list[Occupant], slots: int, host_bytes: int
) -> None:
    exact, bounded = (cheapest_to_leave(there, slots, host_bytes, max_ways=ways) for ways in (64, 2))
    assert (exact is None) == (bounded is None)
    if bounded is not None:
        assert sum(one.instance.slots for one in bounded) >= slots
        assert sum(one.instance.host_bytes for one in bounded) >= host_bytes
