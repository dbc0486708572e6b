"""Only what generates is moved: requests that wait for a slot of an instance which leaves ask another one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from sllm_actor.actors.inference_worker import InferenceWorker
from sllm_actor.actors.migration_coordinator import MigrationCoordinator
from sllm_actor.actors.node_keeper import COORDINATOR, NODE_KEEPER
from sllm_actor.actors.slots import Slots
from sllm_actor.domain import NodeId, RequestId
from sllm_actor.errors import Conflict, Draining, MigrationFailed, SllmError
from sllm_actor.messages.instances import InstanceStarted
from sllm_actor.messages.migration import HandedOver, InstanceMoved, MigrateOut, MigrateRequest, MoveInstance
from sllm_actor.messages.operations import CordonNode, DrainNode
from sllm_actor.messages.placement import RunsAlready
from sllm_actor.runtime.cell import Cell
from sllm_actor.testing.cluster_witness import Asked
from sllm_actor.testing.process_loop import ProcessLoop
from sllm_actor.testing.simulated_cluster import Plan, SimulatedCluster
from sllm_actor.testing.simulated_node import SimulatedNode
from sllm_actor.testing.virtual_loop import run_virtual

# An instance has two slots.
ASKED, GENERATING = 5, 2
LONG = Plan(nodes=2, models=1, moves=1, max_tokens=400)
PATIENCE_S = 60.0


class Crowded:
    """An instance with more requests than slots, and another node."""

    def __init__(self, requests: int = ASKED) -> None:
        self.requests = requests
        self.cluster = SimulatedCluster(1, LONG)
        self.streams: list[asyncio.Task[None]] = []

    async def begin(self) -> None:
        """Ask until some generate and the others wait."""
        cluster = self.cluster
        await cluster.start_all()
        await cluster.clock.sleep(2.0)
        gateway = cluster.nodes["n1"]
        self.streams = [cluster.ask(number, gateway, "m1", cluster.dice) for number in range(self.requests)]
        await self.until(lambda: len(self.generating()) == GENERATING and len(self.worker()._live) == self.requests)
        assert len(self.waiting()) == self.requests - GENERATING

    async def until(self, holds: Callable[[], bool]) -> None:
        until_s = self.cluster.clock.monotonic_s() + PATIENCE_S
        while not holds():
            assert self.cluster.clock.monotonic_s() < until_s, "it never came true"
            await self.cluster.clock.sleep(0.01)

    def _cells(self) -> list[tuple[SimulatedNode, Cell]]:
        return [
            (node, cell)
            for node in self.cluster.living()
            for cell in node.system.cells.values()
            if isinstance(cell.actor, InferenceWorker)
        ]

    def source(self) -> tuple[SimulatedNode, InferenceWorker]:
        (found,) = self._cells()
        worker = found[1].actor
        assert isinstance(worker, InferenceWorker)
        return found[0], worker

    def worker(self) -> InferenceWorker:
        return self.source()[1]

    def asked(self) -> list[Asked]:
        return self.cluster.witness.asked

    def generating(self) -> list[RequestId]:
        return [one.request.request_id for one in self.asked() if one.taken and not one.outcome]

    def waiting(self) -> list[RequestId]:
        return [one.request.request_id for one in self.asked() if not one.taken and not one.outcome]

    async def started_elsewhere(self) -> InstanceStarted:
        """Have an instance come up at the other node."""
        node, _ = self.source()
        coordinator = node.actor(COORDINATOR)
        assert isinstance(coordinator, MigrationCoordinator)
        instance, _ = await coordinator._starting.start(
            node.system, RequestId("elsewhere"), self.asked()[0].request.model, "", lambda: (0, ()),
            not_on=(NodeId(node.name),),
        )  # fmt: skip
        return instance

    async def end(self) -> None:
        """See every answer end as it should."""
        await asyncio.wait(self.streams)
        assert [one.outcome for one in self.asked()] == ["finished"] * self.requests
        assert self.cluster.witness.problems == []
        for name in self.cluster.names:
            await self.cluster.leave(name)
        await self.cluster.bury()
        await self.cluster.truth.close()


def crowded(test: Callable[[Crowded], Awaitable[None]], requests: int = ASKED) -> None:
    async def main() -> None:
        made = Crowded(requests)
        await made.begin()
        await test(made)
        await made.end()

    run_virtual(main, kind=ProcessLoop)


def test_an_instance_that_moves_takes_only_what_generates_and_the_others_ask_elsewhere() -> None:
    async def move(made: Crowded) -> None:
        there = await made.started_elsewhere()
        (node, cell), *_ = [found for found in made._cells() if found[0].name != there.node]
        worker: Any = cell.actor
        generating, waiting = made.generating(), made.waiting()
        assert len(generating) == GENERATING
        to = RunsAlready(
            model=there.model, instance_id=there.instance_id, node=there.node, worker=there.worker,
            address=there.address,
        )  # fmt: skip
        wish: Any = MoveInstance(
            instance_id=worker._instance_id, worker=cell.name, model=there.model, to=to
        )  # fmt: skip
        moved: InstanceMoved = await node.system.ref(COORDINATOR).ask(wish, timeout_s=30.0)
        assert {one.request_id for one in moved.answers} == set(generating)
        assert set(waiting) & {one.request.request_id for one in made.asked() if not one.outcome}
        assert [found[0].name for found in made._cells()] == [there.node]
        assert node.parts.migrations.aborted == 0

    crowded(move)


def test_a_drained_node_does_not_begin_what_waited_there() -> None:
    async def drain(made: Crowded) -> None:
        node, worker = made.source()
        generating, waiting = made.generating(), made.waiting()
        await node.system.ref(NODE_KEEPER).ask(DrainNode(), timeout_s=30.0)
        assert worker._live == {}
        assert made.generating() == generating, "it was empty before its answers ended"
        assert made.waiting() == waiting

    crowded(drain)


def test_one_that_waits_for_a_slot_is_not_moved_by_itself_either() -> None:
    async def refused(made: Crowded) -> None:
        node, _ = made.source()
        await made.started_elsewhere()
        waiting = made.waiting()[0]
        with pytest.raises(MigrationFailed, match="waits for a slot"):
            await node.system.ref(COORDINATOR).ask(MigrateRequest(request_id=waiting, to=NodeId("")), timeout_s=30.0)

    crowded(refused)


def test_two_who_wish_an_answer_moved_to_one_node_both_see_it_go_there_and_a_third_is_told_where_it_goes() -> None:
    async def move(made: Crowded) -> None:
        (source, worker), there = made.source(), await made.started_elsewhere()
        request_id = made.generating()[0]
        wish = MigrateRequest(request_id=request_id, to=there.node)
        asking = [
            asyncio.ensure_future(node.system.ref(COORDINATOR).ask(wish, timeout_s=30.0))
            for node in made.cluster.living()
        ]
        await made.until(lambda: worker._live[request_id].moving is not None)
        elsewhere = MigrateOut(
            request_id=request_id, migration_id="x", instance_id="i", model=there.model, node=NodeId("n9"),
            worker="w", address="",
        )  # fmt: skip
        (at,) = (cell.name for _, cell in made._cells() if cell.actor is worker)
        with pytest.raises(Conflict, match=f"is being moved to {there.node} already"):
            await source.system.ref(at).ask(elsewhere, timeout_s=30.0)
        moved: list[HandedOver] = await asyncio.gather(*asking)
        assert [(one.node, one.instance_id) for one in moved] == [(there.node, there.instance_id)] * 2
        assert sorted(one.rounds > 0 for one in moved) == [False, True]
        assert sum(node.parts.migrations.aborted for node in made.cluster.living()) == 0

    crowded(move, GENERATING)


def test_who_waits_for_a_move_that_fails_moves_it_himself() -> None:
    async def move(made: Crowded) -> None:
        (source, worker), there = made.source(), await made.started_elsewhere()
        request_id = made.generating()[0]
        (at,) = (cell.name for _, cell in made._cells() if cell.actor is worker)
        wishes = [
            MigrateOut(
                request_id=request_id, migration_id=number, instance_id=there.instance_id, model=there.model,
                node=there.node, worker=there.worker, address=there.address,
            )
            for number in ("first", "second")
        ]  # fmt: skip
        first, second = (asyncio.ensure_future(source.system.ref(at).ask(one, timeout_s=30.0)) for one in wishes)
        await made.until(lambda: worker._live[request_id].moving is not None)
        first.cancel()
        handed: HandedOver = await second
        assert (handed.node, handed.rounds > 0) == (there.node, True)

    crowded(move, GENERATING)


def test_a_node_is_drained_when_its_answers_have_ended_also_where_nothing_has_a_place_elsewhere() -> None:
    async def drain(made: Crowded) -> None:
        node, _ = made.source()
        (other,) = (one for one in made.cluster.living() if one is not node)
        await other.system.ref(NODE_KEEPER).ask(CordonNode(cordoned=True), timeout_s=30.0)
        await made.cluster.clock.sleep(1.0)
        draining = asyncio.ensure_future(node.system.ref(NODE_KEEPER).ask(DrainNode(), timeout_s=60.0))
        await asyncio.wait(made.streams)
        ended_s = made.cluster.clock.monotonic_s()
        await draining
        # It takes as long to look as the stopping of the engine does; a place would have been waited for for 20 s.
        assert made.cluster.clock.monotonic_s() < ended_s + 2.0

    crowded(drain, GENERATING)


async def test_slots_that_are_held_are_nobodys_and_are_given_behind_the_hold() -> None:
    slots, order = Slots(2), list[str]()
    assert slots.take_now()

    async def use(name: str) -> None:
        try:
            await slots.take(0)
        except SllmError as error:
            name = f"{name}: {error.code}"
        order.append(name)

    with slots.held():
        assert not slots.take_now()
        first = asyncio.ensure_future(use("first"))
        await asyncio.sleep(0)
        slots.turn_away(lambda: Draining("away", retry_after_s=1.0))
        second, third = asyncio.ensure_future(use("second")), asyncio.ensure_future(use("third"))
        await first
        slots.give()
        await asyncio.sleep(0)
        assert order == ["first: draining"]
    await asyncio.wait([second, third])
    assert order == ["first: draining", "second", "third"]
    assert not slots.take_now()
