"""The Scheduler and the request log, alone: a manager that only remembers what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import msgspec
import pytest

from sllm_actor.actors import Scheduler
from sllm_actor.actors.request_log import RequestLog
from sllm_actor.actors.scheduler import Limits
from sllm_actor.actors.start_counts import StartCounts
from sllm_actor.domain import FinishReason, ModelName, NodeId, RequestId, Sampling
from sllm_actor.errors import DestinationFailed, InvalidRequest, ModelTooLarge, NoCapacity, QueueFull, RequestNotFound
from sllm_actor.messages.generation import Finished, Generate, Tokens
from sllm_actor.messages.instances import StopInstances
from sllm_actor.messages.placement import (
    HurryPlacement,
    InstanceView,
    ListNodes,
    MembersChanged,
    NodeChange,
    NodeReport,
    Placement,
    PlaceModel,
    RunsAlready,
    StartingView,
)
from sllm_actor.runtime import Actor, ActorRef, ActorSystem, handles

MIB = 1024 * 1024
LIMITS = Limits(lease_s=60, evict_timeout_s=5, max_waiting=2)


class HandClock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        raise AssertionError("nothing here sleeps")


class Manager(Actor):
    """Gives up what it is asked to, if it may, and says so in its next report."""

    def __init__(self, report: NodeReport, willing: bool = True) -> None:
        self.report = report
        self.willing = willing
        self.asked: list[str] = []

    @handles(StopInstances)
    async def stop(self, message: StopInstances) -> int:
        self.asked.append(message.instance_id)
        if not self.willing:
            return 0
        self.report = report(
            slots=self.report.slots,
            instances=[view for view in self.report.instances if view.instance_id != self.asked[-1]],
        )
        self.context.system.ref("scheduler").tell(self.report)
        return 1


def view(name: str, active: int = 0, idle_since_s: float = 0.0) -> InstanceView:
    return InstanceView(
        instance_id=f"{name}-1", model=ModelName(name), active=active, idle_since_s=idle_since_s, host_bytes=MIB
    )


def report(
    slots: int = 2,
    instances: list[InstanceView] | None = None,
    ended: tuple[str, ...] = (),
    starting: tuple[str, ...] = (),
    failed: tuple[str, ...] = (),
    name: str = "node-1",
    epoch: int = 0,
    on_ssd: tuple[str, ...] = ("new",),
) -> NodeReport:
    return NodeReport(
        node=NodeId(name),
        manager="manager",
        slots=slots,
        host_pool_bytes=100 * MIB,
        instances=tuple(instances or ()),
        pinned_host_bytes={},
        ended_placements=ended,
        starting=tuple(StartingView(placement_id=one, model=ModelName("old"), host_bytes=MIB) for one in starting),
        host_fingerprints=(),
        ssd_fingerprints=on_ssd,
        failed_placements=failed,
        ssd_bytes_per_s=1e9,
        disk_queues_s={},
        remote_bytes_per_s=1e8,
        remote_queue_s=0.0,
        epoch=epoch,
    )


def smaller(one: NodeReport) -> NodeReport:
    smaller: NodeReport = msgspec.structs.replace(cast(Any, one), host_pool_bytes=10 * MIB)
    return smaller


def question(model: str = "new", timeout_s: float = 30.0, host_bytes: int = MIB, priority: int = 0) -> PlaceModel:
    return PlaceModel(
        request_id=RequestId(f"for-{model}"),
        model=ModelName(model),
        fingerprint=model,
        size_bytes=MIB,
        host_bytes=host_bytes,
        timeout_s=timeout_s,
        priority=priority,
    )


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
async def system(clock: HandClock) -> AsyncIterator[ActorSystem]:
    system = ActorSystem()
    await system.spawn(Scheduler(clock, LIMITS, StartCounts()), "scheduler")
    yield system
    await system.close()


async def ask(system: ActorSystem, message: PlaceModel) -> Placement:
    placement: Placement = await system.ref("scheduler").ask(message, timeout_s=60)
    return placement


def scheduler(system: ActorSystem) -> ActorRef:
    return system.ref("scheduler")


async def all_wait(system: ActorSystem) -> None:
    """Let what was asked before get into the queue: it is asked, and begun, before the second of these is answered."""
    for _ in range(2):
        await asyncio.sleep(0)
        await scheduler(system).ask(ListNodes(), timeout_s=60)


async def test_a_free_slot_is_granted_with_an_estimate_and_a_reason(system: ActorSystem) -> None:
    scheduler(system).tell(report())
    placement = await ask(system, question())
    assert (placement.node, placement.manager) == ("node-1", "manager")
    assert placement.estimate_s == pytest.approx(MIB / 1e9)
    assert "node-1 reads" in placement.reason


async def test_a_grant_takes_its_slot_until_its_start_has_ended(system: ActorSystem) -> None:
    scheduler(system).tell(report(slots=1))
    placement = await ask(system, question("a"))
    with pytest.raises(NoCapacity):
        await ask(system, question("b", timeout_s=0.01))
    scheduler(system).tell(report(slots=1, ended=(placement.placement_id,)))
    assert (await ask(system, question("b"))).node == "node-1"


async def test_a_start_that_an_earlier_leader_has_granted_takes_its_slot_and_is_not_begun_again(
    system: ActorSystem,
) -> None:
    scheduler(system).tell(report(slots=1, starting=("placement-3-1",)))
    with pytest.raises(NoCapacity):
        await ask(system, question("b", timeout_s=0.01))
    scheduler(system).tell(report(slots=9, starting=("placement-3-1",)))
    same = asyncio.ensure_future(ask(system, question("old")))
    assert (await ask(system, question("b"))).node == "node-1"
    assert not same.done()
    scheduler(system).tell(report(slots=9, ended=("placement-3-1",), failed=("placement-3-1",)))
    assert (await same).node == "node-1"


async def test_who_waits_for_a_start_that_goes_on_is_told_of_an_instance_that_comes_up_elsewhere(
    system: ActorSystem,
) -> None:
    scheduler(system).tell(report(starting=("placement-3-1",)))
    waits = asyncio.ensure_future(ask(system, question("old")))
    await all_wait(system)
    scheduler(system).tell(report(starting=("placement-3-1",)))
    await all_wait(system)
    assert not waits.done()
    scheduler(system).tell(report(instances=[view("old")], name="node-2"))
    assert isinstance(await waits, RunsAlready)


async def test_a_model_too_large_for_those_heard_of_waits_for_the_members_that_have_not_reported(
    system: ActorSystem,
) -> None:
    scheduler(system).tell(MembersChanged(epochs={NodeId("node-1"): 3, NodeId("node-2"): 5}))
    scheduler(system).tell(smaller(report(epoch=3)))
    waiting = asyncio.ensure_future(ask(system, question(host_bytes=90 * MIB)))
    await all_wait(system)
    scheduler(system).tell(report(name="node-2", epoch=5))
    assert (await waiting).node == "node-2"
    scheduler(system).tell(smaller(report(name="node-2", epoch=5)))
    with pytest.raises(ModelTooLarge):
        await ask(system, question(host_bytes=90 * MIB))


@pytest.mark.parametrize("wish", [{"only_on": "node-2"}, {"not_on": (NodeId("node-1"),)}])
async def test_who_may_not_have_what_is_free_holds_up_nobody(system: ActorSystem, wish: dict[str, Any]) -> None:
    scheduler(system).tell(report())
    waiting = asyncio.ensure_future(ask(system, msgspec.structs.replace(cast(Any, question("a")), **wish)))
    await all_wait(system)
    assert (await ask(system, question("b"))).node == "node-1"
    scheduler(system).tell(report(name="node-2"))
    assert (await waiting).node == "node-2"


async def test_who_waits_for_some_places_alone_keeps_no_busy_model_from_more_instances(system: ActorSystem) -> None:
    scheduler(system).tell(report(slots=1, instances=[view("busy", active=1)]))
    actor = cast(Any, system.cells["scheduler"].actor)
    waiting = asyncio.ensure_future(ask(system, only_on("node-2")))
    await all_wait(system)
    assert actor._may_scale(0.0)
    other = asyncio.ensure_future(ask(system, question("other")))
    await all_wait(system)
    assert not actor._may_scale(0.0)
    for one in (waiting, other):
        one.cancel()


def only_on(node: str) -> Any:
    return msgspec.structs.replace(cast(Any, question()), only_on=node)


@pytest.mark.parametrize("gone", [{"epochs": {NodeId("node-1"): 3}}, {"gone": (NodeId("node-2"),)}])
async def test_who_would_have_a_node_alone_is_told_at_once_that_it_has_gone(
    system: ActorSystem, gone: dict[str, Any]
) -> None:
    members: dict[str, Any] = {"epochs": {NodeId("node-1"): 3, NodeId("node-2"): 5}}
    scheduler(system).tell(MembersChanged(**members))
    scheduler(system).tell(report(epoch=3))
    waiting = asyncio.ensure_future(ask(system, only_on("node-2")))
    await all_wait(system)
    assert not waiting.done()
    scheduler(system).tell(MembersChanged(**members | gone))
    for asked in (waiting, ask(system, only_on("node-2"))):
        with pytest.raises(DestinationFailed, match="node-2 has left the cluster"):
            await asked
    assert (await ask(system, only_on("node-1"))).node == "node-1"


async def test_who_would_have_any_other_node_is_told_at_once_that_there_is_none(system: ActorSystem) -> None:
    members = {NodeId("node-1"): 3, NodeId("node-2"): 5}
    elsewhere: Any = msgspec.structs.replace(cast(Any, question()), not_on=(NodeId("node-1"),))
    scheduler(system).tell(MembersChanged(epochs=members, gone=(NodeId("node-2"),)))
    scheduler(system).tell(report(epoch=3))
    with pytest.raises(DestinationFailed, match="there is no other node"):
        await ask(system, elsewhere)
    scheduler(system).tell(MembersChanged(epochs=members))
    scheduler(system).tell(report(epoch=5, name="node-2"))
    assert (await ask(system, elsewhere)).node == "node-2"


async def test_one_that_was_gone_and_reports_is_a_place_again(system: ActorSystem) -> None:
    members = {NodeId("node-1"): 3}
    scheduler(system).tell(MembersChanged(epochs=members, gone=(NodeId("node-1"),)))
    scheduler(system).tell(report(epoch=3))
    assert (await ask(system, only_on("node-1"))).node == "node-1"


async def test_who_would_have_a_cordoned_node_alone_is_told_so_unless_its_model_runs_there(
    system: ActorSystem,
) -> None:
    cordoned: Any = report(instances=[view("new", active=1)])
    scheduler(system).tell(msgspec.structs.replace(cordoned, cordoned=True))
    answer: Any = await ask(system, only_on("node-1"))
    assert answer.instance_id == "new-1"
    scheduler(system).tell(msgspec.structs.replace(cordoned, cordoned=True, instances=()))
    with pytest.raises(DestinationFailed, match="node-1 is cordoned"):
        await ask(system, only_on("node-1"))


async def test_where_there_is_no_worker_a_model_waits_for_one(system: ActorSystem) -> None:
    scheduler(system).tell(report(slots=0))
    waiting = asyncio.ensure_future(ask(system, question()))
    await all_wait(system)
    assert not waiting.done()
    scheduler(system).tell(report(name="node-2"))
    assert (await waiting).node == "node-2"


async def test_what_a_node_told_before_it_left_does_not_bring_it_back(system: ActorSystem) -> None:
    members = {NodeId("node-1"): 3, NodeId("node-2"): 5}
    scheduler(system).tell(MembersChanged(epochs=members))
    scheduler(system).tell(MembersChanged(epochs={NodeId("node-1"): 3}))
    scheduler(system).tell(report(name="node-2", epoch=5))
    with pytest.raises(NoCapacity):
        await ask(system, question(timeout_s=0.01))
    scheduler(system).tell(report(name="node-2", epoch=6))  # It joins anew, which is not heard of yet.
    assert (await ask(system, question())).node == "node-2"


async def test_nothing_is_placed_on_a_member_whose_process_is_gone_until_it_reports_again(system: ActorSystem) -> None:
    members = {NodeId("node-1"): 3}
    scheduler(system).tell(MembersChanged(epochs=members))
    scheduler(system).tell(report(slots=1, epoch=3))
    scheduler(system).tell(MembersChanged(epochs=members, gone=(NodeId("node-1"),)))
    with pytest.raises(NoCapacity):
        await ask(system, question(timeout_s=0.01))
    scheduler(system).tell(report(slots=1, epoch=3))
    assert (await ask(system, question())).node == "node-1"


async def test_a_node_that_came_back_unseen_has_nothing_of_its_earlier_life(system: ActorSystem) -> None:
    scheduler(system).tell(MembersChanged(epochs={NodeId("node-1"): 3}))
    scheduler(system).tell(report(slots=1, epoch=3))
    await ask(system, question("a"))
    scheduler(system).tell(MembersChanged(epochs={NodeId("node-1"): 4}))
    scheduler(system).tell(report(slots=1, epoch=3))
    scheduler(system).tell(report(slots=1, epoch=4))
    assert (await ask(system, question("b"))).node == "node-1"


async def test_a_grant_that_nobody_used_runs_out(system: ActorSystem, clock: HandClock) -> None:
    scheduler(system).tell(report(slots=1))
    await ask(system, question("a"))
    clock.now_s += 61
    assert (await ask(system, question("b"))).node == "node-1"


async def test_a_model_that_can_never_fit_is_refused_at_once_also_behind_others_who_wait(system: ActorSystem) -> None:
    scheduler(system).tell(report(slots=1))
    await ask(system, question("a"))
    waiting = asyncio.ensure_future(ask(system, question("b")))
    await asyncio.sleep(0)
    with pytest.raises(
        ModelTooLarge, match=r"^c needs 104\.9 MB of host memory, the pool has 104\.9 MB: raise host_pool_bytes$"
    ):
        await ask(system, question("c", host_bytes=100 * MIB + 1))
    assert not waiting.done()
    waiting.cancel()


async def test_the_instance_that_has_been_idle_the_longest_is_given_up(system: ActorSystem) -> None:
    views = [view("busy", active=1), view("late", idle_since_s=9.0), view("early", idle_since_s=5.0)]
    manager = Manager(report(slots=3, instances=views))
    await system.spawn(manager, "manager")
    scheduler(system).tell(manager.report)
    placement = await ask(system, question())
    assert placement.node == "node-1"
    assert manager.asked == ["early-1"]


async def test_what_is_told_of_one_instance_alone_makes_it_busy_or_idle(system: ActorSystem) -> None:
    manager = Manager(report(slots=2, instances=[view("first", active=1), view("second")]))
    await system.spawn(manager, "manager")
    scheduler(system).tell(manager.report)

    def tell(told: InstanceView) -> None:
        scheduler(system).tell(NodeChange(node=NodeId("node-1"), epoch=0, told_s=0.0, instances=(told,)))

    tell(view("second", active=1))
    tell(view("unheard of"))
    with pytest.raises(NoCapacity):
        await ask(system, question(timeout_s=0.01))
    assert manager.asked == []
    waiting = asyncio.ensure_future(ask(system, question()))
    await asyncio.sleep(0)
    tell(view("first", idle_since_s=7.0))
    assert (await waiting).node == "node-1"
    assert manager.asked == ["first-1"]


async def test_an_instance_that_became_busy_meanwhile_is_left_and_the_request_waits(system: ActorSystem) -> None:
    manager = Manager(report(slots=1, instances=[view("idle")]), willing=False)
    await system.spawn(manager, "manager")
    scheduler(system).tell(manager.report)
    waiting = asyncio.ensure_future(ask(system, question()))
    while not manager.asked:
        await asyncio.sleep(0)
    scheduler(system).tell(report(slots=1, instances=[view("idle", active=1)]))
    with pytest.raises(NoCapacity):
        await ask(system, question("other", timeout_s=0.01))
    scheduler(system).tell(report(slots=1))
    assert (await waiting).node == "node-1"


async def test_waiting_starts_are_served_in_order_and_bounded(system: ActorSystem) -> None:
    first, second = (asyncio.ensure_future(ask(system, question(name))) for name in ("first", "second"))
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await ask(system, question("third"))
    scheduler(system).tell(report(slots=1))
    placement = await first
    assert not second.done()
    scheduler(system).tell(report(slots=1, ended=(placement.placement_id,)))
    assert (await second).node == "node-1"


async def test_waiting_starts_go_by_priority_also_one_that_becomes_urgent_later(system: ActorSystem) -> None:
    late = asyncio.ensure_future(ask(system, question("late", priority=5)))
    soon = asyncio.ensure_future(ask(system, question("soon", priority=3)))
    await all_wait(system)
    scheduler(system).tell(HurryPlacement(request_id=RequestId("for-nobody"), priority=-9))
    scheduler(system).tell(HurryPlacement(request_id=RequestId("for-late"), priority=9))
    scheduler(system).tell(report(slots=1))
    placement = await soon
    assert not late.done()
    other = asyncio.ensure_future(ask(system, question("other", priority=1)))
    await all_wait(system)
    scheduler(system).tell(HurryPlacement(request_id=RequestId("for-late"), priority=-1))
    scheduler(system).tell(report(slots=1, ended=(placement.placement_id,)))
    assert (await late).node == "node-1"
    assert not other.done()
    other.cancel()


async def test_one_that_has_waited_for_half_of_its_time_is_overtaken_no_more(
    system: ActorSystem, clock: HandClock
) -> None:
    patient = asyncio.ensure_future(ask(system, question("patient", timeout_s=60, priority=5)))
    await all_wait(system)
    clock.now_s += 30
    urgent = asyncio.ensure_future(ask(system, question("urgent", priority=-5)))
    await all_wait(system)
    scheduler(system).tell(report(slots=1))
    assert (await patient).node == "node-1"
    assert not urgent.done()
    urgent.cancel()


async def test_a_caller_that_gives_up_leaves_the_queue(system: ActorSystem) -> None:
    gone = asyncio.ensure_future(ask(system, question("gone")))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait([gone])
    scheduler(system).tell(report(slots=1))
    assert (await ask(system, question("next"))).node == "node-1"


def generate(request_id: str) -> Generate:
    sampling = Sampling(max_tokens=9, temperature=0, top_p=1, seed=0)
    return Generate(
        request_id=RequestId(request_id), model=ModelName("m"), prompt=b"\1\0\0\0", sampling=sampling, arrived_s=90.0
    )


def test_the_log_forgets_the_oldest_finished_requests_first(clock: HandClock) -> None:
    log = RequestLog(clock, history=2)
    for name in ("a", "b", "c"):
        with log.following(generate(name)):
            pass
    assert [timeline.request_id for timeline in log.timelines()] == ["c", "b"]
    with pytest.raises(RequestNotFound):
        log.timeline(RequestId("a"))


def test_the_log_refuses_an_id_that_is_running_and_takes_it_again_afterwards(clock: HandClock) -> None:
    log = RequestLog(clock, history=2)
    with log.following(generate("a")), pytest.raises(InvalidRequest), log.following(generate("a")):
        pass
    with log.following(generate("a")):
        pass
    assert len(log.timelines()) == 1


def test_a_record_takes_tokens_in_order_and_knows_its_first(clock: HandClock) -> None:
    log = RequestLog(clock, history=2)
    record = log._open(generate("a"))
    record.take(Tokens(request_id=RequestId("a"), index=0, token_ids=(7, 8)), 101.0)
    record.take(Tokens(request_id=RequestId("a"), index=2, token_ids=(9,)), 102.0)
    with pytest.raises(AssertionError):
        record.take(Tokens(request_id=RequestId("a"), index=2, token_ids=(9,)), 103.0)
    record.take(
        Finished(request_id=RequestId("a"), reason=FinishReason.LENGTH, prompt_tokens=1, generated_tokens=3), 104.0
    )
    timeline = log.timeline(RequestId("a"))
    assert (timeline.generated_tokens, timeline.first_token_s, timeline.outcome) == (3, 101.0, "running")
