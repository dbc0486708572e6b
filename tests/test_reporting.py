"""A node's reports, alone: over simulated tiers, on virtual time, to a Scheduler that only listens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from hearing import Hearing

from sllm_actor.actors.instance import Instance
from sllm_actor.actors.manager_limits import Limits
from sllm_actor.actors.place import Place
from sllm_actor.actors.prepared import MigrationLimits
from sllm_actor.actors.registry import Registry
from sllm_actor.actors.reporting import ENDED_KEPT, ENDED_TOLD_S, TOGETHER_S, Reporting
from sllm_actor.actors.scheduler_way import SchedulerWay
from sllm_actor.actors.waiting_room import WaitingRoom
from sllm_actor.domain import NodeId
from sllm_actor.messages.instances import InstanceActivity
from sllm_actor.messages.placement import NodeReport
from sllm_actor.policy.answer_times import LearnedTimes
from sllm_actor.runtime import ActorSystem
from sllm_actor.testing.simulated_node import model_of
from sllm_actor.testing.simulated_tiers import SimulatedTiers
from sllm_actor.testing.virtual_loop import VirtualLoop, run_virtual


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
        registry = Registry(cast(Any, None), cast(Any, None), tiers, self.clock)
        limits = Limits(
            max_instances=1, max_requests_per_instance=1, drain_timeout_s=1.0, engine_stop_timeout_s=1.0,
            max_adapters_per_instance=1, migration=cast(MigrationLimits, None), report_every_s=1.0,
        )  # fmt: skip
        way = SchedulerWay(self.clock, 0.0, scheduler)
        room = WaitingRoom(self.clock, max_in_all=1, max_per_model=1)
        self.reporting = Reporting(self.place, way, registry, tiers, self.clock, limits, room)

    async def told(self) -> NodeReport:
        """Have it report, and give what the Scheduler has heard."""
        self.reporting.tell()
        await self.clock.sleep(0.001)
        return self.hearing.reports[-1]


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
        await node.clock.sleep(2 * TOGETHER_S)
        (told,) = node.hearing.of_instances
        assert (told.node, told.epoch, told.instance) == ("n", 0, one.view((), told.told_s))
        assert [[view.active for view in report.instances] for report in node.hearing.reports] == [[2]]
        node.epoch = None
        node.reporting.tell_of(one)
        await node.clock.sleep(2 * TOGETHER_S)
        node.epoch = 7  # Whoever was forgotten with its membership is to be known anew.
        for _ in range(2):
            node.reporting.tell_of(one)
            await node.clock.sleep(2 * TOGETHER_S)
        assert [report.epoch for report in node.hearing.reports] == [0, 7]
        assert [report.epoch for report in node.hearing.of_instances] == [0, 7]
        await node.system.close()

    run_virtual(main)


def test_what_changes_within_a_moment_is_told_once_and_not_behind_a_report_of_all() -> None:
    async def main() -> None:
        node = Node()
        await node.start()
        one, other = instance_of("m-1"), instance_of("m-2")
        node.reporting.begin("manager", {"m-1": one, "m-2": other}, {})
        await node.told()
        for active in (1, 2, 3):
            one.hear(InstanceActivity(instance_id="m-1", active=active), node.clock.monotonic_s())
            node.reporting.tell_of(one)
            node.reporting.tell_of(other)
            await node.clock.sleep(TOGETHER_S / 4)
        assert not node.hearing.of_instances
        await node.clock.sleep(TOGETHER_S)
        assert [(told.instance.instance_id, told.instance.active) for told in node.hearing.of_instances] == [
            ("m-1", 3), ("m-2", 0),
        ]  # fmt: skip
        node.reporting.tell_of(one)
        await node.told()
        await node.clock.sleep(2 * TOGETHER_S)
        assert len(node.hearing.of_instances) == 2
        node.reporting.tell_of(one)
        node.reporting.close()
        await node.clock.sleep(2 * TOGETHER_S)
        assert len(node.hearing.of_instances) == 2
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
