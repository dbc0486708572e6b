"""A node's reports, alone: over simulated tiers, on virtual time, to a Scheduler that only listens."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from hearing import Hearing

from sllm_actor.actors.instance import Instance
from sllm_actor.actors.manager_limits import Limits
from sllm_actor.actors.model_manager import ModelManager
from sllm_actor.actors.place import Place
from sllm_actor.actors.prepared import MigrationLimits
from sllm_actor.actors.registry import Registry
from sllm_actor.actors.reporting import (
    BUSY_S,
    ENDED_KEPT,
    ENDED_TOLD_S,
    LOOK_EVERY_S,
    TOGETHER_S,
    TOLD_THREADS,
    Reporting,
)
from sllm_actor.actors.scheduler_way import SchedulerWay
from sllm_actor.actors.start_counts import StartCounts
from sllm_actor.actors.waiting_room import WaitingRoom
from sllm_actor.domain import ModelName, NodeId
from sllm_actor.messages.instances import InstanceActivity, StopInstances
from sllm_actor.messages.placement import NodeReport
from sllm_actor.policy.answer_times import LearnedTimes
from sllm_actor.runtime import ActorSystem
from sllm_actor.testing.simulated_node import model_of
from sllm_actor.testing.simulated_store import MemoryStore
from sllm_actor.testing.simulated_tiers import SimulatedTiers
from sllm_actor.testing.virtual_loop import VirtualLoop, run_virtual

# What an instance takes at once.
MAX_REQUESTS = 3


class Node:
    """A node without instances, and what its reports have told."""

    def __init__(self) -> None:
        self.clock = VirtualLoop.running().clock
        self.system = ActorSystem(clock=self.clock)
        self.hearing = Hearing()
        self.epoch: int | None = 0
        self.place = Place(NodeId("n"), epoch=lambda: self.epoch)

    async def start(self) -> None:
        scheduler = await self.system.spawn(self.hearing, "scheduler")
        tiers = cast(Any, SimulatedTiers({}, (), self.clock, pool_bytes=0, ssd_bytes_per_s=1e9, remote_bytes_per_s=1e9))
        registry = Registry(MemoryStore(self.clock), cast(Any, None), tiers, self.clock)
        limits = Limits(
            max_instances=1, max_requests_per_instance=MAX_REQUESTS, drain_timeout_s=1.0, engine_stop_timeout_s=1.0,
            max_adapters_per_instance=1, migration=cast(MigrationLimits, None), report_every_s=1.0,
        )  # fmt: skip
        way = SchedulerWay(self.clock, 0.0, scheduler)
        self.room = WaitingRoom(self.clock, max_in_all=1, max_per_model=1)
        self.reporting = Reporting(self.place, way, registry, tiers, self.clock, limits, self.room)
        self.manager = ModelManager(
            self.place, way, registry, tiers, cast(Any, None), self.clock, limits, self.room, StartCounts()
        )

    async def told(self) -> NodeReport:
        """Have it report, and give what the Scheduler has heard."""
        self.reporting.tell()
        await self.clock.sleep(0.001)
        return self.hearing.reports[-1]


async def node_with(*instances: Instance) -> Node:
    """Give one that has these, and has told of them."""
    node = Node()
    await node.start()
    node.reporting.begin("manager", {one.instance_id: one for one in instances}, {})
    await node.told()
    return node


def instance_of(instance_id: str) -> Instance:
    model, none = model_of("m", 100, 60.0), cast(Any, SimpleNamespace(host_bytes=lambda _: 0))
    return Instance(instance_id, model, none, none, cast(Any, SimpleNamespace(name="w")), LearnedTimes(), 0.0)


def test_of_an_instance_alone_what_it_works_on_is_told_as_long_as_the_node_is_a_member() -> None:
    async def main() -> None:
        node = Node()
        await node.start()
        one = instance_of("m-1")
        await node.clock.sleep(2.0)
        one.hear(InstanceActivity(instance_id="m-1", active=2, prompt_tokens=7, running_s=1.0), 2.0)
        node.reporting.begin("manager", {"m-1": one}, {})
        node.reporting.tell_of(one)
        node.reporting.tell_of(one)
        await node.clock.sleep(2 * BUSY_S)
        (told,) = node.hearing.changes
        assert (told.node, told.epoch, told.instances) == ("n", 0, (one.view((), told.told_s),))
        assert told.awaited is None
        assert [[view.active for view in report.instances] for report in node.hearing.reports] == [[2]]
        node.epoch = None
        node.reporting.tell_of(one)
        await node.clock.sleep(2 * BUSY_S)
        node.epoch = 7  # Whoever was forgotten with its membership is to be known anew.
        for _ in range(2):
            node.reporting.tell_of(one)
            await node.clock.sleep(2 * BUSY_S)
        assert [report.epoch for report in node.hearing.reports] == [0, 7]
        assert [report.epoch for report in node.hearing.changes] == [0, 7]
        await node.system.close()

    run_virtual(main)


def test_what_changes_within_a_moment_is_told_once_and_not_behind_a_report_of_all() -> None:
    async def main() -> None:
        one, other = instance_of("m-1"), instance_of("m-2")
        node = await node_with(one, other)
        for active in (1, 2, 3):
            one.hear(InstanceActivity(instance_id="m-1", active=active), node.clock.monotonic_s())
            node.reporting.tell_of(one)
            await node.clock.sleep(BUSY_S / 4)
        assert not node.hearing.changes
        await node.clock.sleep(BUSY_S / 2)
        assert [[view.active for view in told.instances] for told in node.hearing.changes] == [[3]]
        node.reporting.tell_of(one)
        await node.told()
        await node.clock.sleep(2 * BUSY_S)
        assert len(node.hearing.changes) == 1
        node.reporting.tell_of(one)
        node.reporting.close()
        await node.clock.sleep(2 * BUSY_S)
        assert len(node.hearing.changes) == 1
        await node.system.close()

    run_virtual(main)


def test_an_instance_that_is_idle_is_told_of_sooner_than_one_that_is_busy_and_takes_what_waits_with_it() -> None:
    async def main() -> None:
        busy, idle = instance_of("m-1"), instance_of("m-2")
        node = await node_with(busy, idle)
        busy.hear(InstanceActivity(instance_id="m-1", active=1), node.clock.monotonic_s())
        node.reporting.tell_of(busy)
        await node.clock.sleep(2 * TOGETHER_S)
        assert not node.hearing.changes
        node.reporting.tell_of(idle)
        await node.clock.sleep(2 * TOGETHER_S)
        assert [[view.active for view in told.instances] for told in node.hearing.changes] == [[1, 0]]
        await node.clock.sleep(2 * BUSY_S)
        assert len(node.hearing.changes) == 1
        await node.system.close()

    run_virtual(main)


def test_an_instance_of_which_more_is_asked_than_it_takes_is_told_of_as_soon() -> None:
    """What it has still to do when one of these has ended can wait."""

    async def main() -> None:
        one = instance_of("m-1")
        node = await node_with(one)
        told = []
        for active in (MAX_REQUESTS, MAX_REQUESTS + 2, MAX_REQUESTS + 1):
            one.hear(InstanceActivity(instance_id="m-1", active=active), node.clock.monotonic_s())
            node.reporting.tell_of(one)
            await node.clock.sleep(2 * TOGETHER_S)
            told.append([change.instances[0].active for change in node.hearing.changes])
            await node.clock.sleep(2 * BUSY_S)
        assert told == [[], [MAX_REQUESTS, MAX_REQUESTS + 2], [MAX_REQUESTS, MAX_REQUESTS + 2]]
        # Nor is it urgent that another one has come in the place of one that has ended, and was not told of.
        node.hearing.changes.clear()
        for active in (MAX_REQUESTS, MAX_REQUESTS + 1):
            one.hear(InstanceActivity(instance_id="m-1", active=active), node.clock.monotonic_s())
            node.reporting.tell_of(one)
        await node.clock.sleep(2 * TOGETHER_S)
        assert not node.hearing.changes
        await node.system.close()

    run_virtual(main)


def test_how_many_wait_for_a_start_is_told_by_itself_and_with_what_instances_work_on() -> None:
    async def main() -> None:
        one = instance_of("m-1")
        node = await node_with(one)
        with node.room.start(ModelName("a")):
            with node.room.start(ModelName("a")), node.room.start(ModelName("a")):
                await node.clock.sleep(2 * TOGETHER_S)
            node.reporting.tell_of(one)
        await node.clock.sleep(2 * TOGETHER_S)
        assert [(len(told.instances), told.awaited) for told in node.hearing.changes] == [(0, {"a": 2}), (1, {})]
        assert [report.awaited for report in node.hearing.reports] == [{}, {}]
        await node.system.close()

    run_virtual(main)


def test_all_is_told_again_when_nothing_of_it_was_told_for_as_long_as_was_said() -> None:
    async def main() -> None:
        node = Node()
        await node.start()
        node.reporting.begin("manager", {}, {})
        telling = asyncio.ensure_future(node.reporting.keep_telling())
        begin_s = node.clock.monotonic_s()
        await node.clock.sleep(0.6)
        await node.told()
        await node.clock.sleep(2.5)
        assert [round(report.told_s - begin_s, 6) for report in node.hearing.reports] == [0.0, 0.6, 1.6, 2.6]
        telling.cancel()
        await node.system.close()

    run_virtual(main)


def test_all_is_told_again_as_soon_as_other_threads_want_the_cores() -> None:
    async def main() -> None:
        node = Node()
        await node.start()
        threads = 0.0
        node.place.core_threads = lambda: threads
        node.reporting.begin("manager", {}, {})
        telling = asyncio.ensure_future(node.reporting.keep_telling())
        await node.clock.sleep(0.1)
        threads = TOLD_THREADS
        await node.clock.sleep(LOOK_EVERY_S)
        assert [report.core_threads for report in node.hearing.reports] == [0.0, TOLD_THREADS]
        telling.cancel()
        await node.system.close()

    run_virtual(main)


def test_who_asks_for_an_idle_instance_that_is_none_hears_how_the_node_is_before_the_answer() -> None:
    async def main() -> None:
        node = Node()
        await node.start()
        manager = await node.system.spawn(node.manager, "model-manager")
        await node.clock.sleep(0.001)
        begun = len(node.hearing.reports)
        for only_idle, more in ((False, 0), (True, 1)):
            wish = StopInstances(model=ModelName("m"), instance_id="m-1", only_idle=only_idle)
            assert await manager.ask(wish, timeout_s=1.0) == 0
            assert len(node.hearing.reports) == begun + more
        await node.system.close()

    run_virtual(main)


def test_starts_that_ended_are_told_again_for_a_while_and_then_no_more() -> None:
    async def main() -> None:
        node = Node()
        await node.start()
        node.reporting.ended("placement-1", failed=True)
        await node.clock.sleep(ENDED_TOLD_S / 2)
        node.reporting.ended("placement-2", failed=False)
        both = await node.told()
        assert (both.ended_placements, both.failed_placements) == (("placement-1", "placement-2"), ("placement-1",))
        await node.clock.sleep(ENDED_TOLD_S / 2)
        later = await node.told()
        assert (later.ended_placements, later.failed_placements) == (("placement-2",), ())
        await node.system.close()

    run_virtual(main)


def test_of_many_starts_that_ended_the_last_are_told() -> None:
    async def main() -> None:
        node = Node()
        await node.start()
        for number in range(ENDED_KEPT + 2):
            node.reporting.ended(f"placement-{number}", failed=number < 2)
        report = await node.told()
        assert report.ended_placements == tuple(f"placement-{number}" for number in range(2, ENDED_KEPT + 2))
        assert report.failed_placements == ()
        await node.system.close()

    run_virtual(main)
