"""Starts that take long: they go on as long as something of the model comes, and their room stays theirs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hearing import Hearing
from houses import house
from houses import origin as origin
from test_instance_faults import LIMITS, OneModel, model_of
from test_scheduler import HandClock, ask, generate, question, report, scheduler
from test_scheduler import clock as clock
from test_scheduler import system as system
from test_supervision import now_s, virtual_system, virtually
from test_tier_races import holding

from sllm_actor.actors import Router
from sllm_actor.actors.model_manager import ModelManager
from sllm_actor.actors.place import Place
from sllm_actor.actors.registry import Registry
from sllm_actor.actors.request_log import RequestLog
from sllm_actor.actors.routes import Routes
from sllm_actor.actors.scheduler import BEGIN_WITHIN_S
from sllm_actor.actors.scheduler_way import SchedulerWay
from sllm_actor.actors.start_counts import StartCounts
from sllm_actor.actors.starting import Starting as Starts
from sllm_actor.actors.waiting_room import WaitingRoom
from sllm_actor.domain import FinishReason, ModelName, NodeId
from sllm_actor.errors import Conflict, NoCapacity
from sllm_actor.loader.load_queue import LoadQueue
from sllm_actor.messages.generation import Finished, Generate
from sllm_actor.messages.instances import EndStart, InstanceStarted, StartInstance, StartProgress
from sllm_actor.messages.models import GetModel
from sllm_actor.messages.placement import Placement, PlaceModel
from sllm_actor.runtime import Actor, ActorSystem, handles
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.runtime.tasks import TaskScope

START_TIMEOUT_S = 300.0


class Starting(Actor):
    """A manager, scheduler and worker in one: a start tells of bytes so often, at these distances, and then is done."""

    def __init__(self, steps_s: list[float]) -> None:
        self._steps_s = steps_s
        self.begun = 0
        self.ended = False

    @handles(GetModel)
    async def get(self, message: GetModel) -> Any:
        return MODEL

    @handles(PlaceModel)
    async def place(self, message: PlaceModel) -> Placement:
        return Placement(
            placement_id="p", node=NodeId("n"), manager="all", estimate_s=1.0, lease_s=1.0, reason="it is alone"
        )

    @handles(StartInstance)
    async def start(self, message: StartInstance) -> AsyncIterator[StartProgress | InstanceStarted]:
        self.begun += 1
        self.ended = False
        try:
            for done, step_s in enumerate(self._steps_s):
                await self.context.system.clock.sleep(step_s)
                yield StartProgress(done_bytes=done, total_bytes=len(self._steps_s))
            yield InstanceStarted(instance_id="m-1", model=ModelName("m"), node=NodeId("n"), worker="all", spans=())
        finally:
            self.ended = True

    @handles(Generate)
    async def generate(self, request: Generate) -> AsyncIterator[Finished]:
        yield Finished(request_id=request.request_id, reason=FinishReason.STOP, prompt_tokens=1, generated_tokens=1)


ROOM = WaitingRoom(SystemClock(), max_in_all=9, max_per_model=9)
MODEL = model_of(cast(Any, type("Described", (), {"path": "/m", "fingerprint": "f", "size_bytes": 9})))


async def routed(steps_s: list[float]) -> tuple[ActorSystem, Starting]:
    made = virtual_system()
    everything = Starting(steps_s)
    ref = await made.spawn(everything, "all")
    log = RequestLog(made.clock, 9)
    way, counts = SchedulerWay(made.clock, 0.0, ref), StartCounts()
    starts = Starts(
        ref, way, made.clock, counts, ask_timeout_s=5.0, placement_timeout_s=5.0, start_timeout_s=START_TIMEOUT_S
    )
    router = Router(way, starts, log, made.clock, routes=Routes(), room=ROOM, counts=counts, ask_timeout_s=5.0)
    await made.spawn(router, "router")
    return made, everything


@virtually
async def test_a_start_that_goes_on_receiving_bytes_is_waited_for() -> None:
    begin_s = now_s()
    made, everything = await routed([200.0] * 10)
    items = [item async for item in made.ref("router").stream(generate("r"))]
    assert [type(item) for item in items] == [Finished]
    assert now_s() - begin_s >= 2000
    assert everything.ended
    await made.close()


@virtually
async def test_a_start_that_stands_still_is_given_up_after_its_limit() -> None:
    begin_s = now_s()
    made, everything = await routed([200.0, 200.0, START_TIMEOUT_S + 1])
    with pytest.raises(NoCapacity, match="nothing of it came, for 300 s after 1 B of 3 B"):
        _ = [item async for item in made.ref("router").stream(generate("r"))]
    assert 400 + START_TIMEOUT_S <= now_s() - begin_s < 400 + START_TIMEOUT_S + 1
    assert everything.ended, "what nobody waits for is cancelled"
    await made.close()


@virtually
async def test_a_start_ends_when_the_last_who_waits_for_it_leaves_and_no_sooner() -> None:
    made, everything = await routed([200.0] * 3)
    scope, answers = TaskScope("test"), made.ref("router")

    async def asking(name: str) -> list[Any]:
        return [item async for item in answers.stream(generate(name))]

    first, second = (scope.spawn(asking(name), name) for name in ("first", "second"))
    await made.clock.sleep(100.0)
    first.cancel()
    await asyncio.wait([first])
    await made.clock.sleep(200.0)
    assert (everything.begun, everything.ended) == (1, False)
    second.cancel()
    await asyncio.wait([second])
    await made.clock.sleep(1.0)
    assert everything.ended
    assert [type(item) for item in await asking("third")] == [Finished]
    assert everything.begun == 2, "a later request begins anew"
    await made.close()


@virtually
async def test_a_start_that_is_ended_tells_all_who_wait_for_it_why() -> None:
    made, everything = await routed([200.0] * 3)
    scope, router = TaskScope("test"), made.ref("router")

    async def asking(name: str) -> None:
        with pytest.raises(Conflict, match="m was stopped while it started"):
            _ = [item async for item in router.stream(generate(name))]

    asked = [scope.spawn(asking(name), name) for name in ("first", "second")]
    await made.clock.sleep(100.0)
    end = EndStart(model=ModelName("m"), why="stopped")
    assert await router.ask(end, timeout_s=5.0)
    await asyncio.gather(*asked)
    assert everything.ended
    assert not await router.ask(end, timeout_s=5.0)
    await made.close()


async def test_a_grant_that_was_never_used_runs_out_soon(system: ActorSystem, clock: HandClock) -> None:
    scheduler(system).tell(report(slots=1))
    await ask(system, question("a"))
    clock.now_s += BEGIN_WITHIN_S + 1
    assert (await ask(system, question("b"))).node == "node-1"


async def test_a_grant_stays_as_long_as_its_start_goes_on(system: ActorSystem, clock: HandClock) -> None:
    scheduler(system).tell(report(slots=1))
    placement = await ask(system, question("a"))
    scheduler(system).tell(report(slots=1, starting=(placement.placement_id,)))
    for _ in range(3):  # The lease is 60 s.
        clock.now_s += 50
        scheduler(system).tell(report(slots=1, starting=(placement.placement_id,)))
    with pytest.raises(NoCapacity):
        await ask(system, question("b", timeout_s=0.01))
    clock.now_s += 61
    assert (await ask(system, question("b"))).node == "node-1"


async def test_who_waits_for_a_turn_hears_of_those_before_and_no_more_when_it_has_come() -> None:
    queue, heard, scope = LoadQueue(1, lambda _: 1.0), [0, 0], TaskScope("test")
    done = asyncio.Event()

    def hear(who: int) -> Callable[[], None]:
        def heard_more() -> None:
            heard[who] += 1

        return heard_more

    async def second() -> None:
        async with queue.turn(10, on_moved=hear(1)) as turn:
            turn.arrive(5)
            await done.wait()

    async with queue.turn(10, on_moved=hear(0)) as first:
        waiting = scope.spawn(second(), "second")
        while not queue.waiting:
            await asyncio.sleep(0)
        first.arrive(3)
        first.arrive(7)
        assert (heard, queue.remaining_bytes()) == ([0, 2], 13)
    while queue.waiting:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (heard, queue.remaining_bytes()) == ([0, 2], 5)
    done.set()
    await waiting
    assert queue._on_moved == {}


async def test_a_load_that_waits_for_its_turn_tells_of_those_before(origin: Path) -> None:
    async with house(origin) as node:
        told: list[tuple[int, int]] = []
        scope = TaskScope("test")
        queue = node.tiers._remote_queue
        turns = [queue.turn(1) for _ in range(4)]
        held = [await turn.__aenter__() for turn in turns]
        loading = scope.spawn(node.lease(on_progress=lambda done, total: told.append((done, total))), "load")
        while queue.waiting < 1:
            await asyncio.sleep(0)
        held[0].arrive(1)
        await asyncio.sleep(0)
        assert told == [(0, node.card.checkpoint.size_bytes)]
        for turn in turns:
            await turn.__aexit__(None, None, None)
        (await loading).release()
        assert told[-1] == (node.card.checkpoint.size_bytes, node.card.checkpoint.size_bytes)
        await node.stored()


async def test_the_scheduler_hears_of_a_copy_as_soon_as_the_ssd_has_it(origin: Path) -> None:
    async with house(origin) as node:
        made, hearing = ActorSystem(), Hearing()
        way = SchedulerWay(SystemClock(), 0.0, await made.spawn(hearing, "scheduler"))
        checkpoint = node.card.checkpoint
        store = OneModel(msgspec.structs.replace(model_of(checkpoint), card=node.card.key))
        registry = Registry(cast(Any, store), cast(Any, None), node.tiers, SystemClock())
        manager = ModelManager(
            Place(NodeId("n")),
            way,
            registry,
            node.tiers,
            cast(Any, None),
            SystemClock(),
            LIMITS,
            ROOM,
            StartCounts(),
        )
        await made.spawn(manager, "model-manager")
        begun, go, scope = asyncio.Event(), asyncio.Event(), TaskScope("test")
        node.source.before = holding(begun, go)
        pulling = scope.spawn(node.tiers.pull(node.card), "pull")
        await begun.wait()
        assert [heard.ssd_fingerprints for heard in hearing.reports] == [()]
        go.set()
        await pulling
        while len(hearing.reports) < 2:
            await asyncio.sleep(0)
        assert [heard.ssd_fingerprints for heard in hearing.reports] == [(), (checkpoint.fingerprint,)]
        await made.close()
        await registry.close()
