"""Ends that are not clean: swallowed cancellations, cancelled clean-ups, foreign exceptions, duels over one node id."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import msgspec
import pytest
from loops import on_both_loops
from remote_pairs import QUICK, Everyman, Say, node
from remote_pairs import outcome as outcome_of

from sllm_actor.errors import ActorDied, ConfigInvalid, DeadlineExceeded, HandlerFailed, NodeUnreachable, SllmError
from sllm_actor.runtime import Actor, ActorRef, ActorSystem, Ended, NodeAddress, Security, Supervision, handles
from sllm_actor.runtime.tasks import TaskScope

FOR_EVER_S = 3600.0
SOON_DOWN = msgspec.structs.replace(QUICK, down_after_s=0.3)


async def ask(ref: ActorRef) -> object:
    return await outcome_of(ref.ask(Say(text="x"), timeout_s=9))


class Hold(msgspec.Struct, frozen=True):
    pass


class Other(msgspec.Struct, frozen=True):
    pass


class Stubborn(Actor):
    """Will not be cancelled."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()

    @handles(Hold)
    async def hold(self, _: Hold) -> str:
        self.begun.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return "went on"


@on_both_loops
async def test_a_stop_ends_though_a_handler_swallows_its_cancellation() -> None:
    system, actor = ActorSystem(), Stubborn()
    ref = await system.spawn(actor, "stubborn")
    asking = TaskScope("test").spawn(outcome_of(ref.ask(Hold(), timeout_s=FOR_EVER_S)), "ask")
    await actor.begun.wait()
    await system.stop("stubborn")
    assert await asking == "went on" or isinstance(asking.result(), ActorDied)
    await system.close()
    assert system.names() == []


class CancelsItsOwn(Actor):
    """Cleans up as many do: cancels a task and waits for it."""

    async def stopped(self) -> None:
        task = asyncio.ensure_future(asyncio.sleep(FOR_EVER_S))
        await asyncio.sleep(0)
        task.cancel()
        await task

    @handles(Hold)
    async def fail(self, _: Hold) -> None:
        raise ZeroDivisionError

    @handles(Other)
    async def other(self, _: Other) -> str:
        return "here"


@on_both_loops
async def test_a_clean_up_that_ends_in_a_cancellation_ends_the_actor_all_the_same() -> None:
    system = ActorSystem()
    await system.spawn(Stubborn(), "older")
    ref = await system.spawn(CancelsItsOwn, "own", supervision=Supervision())
    with pytest.raises(HandlerFailed):
        await ref.ask(Hold(), timeout_s=FOR_EVER_S)
    assert await ref.ask(Other(), timeout_s=FOR_EVER_S) == "here"
    await system.close()
    assert system.names() == []


class Abort(BaseException):
    """No Exception."""


class Aborting(Actor):
    @handles(Hold)
    async def hold(self, _: Hold) -> None:
        raise Abort

    @handles(Other)
    async def other(self, _: Other) -> str:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        return "still here"


@on_both_loops
async def test_neither_a_foreign_exception_nor_a_late_cancel_ends_the_runner() -> None:
    system = ActorSystem()
    ref = await system.spawn(Aborting(), "aborting")
    for _ in range(3):
        with pytest.raises(HandlerFailed):
            await ref.ask(Hold(), timeout_s=FOR_EVER_S)
        assert await ref.ask(Other(), timeout_s=FOR_EVER_S) == "still here"
    await system.close()


class Watching(Actor):
    """Watches in `started`, as a restart does again."""

    ends: list[Ended]

    def __init__(self, whom: ActorRef, ends: list[Ended]) -> None:
        self.whom = whom
        self.ends = ends

    async def started(self) -> None:
        self.context.watch(self.whom)

    @handles(Ended)
    async def ended(self, ended: Ended) -> None:
        self.ends.append(ended)

    @handles(Hold)
    async def fail(self, _: Hold) -> None:
        raise ZeroDivisionError


@on_both_loops
async def test_a_watch_ends_with_the_watcher_and_is_heard_once_after_restarts() -> None:
    system, ends = ActorSystem(), list[Ended]()
    target = await system.spawn(Stubborn(), "target")
    watcher = await system.spawn(lambda: Watching(target, ends), "watcher")
    for _ in range(2):
        with pytest.raises(HandlerFailed):
            await watcher.ask(Hold(), timeout_s=FOR_EVER_S)
    gone = await system.spawn(lambda: Watching(target, []), "gone")
    await system.stop(gone.name)
    assert len(system.cells["target"].watchers) == 1
    await system.stop("target")
    while not ends:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [ended.reason for ended in ends] == ["stopped"]
    await system.close()


def test_an_override_handles_what_it_overrides_and_every_base_counts() -> None:
    class Louder(Stubborn):
        async def hold(self, _: Hold) -> str:
            return "loud"

    class Beside(Actor):
        @handles(Other)
        async def other(self, _: Other) -> str:
            return "beside"

    class Both(Louder, Beside):
        pass

    assert Louder.handlers[Hold].function is Louder.hold
    assert Both.handlers.keys() == {Hold, Other}
    assert Both.handlers[Hold].function is Louder.hold


@on_both_loops
async def test_of_two_nodes_with_one_id_the_older_ends_and_they_do_not_take_turns_for_ever() -> None:
    async with node("hub") as hub:
        await hub.spawn(Everyman(), "man")
        async with node("twin", SOON_DOWN) as older, node("twin", SOON_DOWN) as newer:
            assert await ask(older.ref("man", str(hub.address))) == "x"
            ended = asyncio.ensure_future(older.ref("man", str(hub.address)).ended())
            assert await ask(newer.ref("man", str(hub.address))) == "x"
            assert (await ended).reason == "node_down"
            assert isinstance(
                await outcome_of(older.ref("man", str(hub.address)).ask(Say(text="x"), timeout_s=9)), SllmError
            )
            assert await ask(newer.ref("man", str(hub.address))) == "x"
            (link,) = hub.stats().links
            assert link.connections < 10


@on_both_loops
async def test_a_reference_in_a_message_replaces_no_endpoint_that_is_known() -> None:
    async with node("a", QUICK) as a, node("b") as b:
        await b.spawn(Everyman(), "man")
        known = a.ref("man", str(b.address))
        stale = a._remotes._read_reference(["b", "tcp://127.0.0.1:1", 77, "man"])
        assert await ask(known) == "x"
        assert type(await ask(stale)) in (ActorDied, NodeUnreachable)


@on_both_loops
async def test_a_node_that_listens_everywhere_must_say_where_it_can_be_dialled() -> None:
    async with node("a", listen="", security=Security(secret=bytes(32))) as a:
        with pytest.raises(ConfigInvalid, match="advertise"):
            await a.listen("tcp://0.0.0.0:0")
        where = await a.listen("tcp://127.0.0.1:0", advertise="tcp://node-a.example:8401")
        assert where == "a@tcp://node-a.example:8401"
        assert a.address == NodeAddress("a", "tcp://node-a.example:8401", a.address.uid)


@on_both_loops
async def test_a_time_that_is_no_number_is_no_time() -> None:
    system = ActorSystem()
    ref = await system.spawn(Aborting(), "aborting")
    with pytest.raises(DeadlineExceeded):
        await ref.ask(Other(), timeout_s=float("nan"))
    await system.close()
