"""When requests begin if it is known when each place will be free: `sllm_actor.testing.on_demand`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_actor.testing.on_demand import on_demand_begins_s
from sllm_actor.testing.oracle import mean_waits_s
from sllm_actor.testing.workloads import Arrival
from sllm_actor.testing.world import SYSTEMS, Description, Models, World, changed

# Two nodes of four devices; the SSD of the first has models 0 and 2, that of the second has 1 and 3.
SMALL = Description(nodes=2, copies=1, models=(Models(shape="opt-6.7b", count=4),))
SIZE = World(SMALL, SYSTEMS["ours"]).models[0].size_bytes
SSD_S, SOURCE_S, COPY_S, ATTACH_S = SIZE / 6e9, SIZE / 1.25e9, SIZE / 25e9, 0.1


def begins_s(arrivals: list[Arrival], changes: str = "") -> list[float]:
    return list(on_demand_begins_s(World(changed(SMALL, changes), SYSTEMS["ours"]), arrivals))


def length_s(one: Arrival) -> float:
    speed = World(SMALL, SYSTEMS["ours"]).speed(one.model)
    return speed.prefill_s_per_token * one.prompt_tokens + (speed.step_s + speed.row_s) * (one.new_tokens - 1)


def test_the_first_start_takes_what_its_bytes_do_and_the_others_on_its_node_come_with_it() -> None:
    one = Arrival(0.0, 0, 50, 100)
    # Whoever finds no device there waits for one sooner than for its bytes from afar.
    assert SSD_S + ATTACH_S + length_s(one) < SOURCE_S
    assert begins_s([one] * 5) == pytest.approx([SSD_S + ATTACH_S] * 4 + [SSD_S + ATTACH_S + length_s(one)])
    long = Arrival(0.0, 0, 50, 1000)
    assert begins_s([long] * 5) == pytest.approx([SSD_S + ATTACH_S] * 4 + [SOURCE_S + ATTACH_S])
    # Where two have to be read by one disk, one comes behind the other; two disks read at once.
    assert begins_s([one, Arrival(0.0, 2, 50, 100)]) == pytest.approx([SSD_S + ATTACH_S, 2 * SSD_S + ATTACH_S])
    assert begins_s([one, Arrival(0.0, 1, 50, 100)]) == pytest.approx([SSD_S + ATTACH_S] * 2)


def test_an_instance_stays_for_its_keep_alive_and_its_bytes_in_host_memory_for_longer() -> None:
    first = Arrival(0.0, 0, 50, 100)
    end_s = SSD_S + ATTACH_S + length_s(first)
    for later_s, takes_s in ((end_s + 0.9 * SSD_S, 0.0), (end_s + 1.1 * SSD_S, COPY_S + ATTACH_S)):
        assert begins_s([first, Arrival(later_s, 0, 50, 100)])[1] == pytest.approx(later_s + takes_s)
    # Host memory has room for one model, and has given the other one up.
    others = [first, Arrival(20.0, 2, 50, 100), Arrival(40.0, 0, 50, 100)]
    assert begins_s(others)[2] == pytest.approx(40.0 + COPY_S + ATTACH_S)
    assert begins_s(others, f"host_pool_bytes={1.5 * SIZE}")[2] == pytest.approx(40.0 + SSD_S + ATTACH_S)


def test_a_start_begins_where_the_soonest_of_all_answers_ends() -> None:
    """One node of one device, which has both models in host memory in the end."""
    few = "nodes=1,devices=1,keep_alive_s=60"
    long, short = Arrival(50.0, 0, 50, 500), Arrival(50.1, 2, 50, 10)
    warm = [Arrival(0.0, 0, 50, 10), Arrival(20.0, 2, 50, 10), Arrival(40.0, 0, 50, 10)]
    *_, last_s = begins_s([*warm, long, short], few)
    assert last_s == pytest.approx(50.0 + length_s(long) + COPY_S + ATTACH_S)
    # Of two devices the other one is idle, and its model leaves at once.
    *_, last_s = begins_s([*warm, long, short._replace(model=1)], few.replace("devices=1", "devices=2"))
    assert last_s == pytest.approx(50.1 + SSD_S + ATTACH_S)


def test_an_instance_answers_as_many_at_once_as_it_takes() -> None:
    burst = [Arrival(0.0, 0, 50, 100)] * 3
    one_device = "nodes=1,devices=1,concurrency=2"
    assert begins_s(burst, one_device) == pytest.approx(
        [SSD_S + ATTACH_S] * 2 + [SSD_S + ATTACH_S + length_s(burst[0])]
    )


@given(st.lists(st.builds(Arrival, st.floats(0, 50), st.integers(0, 3), st.integers(1, 99), st.integers(1, 999))))
def test_it_is_a_schedule_that_the_oracle_can_not_be_worse_than(arrivals: list[Arrival]) -> None:
    for changes in ("", "copies=0", "concurrency=3,keep_alive_s=0", "nodes=1,devices=1,host_pool_bytes=15e9"):
        waits = mean_waits_s(World(changed(SMALL, changes), SYSTEMS["ours"]), arrivals)
        assert waits.least_s <= waits.on_demand_s * (1 + 1e-9) + 1e-9
