"""Room that is made by moving or ending what generates: kept for who waits, and given back where it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from test_explain import why
from test_scheduler import LIMITS, MIB, all_wait, ask, question, report, scheduler, view
from test_supervision import now_s, virtual_system, virtually

from sllm_actor.actors import Scheduler
from sllm_actor.actors.making_room import PAUSE_S
from sllm_actor.actors.start_counts import StartCounts
from sllm_actor.domain import ModelName, NodeId, RequestId
from sllm_actor.errors import DestinationFailed, NoCapacity, NodeUnreachable
from sllm_actor.messages.explanation import MovedAnswer
from sllm_actor.messages.instances import StopInstances
from sllm_actor.messages.migration import InstanceMoved, MoveInstance
from sllm_actor.messages.placement import InstanceView, MembersChanged, NodeReport, Placement, RunsAlready
from sllm_actor.runtime import Actor, ActorSystem, handles
from sllm_actor.testing.virtual_loop import VirtualLoop

MOVED = MovedAnswer(
    request_id=RequestId("r1"), model=ModelName("old"), node=NodeId("node-2"), tokens=30, rounds=2
)  # fmt: skip


class Node(Actor):
    """Both coordinator and manager: an instance goes when it is told to, if it may, after `takes_s`."""

    def __init__(self, takes_s: float = 1.0, error: Exception | None = None) -> None:
        self.takes_s = takes_s
        self.error = error
        self.asked: list[Any] = []

    @handles(MoveInstance, concurrent=True)
    async def move(self, message: MoveInstance) -> InstanceMoved:
        await self._go(message)
        return InstanceMoved(answers=(MOVED,))

    @handles(StopInstances, concurrent=True)
    async def stop(self, message: StopInstances) -> int:
        await self._go(message)
        return 1

    async def _go(self, message: Any) -> None:
        self.asked.append(message)
        await asyncio.sleep(self.takes_s)
        if self.error is not None:
            raise self.error
        self.context.system.ref("scheduler").tell(first())


def busy(name: str = "old", **more: Any) -> InstanceView:
    return msgspec.structs.replace(view(name, active=2), fingerprint=name, size_bytes=MIB, **more)  # type: ignore[type-var]


def first(*instances: InstanceView, ended: tuple[str, ...] = (), epoch: int = 0) -> NodeReport:
    """The node that holds the model which is asked for."""
    return report(slots=1, instances=list(instances), name="node-1", on_ssd=("new",), ended=ended, epoch=epoch)


def second(slots: int = 1, instances: Sequence[InstanceView] = (), epoch: int = 0) -> NodeReport:
    """The node that holds the one which runs at the first; what is asked for is far away from it."""
    far = report(slots=slots, instances=list(instances), name="node-2", on_ssd=("old",), epoch=epoch)
    return msgspec.structs.replace(far, remote_bytes_per_s=1.0)  # type: ignore[type-var]


async def cluster(node: Node, *reports: NodeReport, policy: str = "startup_time") -> tuple[ActorSystem, StartCounts]:
    system, counts = virtual_system(), StartCounts()
    limits = LIMITS._replace(placement_policy=policy, max_waiting=9, move_timeout_s=20.0)
    await system.spawn(Scheduler(VirtualLoop.running().clock, limits, counts), "scheduler")
    await system.spawn(node, "migration-coordinator")
    for one in reports:
        scheduler(system).tell(one)
    return system, counts


async def asked_of(node: Node) -> Any:
    while not node.asked:
        await asyncio.sleep(0.01)
    return node.asked[0]


@virtually
async def test_what_runs_where_a_model_lies_moves_and_the_model_starts_there() -> None:
    node = Node()
    system, counts = await cluster(node, first(busy()), second())
    begun_s = now_s()
    placement = await ask(system, question())
    assert placement.node == "node-1"
    assert placement.made_room_s == pytest.approx(now_s() - begun_s)
    (move,) = node.asked
    assert (move.instance_id, move.worker) == ("old-1", "")
    assert isinstance(move.to, Placement) and move.to.node == "node-2"
    explanation = await why(system)
    assert explanation.chosen is not None and explanation.chosen.action == "migrate"
    assert (explanation.moved, explanation.given_up) == ((MOVED,), ("old-1",))
    assert explanation.predicted_s == pytest.approx(MIB / 1e9)
    assert "once old-1 with 2 answers has moved to node-2" in explanation.reason
    assert counts.observe()["rooms"] == {"migrate": 1}
    scheduler(system).tell(first(ended=(placement.placement_id,)))
    assert (await why(system)).outcome == "started"
    await system.close()


@virtually
async def test_it_goes_on_at_an_instance_of_its_model_where_one_runs() -> None:
    node = Node()
    there = msgspec.structs.replace(busy(), instance_id="old-2", worker="worker/old-2")  # type: ignore[type-var]
    system, _ = await cluster(node, first(busy()), second(instances=[there]))
    await ask(system, question())
    assert isinstance(node.asked[0].to, RunsAlready)
    assert node.asked[0].to.worker == "worker/old-2"
    await system.close()


@virtually
async def test_nobody_else_gets_the_room_however_urgent() -> None:
    node = Node()
    system, _ = await cluster(node, first(busy()), second())
    waiting = asyncio.ensure_future(ask(system, question()))
    await asked_of(node)
    urgent = asyncio.ensure_future(ask(system, question("urgent", priority=-9)))
    same = asyncio.ensure_future(ask(system, question()))
    placement = await waiting
    assert placement.node == "node-1"
    assert not urgent.done() and not same.done()
    assert len(node.asked) == 1
    scheduler(system).tell(first(ended=(placement.placement_id,)))
    assert (await urgent).node == "node-1"
    same.cancel()
    await system.close()


@virtually
async def test_where_a_move_fails_both_are_as_they_were_and_it_is_not_tried_again() -> None:
    node = Node(error=DestinationFailed("it is on fire"))
    system, counts = await cluster(node, first(busy()), second())
    waiting = asyncio.ensure_future(ask(system, question()))
    await asked_of(node)
    await asyncio.sleep(5.0)
    scheduler(system).tell(first(busy()))
    await all_wait(system)
    assert not waiting.done()
    assert len(node.asked) == 1
    assert counts.observe()["rooms"] == {"migrate_failed": 1}
    # What runs there is offered to others again; and the place elsewhere expires.
    assert isinstance(await ask(system, question("old")), RunsAlready)
    await system.spawn(Node(takes_s=0.0), "manager")
    scheduler(system).tell(first(view("old")))
    assert (await waiting).node == "node-1"
    await system.close()


@virtually
async def test_where_a_node_neither_moves_anything_nor_says_so_the_wait_for_it_is_bounded() -> None:
    node = Node(takes_s=10_000.0)
    system, _ = await cluster(node, first(busy()), second())
    waiting = asyncio.ensure_future(ask(system, question(timeout_s=1000.0)))
    await asked_of(node)
    await asyncio.sleep(LIMITS.evict_timeout_s + 20.0 + 1.0)
    scheduler(system).tell(second())
    # Far away from it, but what was to move there has not come.
    assert (await waiting).node == "node-2"
    await system.close()


@virtually
async def test_who_leaves_gives_the_room_back() -> None:
    node = Node()
    system, _ = await cluster(node, first(busy()), second())
    with pytest.raises(NoCapacity):
        await ask(system, question(timeout_s=0.5))
    await asyncio.sleep(1.0)
    assert (await ask(system, question("other"))).node == "node-1"
    await system.close()


@virtually
async def test_a_node_that_goes_while_room_is_made_there_is_done_without() -> None:
    node = Node(takes_s=3.0)
    system, _ = await cluster(node)
    scheduler(system).tell(MembersChanged(epochs={NodeId("node-1"): 1, NodeId("node-2"): 2}))
    scheduler(system).tell(first(busy(), epoch=1))
    scheduler(system).tell(second(slots=2, epoch=2))
    waiting = asyncio.ensure_future(ask(system, question()))
    await asked_of(node)
    scheduler(system).tell(MembersChanged(epochs={NodeId("node-2"): 2}))
    assert (await waiting).node == "node-2"
    await system.close()


@virtually
async def test_what_is_itself_looked_for_to_move_moves_nothing() -> None:
    node = Node()
    system, _ = await cluster(node, first(busy()), second())
    moving: Any = msgspec.structs.replace(question(timeout_s=0.5), not_on=(NodeId("node-2"),))  # type: ignore[type-var]
    with pytest.raises(NoCapacity):
        await ask(system, moving)
    assert node.asked == []
    await system.close()


@virtually
async def test_the_policy_preempt_has_less_urgent_answers_ended_and_no_others() -> None:
    manager = Node()
    system, counts = await cluster(Node(), first(busy(priority=5)), second(slots=0), policy="preempt")
    await system.spawn(manager, "manager")
    with pytest.raises(NoCapacity):
        await ask(system, question("new", priority=5, timeout_s=0.5))
    placement = await ask(system, question("new", priority=4))
    assert placement.node == "node-1"
    assert manager.asked == [StopInstances(model=ModelName("old"), instance_id="old-1", preempt=True)]
    assert counts.observe()["rooms"] == {"preempt": 1}
    assert "ends less urgent answers, to be resumed: old-1" in (await why(system)).reason
    await system.close()


class Refusing(Actor):
    """A manager whose instance `a-1` is idle no more, which it tells when it refuses to stop it, or does not tell."""

    def __init__(self, *tells: NodeReport) -> None:
        self.tells = list(tells)
        self.asked: list[StopInstances] = []

    @handles(StopInstances)
    async def stop(self, message: StopInstances) -> int:
        self.asked.append(message)
        if self.tells:
            self.context.system.ref("scheduler").tell(self.tells.pop(0))
        return 0 if message.only_idle else 1


@virtually
async def test_who_refuses_without_having_told_why_is_not_asked_all_the_time() -> None:
    manager = Refusing()
    system, _ = await cluster(Node(), first(view("a")), second(slots=0))
    await system.spawn(manager, "manager")
    with pytest.raises(NoCapacity):
        await ask(system, question(timeout_s=4.2 * PAUSE_S))
    assert len(manager.asked) == 5
    await system.close()


@virtually
async def test_room_is_made_after_all_where_an_instance_was_wrongly_taken_for_idle() -> None:
    both, left = [busy("a", priority=9), busy("b", priority=9)], [busy("a", priority=9)]
    slots: Any = {"slots": 2}
    full, less, none = (msgspec.structs.replace(first(*has), **slots) for has in (both, left, ()))  # type: ignore[type-var]
    manager = Refusing(full, less, none)
    stale: Any = msgspec.structs.replace(first(view("a"), both[1]), **slots)  # type: ignore[type-var]
    system, _ = await cluster(Node(), stale, second(slots=0), policy="preempt")
    await system.spawn(manager, "manager")
    wish: Any = msgspec.structs.replace(question("new", priority=1), **slots)  # type: ignore[type-var]
    assert (await ask(system, wish)).node == "node-1"
    assert [(one.instance_id, one.preempt) for one in manager.asked] == [("a-1", False), ("b-1", True), ("a-1", True)]
    await system.close()


@virtually
async def test_a_scheduler_that_comes_after_another_uses_none_of_its_names() -> None:
    system, _ = await cluster(Node(), first())
    before = await ask(system, question())
    await system.stop("scheduler")
    await asyncio.sleep(0.001)
    await system.spawn(Scheduler(VirtualLoop.running().clock, LIMITS, StartCounts()), "scheduler")
    scheduler(system).tell(first(ended=(before.placement_id,)))
    after = await ask(system, question())
    scheduler(system).tell(first(ended=(before.placement_id,)))
    with pytest.raises(NoCapacity):
        await ask(system, question("other", timeout_s=0.5))
    assert after.placement_id != before.placement_id
    await system.close()


@virtually
async def test_a_node_that_can_t_be_reached_is_not_asked_for_a_slot_all_the_time() -> None:
    manager = Node(takes_s=0.0, error=NodeUnreachable("it is deaf"))
    system, _ = await cluster(Node(), first(view("old")))
    await system.spawn(manager, "manager")
    with pytest.raises(NoCapacity):
        await ask(system, question(timeout_s=5.0))
    assert 1 < len(manager.asked) <= 5.0 / PAUSE_S + 1
    await system.close()
