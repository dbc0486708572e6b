"""What a client that is turned away is told of when to come again: estimates from what was seen, on a clock by hand."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import pytest
from msgspec.structs import replace
from test_scheduler import HandClock, question, report

from sllm_actor.actors.waiting_room import WaitingRoom
from sllm_actor.domain import ModelName
from sllm_actor.errors import QueueFull
from sllm_actor.messages.placement import NodeReport
from sllm_actor.policy.cluster_view import ClusterView
from sllm_actor.policy.node_view import NodeView
from sllm_actor.policy.retrying import LEAST_S, MOST_S, UNKNOWN_S, Pace, placement_s, rest_s
from sllm_actor.units import GIB


def nodes(told: NodeReport) -> Collection[NodeView]:
    view = ClusterView()
    view.hear(told, 0.0)
    return view.nodes.values()


def refused(room: WaitingRoom, model: str) -> float:
    with pytest.raises(QueueFull) as refusal, room.place(ModelName(model)):
        pass
    assert refusal.value.retry_after_s is not None
    return refusal.value.retry_after_s


def test_a_full_queue_tells_how_long_it_took_of_late_until_a_place_was_free() -> None:
    clock = HandClock()
    room = WaitingRoom(clock, max_in_all=2, max_per_model=1)
    with room.place(ModelName("a")):
        assert refused(room, "a") == UNKNOWN_S, "nothing has been seen yet"
    for _ in range(3):
        with room.place(ModelName("a")):
            clock.now_s += 4
    with room.place(ModelName("a")):
        clock.now_s += 4
        assert refused(room, "a") == 4
        with room.place(ModelName("b")):
            assert refused(room, "b") == UNKNOWN_S, "each model has its own"
            assert refused(room, "c") == 4, "and so has the node"


def test_a_pace_is_of_the_last_places_and_slows_down_while_none_becomes_free() -> None:
    pace = Pace()
    for moment_s in range(100):
        pace.note(float(moment_s))
    assert pace.next_s(100.0) == LEAST_S
    assert pace.next_s(100.0 + 16 * 10) == 11.0
    assert pace.next_s(1e9) == MOST_S


def test_a_start_that_found_no_room_is_worth_another_try_when_it_could_have_been_done() -> None:
    asked = question("new")
    assert placement_s(asked, []) == UNKNOWN_S
    assert placement_s(asked, nodes(report())) == UNKNOWN_S, "a small model is not what is waited for"
    large = replace(cast(Any, asked), size_bytes=20 * GIB)
    assert placement_s(large, nodes(report())) == pytest.approx(20 * GIB / 1e9)
    huge = replace(cast(Any, asked), size_bytes=900 * GIB)
    assert placement_s(huge, nodes(report())) == MOST_S


@pytest.mark.parametrize(
    ("done", "total", "elapsed_s", "rest"),
    [(25, 100, 5.0, 15.0), (0, 100, 5.0, UNKNOWN_S), (100, 100, 5.0, LEAST_S), (1, 10**9, 5.0, MOST_S)],
)
def test_the_rest_of_a_start_comes_at_the_pace_of_what_has(
    done: int, total: int, elapsed_s: float, rest: float
) -> None:
    assert rest_s(done, total, elapsed_s) == rest
