"""Two models and one place: they do not push each other out with every request."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import msgspec
import pytest
from test_scheduler import LIMITS, Manager, question, report, scheduler, view
from test_supervision import now_s, virtual_system, virtually

from sllm_actor.actors import Scheduler
from sllm_actor.actors.start_counts import StartCounts
from sllm_actor.domain import NodeId
from sllm_actor.messages.placement import InstanceView, Placement
from sllm_actor.policy.taking_turns import FIRST_REQUEST_S, TakingTurns
from sllm_actor.runtime import ActorSystem

HOLD_S = 2.0


class House:
    """One node with one place, and two models that want it; each start is over as soon as it is granted."""

    def __init__(self, made: ActorSystem, manager: Manager) -> None:
        self.made = made
        self.manager = manager
        self.starts = 0

    async def ask(self, model: str, *, comes: bool = True) -> float:
        """Ask for a model that does not run, have it started, and give how long its place took to come.

        The request that it is started for is answered at once where it `comes`.
        """
        begin_s = now_s()
        wish = question(model, timeout_s=60.0)
        placement: Placement = await scheduler(self.made).ask(wish, timeout_s=100)
        waited_s = now_s() - begin_s
        self.starts += 1
        for active in (0, 1, 0) if comes else (0,):
            self.tell(model, active, placement.placement_id)
        return waited_s

    def tell(self, model: str, active: int, *ended: str) -> None:
        """Tell how many requests the last instance has."""
        running: InstanceView = msgspec.structs.replace(
            cast(Any, view(f"{model}{self.starts}")), model=model, active=active
        )
        self.manager.report = report(slots=1, instances=[running], ended=ended, on_ssd=("a", "b"))
        scheduler(self.made).tell(self.manager.report)


async def house(hold_s: float) -> House:
    made = virtual_system()
    limits = LIMITS._replace(switch_hold_s=hold_s)
    await made.spawn(Scheduler(made.clock, limits, StartCounts()), "scheduler")
    manager = Manager(report(slots=1, on_ssd=("a", "b")))
    await made.spawn(manager, "manager")
    scheduler(made).tell(manager.report)
    return House(made, manager)


@virtually
async def test_the_first_switches_are_free_and_then_each_keeps_its_place_for_a_while() -> None:
    here = await house(HOLD_S)
    waited = [await here.ask(model) for model in "abababab"]
    assert waited[:3] == [0.0, 0.0, 0.0]
    assert waited[3:] == [pytest.approx(HOLD_S)] * 5
    await here.made.close()


@virtually
async def test_without_a_hold_every_request_takes_the_place() -> None:
    here = await house(0.0)
    assert [await here.ask(model) for model in "abababab"] == [0.0] * 8
    await here.made.close()


@virtually
async def test_a_model_that_comes_back_after_long_is_not_held() -> None:
    here = await house(HOLD_S)
    for model in "aba":
        assert await here.ask(model) == 0.0
    await here.made.clock.sleep(60.0)
    for model in "ba":
        assert await here.ask(model) == 0.0
        await here.made.clock.sleep(60.0)
    await here.made.close()


@virtually
async def test_an_instance_makes_no_room_before_its_first_request_has_come_whatever_the_hold() -> None:
    here = await house(0.0)
    assert await here.ask("a", comes=False) == 0.0
    asked = asyncio.ensure_future(here.ask("b"))
    await here.made.clock.sleep(FIRST_REQUEST_S / 2)
    here.tell("a", 1)
    await here.made.clock.sleep(FIRST_REQUEST_S / 4)
    assert not asked.done()
    here.tell("a", 0)
    assert await asked == pytest.approx(FIRST_REQUEST_S * 3 / 4)
    await here.made.close()


@virtually
async def test_an_instance_that_nobody_comes_to_makes_room_after_a_while() -> None:
    here = await house(0.0)
    assert await here.ask("a", comes=False) == 0.0
    assert await here.ask("b") == pytest.approx(FIRST_REQUEST_S)
    await here.made.close()


def test_what_a_node_reports_first_is_not_new_to_who_begins_to_lead() -> None:
    turns = TakingTurns(HOLD_S)
    assert not list(turns.newcomers(report(slots=2, instances=[view("a")]), 0.0))
    assert list(turns.newcomers(report(slots=2, instances=[view("a"), view("b")]), 1.0)) == [("b-1", 0.0)]
    assert turns.is_unasked(NodeId("node-1"), "b-1") and not turns.is_unasked(NodeId("node-1"), "a-1")
    turns.forget(NodeId("node-1"))
    assert not turns.is_unasked(NodeId("node-1"), "b-1")


def test_a_first_request_that_has_come_and_gone_between_two_reports_is_one() -> None:
    turns, node = TakingTurns(HOLD_S), NodeId("node-1")
    assert not list(turns.newcomers(report(instances=[]), 0.0))
    assert list(turns.newcomers(report(instances=[view("b", idle_since_s=1.0)]), 1.0)) == [("b-1", 0.0)]
    assert not turns.asked(node, view("b", idle_since_s=1.0), 2.0) and turns.is_unasked(node, "b-1")
    assert turns.asked(node, view("b", idle_since_s=2.5), 3.0) and not turns.is_unasked(node, "b-1")
    assert not turns.asked(node, view("b", active=1), 4.0)
