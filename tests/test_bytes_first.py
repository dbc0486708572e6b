"""Which starts have their bytes fetched before a device, and what becomes of them: a node that only fetches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import msgspec
import pytest
from test_scheduler import LIMITS, ask, question, report, scheduler, view
from test_supervision import now_s, virtual_system, virtually

from sllm_actor.actors import Scheduler
from sllm_actor.actors.start_counts import StartCounts
from sllm_actor.domain import RequestId
from sllm_actor.errors import NoCapacity, SourceUnreachable
from sllm_actor.messages.explanation import ExplainPlacement
from sllm_actor.messages.instances import FetchModel, StartProgress, StopInstances
from sllm_actor.messages.placement import InstanceView, NodeReport, PlaceModel
from sllm_actor.policy.bytes_first import AHEAD_S, Arrival
from sllm_actor.runtime import Actor, ActorSystem, handles

MIB = 1024 * 1024
# From afar it comes within ten seconds; its bytes are fetched before that.
FAR_S = 10.0


class Node(Actor):
    """Fetches what it is asked for within `takes_s`, in ten steps, and says so in its next report."""

    def __init__(self, takes_s: float = FAR_S, fails: bool = False) -> None:
        self.takes_s = takes_s
        self.fails = fails
        self.asked: list[str] = []
        self.left = 0
        self.told = node()

    @handles(FetchModel)
    async def fetch(self, message: FetchModel) -> AsyncIterator[StartProgress]:
        self.asked.append(message.model)
        if self.fails:
            raise SourceUnreachable("nobody answers")
        try:
            for step in range(1, 11):
                await asyncio.sleep(self.takes_s / 10)
                yield StartProgress(done_bytes=step, total_bytes=10)
        except (asyncio.CancelledError, GeneratorExit):
            self.left += 1
            raise
        self.tell(msgspec.structs.replace(cast(Any, self.told), host_fingerprints=(message.model,)))

    @handles(StopInstances)
    async def stop(self, message: StopInstances) -> int:
        return 0

    def tell(self, told: NodeReport) -> None:
        self.told = told
        scheduler(self.context.system).tell(told)


def node(*instances: InstanceView, ended: tuple[str, ...] = (), on_ssd: tuple[str, ...] = ("near",)) -> NodeReport:
    return report(slots=1, instances=list(instances), ended=ended, on_ssd=on_ssd)


def far(model: str = "far", timeout_s: float = 100.0) -> PlaceModel:
    wish: PlaceModel = msgspec.structs.replace(
        cast(Any, question(model, timeout_s=timeout_s)), size_bytes=round(FAR_S * 1e8)
    )
    return wish


async def cluster(one: Node, **limited: Any) -> tuple[ActorSystem, StartCounts]:
    system, counts = virtual_system(), StartCounts()
    limits = LIMITS._replace(max_waiting=9, **limited)
    await system.spawn(Scheduler(system.clock, limits, counts), "scheduler")
    await system.spawn(one, "manager")
    one.tell(one.told)
    return system, counts


async def why(system: ActorSystem, request_id: str) -> Any:
    return await scheduler(system).ask(ExplainPlacement(request_id=RequestId(request_id)), timeout_s=5)


@virtually
async def test_a_start_has_its_device_when_its_bytes_are_about_to_be_there() -> None:
    one = Node()
    system, counts = await cluster(one)
    asking, begun_s = asyncio.ensure_future(ask(system, far())), now_s()
    await asyncio.sleep(1.0)
    assert one.asked == ["far"] and (await why(system, "for-far")).outcome == "fetching"
    placement = await asking
    assert now_s() - begun_s == pytest.approx(FAR_S - AHEAD_S, abs=0.1)
    assert placement.fetched_s == pytest.approx(now_s() - begun_s)
    explanation = await why(system, "for-far")
    assert explanation.fetched_s == placement.fetched_s and explanation.chosen.tier == "host memory"
    await asyncio.sleep(1.0)
    assert counts.observe()["fetches"] == {"come": 1} and not one.left
    await system.close()


@virtually
async def test_meanwhile_the_device_is_for_others_and_then_for_who_asked_first() -> None:
    one = Node()
    system, _ = await cluster(one)
    waiting = asyncio.ensure_future(ask(system, far()))
    await asyncio.sleep(1.0)
    begun_s = now_s()
    near = await ask(system, question("near"))
    assert now_s() == begun_s
    one.tell(node(view("near", active=1), ended=(near.placement_id,)))
    later = asyncio.ensure_future(ask(system, question("later")))
    await asyncio.sleep(FAR_S)
    assert not waiting.done() and not later.done()
    one.tell(msgspec.structs.replace(cast(Any, node()), host_fingerprints=("far",)))
    await asyncio.wait([waiting])
    assert not later.done()
    later.cancel()
    await system.close()


@virtually
async def test_what_comes_at_once_or_is_on_the_disk_has_its_device_at_once() -> None:
    one = Node()
    system, _ = await cluster(one)
    placement = await ask(system, msgspec.structs.replace(cast(Any, far("near")), size_bytes=round(1e10)))
    assert not one.asked and placement.fetched_s == 0.0
    one.tell(node(ended=(placement.placement_id,)))
    placement = await ask(system, question("small"))
    assert not one.asked and placement.fetched_s == 0.0
    await system.close()


@virtually
async def test_where_bytes_never_come_first_a_start_has_its_device_at_once() -> None:
    one = Node()
    system, _ = await cluster(one, bytes_first_s=float("inf"))
    placement = await ask(system, far())
    assert not one.asked and placement.fetched_s == 0.0
    await system.close()


@virtually
async def test_who_leaves_ends_the_fetch_and_its_room_is_free() -> None:
    one = Node()
    system, counts = await cluster(one)
    large: PlaceModel = msgspec.structs.replace(cast(Any, far()), host_bytes=100 * MIB)
    asking = asyncio.ensure_future(ask(system, large))
    await asyncio.sleep(1.0)
    assert one.asked == ["far"]
    asking.cancel()
    await asyncio.sleep(0.1)
    assert one.left == 1 and counts.observe()["fetches"] == {"ended": 1}
    begun_s = now_s()
    await ask(system, question("near", host_bytes=100 * MIB))
    assert now_s() == begun_s
    await system.close()


@virtually
async def test_of_two_who_wait_for_it_the_last_one_ends_the_fetch() -> None:
    one = Node()
    system, _ = await cluster(one)
    both = [asyncio.ensure_future(ask(system, far())) for _ in range(2)]
    await asyncio.sleep(1.0)
    both[0].cancel()
    await asyncio.sleep(0.1)
    left_by_first = one.left
    both[1].cancel()
    await asyncio.sleep(0.1)
    assert one.asked == ["far"] and (left_by_first, one.left) == (0, 1)
    await system.close()


@virtually
async def test_where_bytes_can_t_be_fetched_ahead_the_start_has_its_device_first() -> None:
    one = Node(fails=True)
    system, counts = await cluster(one)
    begun_s = now_s()
    await ask(system, far())
    assert one.asked == ["far"] and now_s() - begun_s < 1.0
    assert counts.observe()["fetches"] == {"failed": 1}
    await system.close()


@virtually
async def test_nobody_waits_for_bytes_longer_than_half_of_its_time() -> None:
    """Then it has a device where they are on their way, as the start shares what comes."""
    one = Node(takes_s=1000.0)
    system, _ = await cluster(one)
    begun_s = now_s()
    await ask(system, far(timeout_s=40.0))
    assert 20.0 <= now_s() - begun_s < 23.0 and one.asked == ["far"]
    await system.close()


@virtually
async def test_bytes_that_no_node_has_come_while_all_devices_are_taken() -> None:
    one = Node()
    one.told = node(view("near", active=1))
    system, _ = await cluster(one)
    waiting = asyncio.ensure_future(ask(system, far(timeout_s=30.0)))
    await asyncio.sleep(FAR_S + 1.0)
    assert one.asked == ["far"] and not waiting.done()
    with pytest.raises(NoCapacity):
        await waiting
    assert one.asked == ["far"]
    await system.close()


@virtually
async def test_nothing_is_fetched_any_longer_by_a_node_that_is_cordoned() -> None:
    one = Node()
    system, _ = await cluster(one)
    asking = asyncio.ensure_future(ask(system, far()))
    await asyncio.sleep(1.0)
    one.tell(msgspec.structs.replace(cast(Any, node()), cordoned=True))
    await asyncio.sleep(0.1)
    assert one.left == 1 and not asking.done()
    asking.cancel()
    await system.close()


def test_an_arrival_is_as_expected_until_something_comes_and_then_as_fast_as_that() -> None:
    arrival = Arrival(0.0, 10.0)
    assert arrival.left_s(4.0) == 6.0
    # Nothing has come, so that nothing is about to be there, whatever was expected.
    assert arrival.left_s(20.0) > AHEAD_S
    arrival.hear(0, 100, 20.0)
    arrival.hear(25, 100, 21.0)
    assert arrival.left_s(21.0) == 3.0 and arrival.left_s(23.5) == 0.5
