"""A node that is to be empty gives up what it is starting, and asks what does not stop from time to time only."""

from __future__ import annotations

import asyncio

import pytest
from test_supervision import now_s, virtual_system, virtually

from sllm_actor.actors.node_keeper import NODE_KEEPER, PAUSE_S, NodeKeeper
from sllm_actor.actors.place import Place
from sllm_actor.actors.under_way import UnderWay
from sllm_actor.domain import ModelName, NodeId
from sllm_actor.errors import Draining
from sllm_actor.messages.instances import EndStarts, InstanceStatus, ListInstances, StopInstances
from sllm_actor.messages.migration import MoveAway
from sllm_actor.messages.operations import CordonNode, DrainNode, NoticeNode, NoticeTaken
from sllm_actor.messages.placement import ReportNow
from sllm_actor.runtime import Actor, ActorSystem, handles
from sllm_actor.testing.simulated_store import MemoryStore

RUNNING = InstanceStatus(
    instance_id="m-1", model=ModelName("m"), node=NodeId("n"), pid=1, active=2, size_bytes=9, expires_in_s=0.0,
    late_imports=(),
)  # fmt: skip


class Manager(Actor):
    """Has starts that take a while to end, and an instance that is listed for a while; a coordinator, too."""

    def __init__(self, starts: int = 0, listed_s: float = 0.0) -> None:
        self.starts = starts
        self.listed_until_s = now_s() + listed_s
        self.asked = 0

    @handles(ReportNow)
    async def report_now(self, _: ReportNow) -> None: ...

    @handles(EndStarts)
    async def end_starts(self, _: EndStarts) -> int:
        ended, self.starts = self.starts, max(0, self.starts - 1)
        return ended

    @handles(ListInstances)
    async def list_instances(self, _: ListInstances) -> tuple[InstanceStatus, ...]:
        return (RUNNING,) if now_s() < self.listed_until_s else ()

    @handles(StopInstances)
    async def stop(self, _: StopInstances) -> int:
        self.asked += 1
        return 0

    @handles(MoveAway)
    async def move_away(self, _: MoveAway) -> int:
        return 1


async def kept(manager: Manager) -> tuple[ActorSystem, Place]:
    system, place = virtual_system(), Place(NodeId("n"))
    ref = await system.spawn(manager, "model-manager")
    await system.spawn(manager.__class__(), "migration-coordinator")
    keeper = NodeKeeper(place, MemoryStore(system.clock), ref, system.clock, ask_timeout_s=5.0, stop_timeout_s=60.0)
    await system.spawn(keeper, NODE_KEEPER)
    return system, place


@virtually
async def test_a_drain_lasts_until_no_start_is_under_way_any_more() -> None:
    manager = Manager(starts=3)
    system, place = await kept(manager)
    assert await system.ref(NODE_KEEPER).ask(DrainNode(), timeout_s=60.0) == 0
    assert manager.starts == 0
    assert place.cordoned
    await system.close()


@virtually
async def test_an_instance_that_stays_listed_is_asked_now_and_then() -> None:
    manager = Manager(listed_s=3.0)
    system, _ = await kept(manager)
    await system.ref(NODE_KEEPER).ask(DrainNode(), timeout_s=60.0)
    assert 1 < manager.asked <= 3.0 / PAUSE_S + 1
    await system.close()


@virtually
async def test_a_notice_is_over_when_its_time_is_and_says_what_is_left() -> None:
    system, place = await kept(Manager(listed_s=100.0))
    begun_s = now_s()
    taken: NoticeTaken = await system.ref(NODE_KEEPER).ask(NoticeNode(seconds=5.0), timeout_s=60.0)
    assert now_s() - begun_s == pytest.approx(5.0)
    assert (taken.stopped, taken.left, place.cordoned) == (0, 2, True)
    await system.close()


@virtually
async def test_nothing_begins_on_a_cordoned_node() -> None:
    system, place = await kept(Manager())
    await system.ref(NODE_KEEPER).ask(CordonNode(cordoned=True), timeout_s=60.0)
    with pytest.raises(Draining):
        place.check(0)
    await system.ref(NODE_KEEPER).ask(CordonNode(cordoned=False), timeout_s=60.0)
    place.check(0)
    await system.close()


async def test_a_start_that_is_given_up_says_so_and_one_whose_asker_leaves_is_cancelled() -> None:
    under_way = UnderWay()

    async def start(placement_id: str) -> None:
        with under_way.going(placement_id, ModelName("m")):
            await asyncio.Event().wait()

    given_up, left = asyncio.ensure_future(start("p1")), asyncio.ensure_future(start("p2"))
    await asyncio.sleep(0)
    assert under_way.models == {"p1": "m", "p2": "m"}
    left.cancel()
    await asyncio.wait([left])
    assert left.cancelled()
    assert under_way.end() == 1
    with pytest.raises(Draining):
        await given_up
    assert (under_way.models, under_way.end()) == ({}, 0)
