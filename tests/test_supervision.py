"""What becomes of actors that fail, stop, are watched, are late, or are many. Time is virtual where it matters."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing
from typing import Any, NamedTuple

import pytest
from loops import on_both_loops

from sllm_actor.errors import ActorDied, DeadlineExceeded, HandlerFailed, MailboxFull, ModelNotFound, SllmError
from sllm_actor.runtime import Actor, ActorRef, ActorSystem, Ended, Limits, Supervision, handles
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.testing.virtual_loop import VirtualLoop, run_virtual

FOR_EVER_S = 3600.0
NEVER = Supervision(restarts=0)


class Note(NamedTuple):
    text: str = ""


class Aside(NamedTuple):
    """Like `Note`, by a concurrent handler."""

    text: str = ""


class Urgent(NamedTuple):
    text: str = ""


class Crash(NamedTuple):
    pass


class CrashAside(NamedTuple):
    pass


class CrashStream(NamedTuple):
    pass


class Nap(NamedTuple):
    """Takes so long."""

    nap_s: float


class NapAside(NamedTuple):
    nap_s: float


class Count(NamedTuple):
    """A number each second."""

    numbers: int


class AskOn(NamedTuple):
    """Ask another for `message`."""

    ref: ActorRef
    message: Any
    timeout_s: float


class TellLater(NamedTuple):
    """Ask another from a background task."""

    ref: ActorRef
    message: Any


class Swallow(NamedTuple):
    """Its handler goes on when it is cancelled."""


class Flood(NamedTuple):
    left: int


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The failures here are meant."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def virtually(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Make a test that runs on a virtual loop, where hours take no time."""

    def run() -> None:
        run_virtual(test, limit_s=100_000.0)

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run


def now_s() -> float:
    return VirtualLoop.running().now_s


def virtual_system(**options: Any) -> ActorSystem:
    return ActorSystem(clock=VirtualLoop.running().clock, **options)


async def turn(times: int = 20) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


class Log:
    """What happened, and how many objects there were."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.made = 0
        self.ends: list[Ended] = []


class Subject(Actor):
    """Does whatever a test asks; its log outlives it."""

    def __init__(self, log: Log, name: str = "") -> None:
        self.log = log
        self.log.made += 1
        self.number = log.made
        self.name = name

    async def stopped(self) -> None:
        self.log.lines.append(f"stopped {self.name or self.number}")

    @handles(Note)
    async def note(self, message: Note) -> int:
        self.log.lines.append(message.text)
        return self.number

    @handles(Aside, concurrent=True)
    async def aside(self, message: Aside) -> int:
        self.log.lines.append(message.text)
        return self.number

    @handles(Urgent, priority=True)
    async def urgent(self, message: Urgent) -> int:
        self.log.lines.append(message.text)
        return self.number

    @handles(Crash)
    async def crash(self, _: Crash) -> None:
        raise ZeroDivisionError

    @handles(CrashAside, concurrent=True)
    async def crash_aside(self, _: CrashAside) -> None:
        raise ZeroDivisionError

    @handles(CrashStream)
    async def crash_stream(self, _: CrashStream) -> AsyncGenerator[int, None]:
        yield 1
        raise ZeroDivisionError

    async def _nap(self, nap_s: float) -> float:
        try:
            await asyncio.sleep(nap_s)
        except asyncio.CancelledError:
            self.log.lines.append("cancelled")
            raise
        self.log.lines.append("woke")
        return nap_s

    @handles(Nap)
    async def nap(self, message: Nap) -> float:
        return await self._nap(message.nap_s)

    @handles(NapAside, concurrent=True)
    async def nap_aside(self, message: NapAside) -> float:
        return await self._nap(message.nap_s)

    @handles(Count)
    async def count(self, message: Count) -> AsyncGenerator[int, None]:
        for number in range(message.numbers):
            await asyncio.sleep(1.0)
            yield number

    @handles(AskOn)
    async def ask_on(self, message: AskOn) -> Any:
        return await message.ref.ask(message.message, timeout_s=message.timeout_s)

    @handles(TellLater)
    async def tell_later(self, message: TellLater) -> None:
        async def ask() -> None:
            answer = await message.ref.ask(message.message, timeout_s=FOR_EVER_S)
            self.log.lines.append(f"background: {answer}")

        self.context.tasks.spawn(ask(), "ask")

    @handles(Swallow)
    async def swallow(self, _: Swallow) -> str:
        try:
            await asyncio.sleep(FOR_EVER_S)
        except asyncio.CancelledError:
            self.log.lines.append("swallowed")
            await asyncio.sleep(1.0)
            self.log.lines.append("went on")
        return "late"

    @handles(Flood)
    async def flood(self, message: Flood) -> None:
        if message.left:
            self.context.self_ref.tell(Flood(message.left - 1))

    @handles(Ended)
    async def gone(self, ended: Ended) -> None:
        self.log.ends.append(ended)


async def restartable(
    system: ActorSystem, log: Log, name: str = "subject", supervision: Supervision | None = None
) -> ActorRef:
    return await system.spawn(lambda: Subject(log), name, supervision=supervision)


def family(log: Log, levels: int, supervisions: dict[str, Supervision] | None = None) -> Callable[[], Actor]:
    """Make an actor with a line of descendants: `0`, `0/1`, `0/1/2`."""

    def make(level: int) -> Actor:
        class Ancestor(Subject):
            async def started(self) -> None:
                self.log.lines.append(f"started {level}")
                if level < levels:
                    given = (supervisions or {}).get(str(level + 1))
                    await self.context.spawn(lambda: make(level + 1), str(level + 1), supervision=given)

        return Ancestor(log, str(level))

    return lambda: make(0)


# Restarts.


@on_both_loops
async def test_a_restart_keeps_the_reference_and_the_mailbox_and_makes_a_new_object() -> None:
    system, log = ActorSystem(), Log()
    ref = await restartable(system, log)
    tasks = TaskScope("test")
    failed = tasks.spawn(ref.ask(Crash(), timeout_s=FOR_EVER_S), "crash", on_failure=lambda _: None)
    await asyncio.sleep(0)
    ref.tell(Note("kept"))
    waiting = tasks.spawn(ref.ask(Note("kept, too"), timeout_s=FOR_EVER_S), "note")
    with pytest.raises(HandlerFailed):
        await failed
    assert await waiting == 2
    assert log.lines == ["stopped 1", "kept", "kept, too"]
    assert system.stats().actors[0].restarts == 1
    await system.close()
    assert log.lines[-1] == "stopped 2"


@virtually
async def test_failures_further_apart_than_the_window_are_always_forgiven() -> None:
    log = Log()
    system = virtual_system(on_escalation=lambda *_: log.lines.append("escalated"))
    ref = await restartable(system, log, supervision=Supervision(restarts=2, window_s=5.0))
    for _ in range(20):
        ref.tell(Crash())
        await asyncio.sleep(2.6)
    assert await ref.ask(Note("alive"), timeout_s=1.0) == 21
    assert "escalated" not in log.lines
    await system.close()


@virtually
async def test_one_failure_too_many_within_the_window_ends_the_actor_and_escalates_once() -> None:
    log = Log()
    escalated: list[tuple[str, str]] = []
    system = virtual_system(on_escalation=lambda ref, error: escalated.append((ref.name, type(error).__name__)))
    ref = await restartable(system, log, supervision=Supervision(restarts=2, window_s=5.0))
    for _ in range(3):
        ref.tell(Crash())
        await asyncio.sleep(1.0)
    with pytest.raises(SllmError):
        await ref.ask(Note("dead"), timeout_s=1.0)
    assert escalated == [("subject", "ZeroDivisionError")]
    assert (await ref.ended()).reason == "no_such_actor"
    assert log.lines == ["stopped 1", "stopped 2", "stopped 3"]
    assert system.names() == []
    await system.close()


@virtually
async def test_what_waits_for_an_actor_that_failed_too_often_is_not_handled_and_told_so() -> None:
    system, log = virtual_system(on_escalation=lambda *_: None), Log()
    ref = await restartable(system, log, supervision=NEVER)
    tasks = TaskScope("test")
    ref.tell(Crash())
    waiting = tasks.spawn(ref.ask(Note("late"), timeout_s=FOR_EVER_S), "note", on_failure=lambda _: None)
    with pytest.raises(ActorDied):
        await waiting
    assert log.lines == ["stopped 1"]
    await system.close()


@virtually
async def test_a_child_that_fails_too_often_fails_its_parent_and_that_its_own() -> None:
    log = Log()
    escalated: list[str] = []
    system = virtual_system(on_escalation=lambda ref, _: escalated.append(ref.name))
    parents = {"1": NEVER, "2": NEVER}
    await system.spawn(family(log, 2, parents), "0", supervision=Supervision(restarts=1, window_s=FOR_EVER_S))
    assert system.names() == ["0", "0/1", "0/1/2"]
    log.lines.clear()
    system.ref("0/1/2").tell(Crash())
    await asyncio.sleep(1.0)
    # Both below could not be made anew; the oldest was, and made them.
    assert system.names() == ["0", "0/1", "0/1/2"]
    assert log.lines == ["stopped 2", "stopped 1", "stopped 0", "started 0", "started 1", "started 2"]
    assert escalated == []
    system.ref("0/1/2").tell(Crash())
    await asyncio.sleep(1.0)
    assert escalated == ["0"]
    assert system.names() == []
    await system.close()


@virtually
async def test_a_child_that_fails_too_often_while_its_parent_starts_fails_the_parent_at_once() -> None:
    log = Log()

    class Parent(Subject):
        async def started(self) -> None:
            if self.number == 1:
                child = await self.context.spawn(lambda: Subject(Log()), "child", supervision=NEVER)
                child.tell(Crash())
                await asyncio.sleep(1.0)

    system = virtual_system()
    await system.spawn(lambda: Parent(log), "parent")
    await asyncio.sleep(1.0)
    assert log.made == 2
    await system.close()


@virtually
async def test_a_parent_that_can_not_be_made_anew_passes_the_failure_on_and_lives() -> None:
    log = Log()
    escalated: list[str] = []

    class Parent(Subject):
        async def started(self) -> None:
            await self.context.spawn(lambda: Subject(log), "child", supervision=NEVER)

    system = virtual_system(on_escalation=lambda ref, _: escalated.append(ref.name))
    parent = await system.spawn(Parent(log), "parent")
    system.ref("parent/child").tell(Crash())
    await asyncio.sleep(1.0)
    assert escalated == ["parent"]
    assert system.names() == ["parent"]
    assert await parent.ask(Note("alive"), timeout_s=1.0) == 1
    await system.close()


@virtually
async def test_a_start_that_fails_on_a_restart_counts_as_a_failure() -> None:
    class Fragile(Subject):
        async def started(self) -> None:
            if 1 < self.number < 4:
                raise ModelNotFound("not yet")

    system, log = virtual_system(), Log()
    ref = await system.spawn(lambda: Fragile(log), "fragile", supervision=Supervision(restarts=3, window_s=9.0))
    ref.tell(Crash())
    assert await ref.ask(Note("at last"), timeout_s=1.0) == 4
    assert system.stats().actors[0].restarts == 3
    ref.tell(Crash())
    with pytest.raises(ActorDied):
        await ref.ask(Note("one too many"), timeout_s=1.0)
    await system.close()


@virtually
async def test_a_start_after_a_failure_has_no_deadline_of_the_message_that_failed() -> None:
    class Careful(Subject):
        async def started(self) -> None:
            if self.number > 1:
                await self.context.system.ref("slow").ask(Nap(3.0), timeout_s=10.0)

    system, log = virtual_system(), Log()
    await system.spawn(Subject(Log()), "slow")
    ref = await system.spawn(lambda: Careful(log), "careful")
    with pytest.raises(HandlerFailed):
        await ref.ask(Crash(), timeout_s=1.0)
    assert await ref.ask(Note(), timeout_s=5.0) == 2
    await system.close()


async def crashes_aside(message: Any) -> None:
    system, log = ActorSystem(), Log()
    ref = await restartable(system, log)
    with pytest.raises(HandlerFailed):
        if isinstance(message, CrashStream):
            async with aclosing(ref.stream(message)) as items:
                async for _ in items:
                    pass
        else:
            await ref.ask(message, timeout_s=FOR_EVER_S)
    assert await ref.ask(Note(), timeout_s=FOR_EVER_S) == 2
    await system.close()


@on_both_loops
async def test_a_concurrent_handler_that_fails_restarts_its_actor() -> None:
    await crashes_aside(CrashAside())


@on_both_loops
async def test_a_stream_that_fails_restarts_its_actor_and_fails_its_reader() -> None:
    await crashes_aside(CrashStream())


@virtually
async def test_a_restart_cancels_the_other_handlers_that_run_and_tells_their_askers() -> None:
    system, log = virtual_system(), Log()
    ref = await restartable(system, log)
    tasks = TaskScope("test")
    napping = tasks.spawn(ref.ask(NapAside(60.0), timeout_s=FOR_EVER_S), "nap", on_failure=lambda _: None)
    await asyncio.sleep(1.0)
    ref.tell(Crash())
    with pytest.raises(ActorDied):
        await napping
    assert log.lines == ["cancelled", "stopped 1"]
    await system.close()


@on_both_loops
async def test_an_actor_made_from_an_instance_goes_on_after_a_failure() -> None:
    system, log = ActorSystem(), Log()
    ref = await system.spawn(Subject(log), "subject")
    for message in (Crash(), CrashAside()):
        with pytest.raises(HandlerFailed):
            await ref.ask(message, timeout_s=FOR_EVER_S)
    assert await ref.ask(Note(), timeout_s=FOR_EVER_S) == 1
    assert system.stats().actors[0].restarts == 0
    await system.close()


@virtually
async def test_a_caller_that_is_cancelled_just_when_the_handler_fails_does_not_end_the_actor() -> None:
    system, log = virtual_system(), Log()
    tasks = TaskScope("test")
    asked: list[asyncio.Task[Any]] = []

    class Spiteful(Subject):
        @handles(Crash)
        async def crash(self, _: Crash) -> None:
            asyncio.get_running_loop().call_soon(asked[0].cancel)
            raise ZeroDivisionError

    ref = await system.spawn(lambda: Spiteful(log), "spiteful")
    asked.append(tasks.spawn(ref.ask(Crash(), timeout_s=5.0), "crash"))
    await asyncio.sleep(0)
    ref.tell(Note("behind"))
    assert await ref.ask(Note("alive"), timeout_s=5.0) == 2
    await system.close()


# Ends.


@virtually
async def test_children_stop_before_their_parent_and_the_youngest_first() -> None:
    log = Log()

    class Parent(Subject):
        async def started(self) -> None:
            for name in ("eldest", "middle", "youngest"):
                await self.context.spawn(Subject(log, name), name)

    system = virtual_system()
    await system.spawn(Parent(log, "parent"), "parent")
    await system.stop("parent")
    assert log.lines == ["stopped youngest", "stopped middle", "stopped eldest", "stopped parent"]
    assert system.names() == []
    await system.close()


@virtually
async def test_a_clean_up_that_fails_does_not_keep_the_others_from_theirs() -> None:
    log = Log()

    class Broken(Subject):
        async def stopped(self) -> None:
            await super().stopped()
            raise ZeroDivisionError

    class Parent(Subject):
        async def started(self) -> None:
            await self.context.spawn(Subject(log, "eldest"), "eldest")
            await self.context.spawn(Broken(log, "broken"), "broken")

    system = virtual_system()
    ref = await system.spawn(lambda: Parent(log, "parent"), "parent")
    ref.tell(Crash())
    await asyncio.sleep(1.0)
    assert system.names() == ["parent", "parent/eldest", "parent/broken"]
    assert log.lines == ["stopped broken", "stopped eldest", "stopped parent"]
    await system.close()
    assert log.lines == ["stopped broken", "stopped eldest", "stopped parent"] * 2


@virtually
async def test_a_stop_during_the_clean_up_of_a_restart_lets_it_finish_and_cleans_up_once() -> None:
    log = Log()

    class Slow(Subject):
        async def stopped(self) -> None:
            await asyncio.sleep(5.0)
            await super().stopped()

    system = virtual_system()
    ref = await system.spawn(lambda: Slow(log), "slow")
    ref.tell(Crash())
    await asyncio.sleep(1.0)
    await system.stop("slow")
    assert log.lines == ["stopped 1"]
    assert system.names() == []
    await system.close()


@virtually
async def test_a_stop_during_the_start_of_a_restart_ends_the_actor_and_fails_who_waits() -> None:
    log = Log()

    class Slow(Subject):
        async def started(self) -> None:
            if self.number > 1:
                await asyncio.sleep(5.0)

    system = virtual_system()
    ref = await system.spawn(lambda: Slow(log), "slow")
    ref.tell(Crash())
    waiting = TaskScope("test").spawn(ref.ask(Note("never"), timeout_s=60.0), "note", on_failure=lambda _: None)
    await asyncio.sleep(1.0)
    await system.stop("slow")
    with pytest.raises(ActorDied):
        await waiting
    assert "never" not in log.lines
    assert system.names() == []
    await system.close()


@virtually
async def test_stopping_a_parent_while_its_child_restarts_ends_both() -> None:
    log = Log()

    class Child(Subject):
        async def started(self) -> None:
            if self.number > 1:
                await asyncio.sleep(5.0)

    class Parent(Subject):
        async def started(self) -> None:
            await self.context.spawn(lambda: Child(log), "child")

    system = virtual_system()
    await system.spawn(lambda: Parent(Log()), "parent")
    system.ref("parent/child").tell(Crash())
    await asyncio.sleep(1.0)
    began_s = now_s()
    await system.stop("parent")
    assert now_s() - began_s < 5.0
    assert system.names() == []
    await system.close()


@virtually
async def test_a_parent_that_stops_can_not_spawn() -> None:
    log = Log()

    class Parent(Subject):
        async def stopped(self) -> None:
            with pytest.raises(ActorDied):
                await self.context.spawn(Subject(log), "late")
            log.lines.append("refused")

    system = virtual_system()
    await system.spawn(Parent(log), "parent")
    await system.stop("parent")
    assert log.lines == ["refused"]
    assert system.names() == []
    await system.close()


@virtually
async def test_nothing_that_a_parent_made_survives_its_restart() -> None:
    log = Log()

    class Slow(Subject):
        async def stopped(self) -> None:
            await asyncio.sleep(1.0)

    class Parent(Subject):
        async def started(self) -> None:
            if self.number == 1:
                await self.context.spawn(Slow(Log()), "child")
                self.context.tasks.spawn(self._more(), "more")

        async def _more(self) -> None:
            await asyncio.sleep(1.5)
            await self.context.spawn(Slow(Log()), "late")

    system = virtual_system()
    ref = await system.spawn(lambda: Parent(log), "parent")
    await asyncio.sleep(1.0)
    ref.tell(Crash())
    await asyncio.sleep(10.0)
    assert system.names() == ["parent"]
    assert log.made == 2
    await system.close()


# Draining.


@virtually
async def test_a_drain_handles_what_had_come_and_refuses_what_is_new() -> None:
    system, log = virtual_system(), Log()
    ref = await system.spawn(Subject(log), "subject")
    tasks = TaskScope("test")
    ref.tell(Nap(1.0))
    ref.tell(Note("had come"))
    aside = tasks.spawn(ref.ask(NapAside(3.0), timeout_s=60.0), "aside")
    read: list[int] = []

    async def reads() -> None:
        async with aclosing(ref.stream(Count(5))) as items:
            async for item in items:
                read.append(item)

    reading = tasks.spawn(reads(), "stream")
    await asyncio.sleep(0.5)
    stopping = tasks.spawn(system.stop("subject", drain_s=60.0), "stop")
    await asyncio.sleep(0)
    with pytest.raises(ActorDied):
        await ref.ask(Note("new"), timeout_s=1.0)
    assert await aside == 3.0
    await stopping
    await reading
    assert read == [0, 1, 2, 3, 4]
    assert log.lines == ["woke", "had come", "woke", "stopped 1"]
    await system.close()


@virtually
async def test_a_drain_that_takes_too_long_is_cut_off() -> None:
    system, log = virtual_system(), Log()
    ref = await system.spawn(Subject(log), "subject")
    tasks = TaskScope("test")
    napping = tasks.spawn(ref.ask(Nap(60.0), timeout_s=FOR_EVER_S), "nap", on_failure=lambda _: None)
    behind = tasks.spawn(ref.ask(Note("behind"), timeout_s=FOR_EVER_S), "note", on_failure=lambda _: None)
    await asyncio.sleep(1.0)
    began_s = now_s()
    await system.stop("subject", drain_s=5.0)
    assert now_s() - began_s == pytest.approx(5.0)
    for ask in (napping, behind):
        with pytest.raises(ActorDied):
            await ask
    assert log.lines == ["cancelled", "stopped 1"]
    await system.close()


@virtually
async def test_a_drain_with_nothing_to_do_takes_no_time() -> None:
    system, log = virtual_system(), Log()
    await system.spawn(Subject(log), "subject")
    began_s = now_s()
    await system.stop("subject", drain_s=60.0)
    assert now_s() == began_s
    await system.close()


# Watching.


async def watcher_of(system: ActorSystem, mailbox_log: Log) -> tuple[Subject, ActorRef]:
    actor = Subject(mailbox_log)
    return actor, await system.spawn(actor, "watcher")


@virtually
async def test_a_watcher_hears_nothing_of_a_restart_and_once_of_the_end() -> None:
    system, log, heard = virtual_system(on_escalation=lambda *_: None), Log(), Log()
    watcher, _ = await watcher_of(system, heard)
    ref = await restartable(system, log, supervision=Supervision(restarts=1))
    watcher.context.watch(ref)
    ref.tell(Crash())
    await asyncio.sleep(1.0)
    assert log.made == 2
    assert heard.ends == []
    ref.tell(Crash())
    await asyncio.sleep(1.0)
    assert [(end.ref, end.reason) for end in heard.ends] == [(ref, "failed")]
    await system.close()
    assert len(heard.ends) == 1


@virtually
async def test_who_stops_watching_hears_nothing() -> None:
    system, log, heard = virtual_system(), Log(), Log()
    watcher, _ = await watcher_of(system, heard)
    ref = await restartable(system, log)
    stop, kept = watcher.context.watch(ref), watcher.context.watch(ref)
    stop()
    stop()
    await system.stop("subject")
    await turn()
    assert [end.reason for end in heard.ends] == ["stopped"]
    kept()
    await system.close()


@virtually
async def test_an_actor_that_watches_twice_hears_twice() -> None:
    system, log, heard = virtual_system(), Log(), Log()
    watcher, _ = await watcher_of(system, heard)
    ref = await restartable(system, log)
    watcher.context.watch(ref)
    watcher.context.watch(ref)
    await system.stop("subject")
    await turn()
    assert len(heard.ends) == 2
    await system.close()


@virtually
async def test_watching_one_that_is_dead_is_answered_at_once() -> None:
    system, heard = virtual_system(), Log()
    watcher, _ = await watcher_of(system, heard)
    watcher.context.watch(system.ref("nobody"))
    await turn()
    assert [(end.ref.name, end.reason) for end in heard.ends] == [("nobody", "no_such_actor")]
    await system.close()


@virtually
async def test_watching_oneself_does_no_harm() -> None:
    system, heard = virtual_system(), Log()
    watcher, ref = await watcher_of(system, heard)
    watcher.context.watch(ref)
    await system.stop("watcher")
    await turn()
    assert heard.ends == []
    assert heard.lines == ["stopped 1"]
    await system.close()


@virtually
async def test_an_end_is_heard_though_the_mailbox_is_full() -> None:
    system, log, heard = virtual_system(limits=Limits(mailbox_messages=2, control_messages=1)), Log(), Log()
    watcher, ref = await watcher_of(system, heard)
    for name in ("x", "y", "z"):
        watcher.context.watch(await restartable(system, log, name))
    ref.tell(Nap(5.0))
    await asyncio.sleep(1.0)
    ref.tell(Note("1"))
    ref.tell(Note("2"))
    ref.tell(Urgent("urgent"))
    ref.tell(Note("one too many"))
    assert system.dead_letters == 1
    for name in ("x", "y", "z"):
        await system.stop(name)
    await asyncio.sleep(10.0)
    assert [end.ref.name for end in heard.ends] == ["x", "y", "z"]
    assert heard.lines == ["woke", "urgent", "1", "2"]
    await system.close()


# The mailbox.


@virtually
async def test_priority_messages_overtake_and_have_a_bound_of_their_own() -> None:
    system, log = virtual_system(limits=Limits(mailbox_messages=2, control_messages=2)), Log()
    ref = await system.spawn(Subject(log), "subject")
    ref.tell(Nap(1.0))
    await asyncio.sleep(0.5)
    for text in ("1", "2", "refused"):
        ref.tell(Note(text))
    for text in ("first", "second", "refused"):
        ref.tell(Urgent(text))
    assert system.dead_letters == 2
    with pytest.raises(MailboxFull):
        await ref.ask(Urgent("refused"), timeout_s=1.0)
    await asyncio.sleep(5.0)
    assert log.lines == ["woke", "first", "second", "1", "2"]
    await system.close()


@virtually
async def test_a_mailbox_of_one_takes_one_while_another_is_handled() -> None:
    system, log = virtual_system(limits=Limits(mailbox_messages=1)), Log()
    ref = await system.spawn(Subject(log), "subject")
    ref.tell(Nap(1.0))
    await asyncio.sleep(0.5)
    ref.tell(Note("waits"))
    with pytest.raises(MailboxFull):
        await ref.ask(Note("refused"), timeout_s=5.0)
    await asyncio.sleep(1.0)
    assert await ref.ask(Note("later"), timeout_s=1.0) == 1
    assert log.lines == ["woke", "waits", "later"]
    await system.close()


@on_both_loops
async def test_an_actor_that_floods_itself_lets_others_have_their_turns() -> None:
    system, log = ActorSystem(), Log()
    flood = await system.spawn(Subject(log), "flood")
    other = await system.spawn(Subject(log), "other")
    flood.tell(Flood(100_000))
    for _ in range(20):
        await other.ask(Note(), timeout_s=FOR_EVER_S)
    await turn()
    handled = next(actor.handled for actor in system.stats().actors if actor.name == "flood")
    # Each ask takes a few rounds of the loop, in each of which the other has a turn of 64.
    assert 0 < handled < 20 * 64 * 10
    await system.close()


@on_both_loops
async def test_ten_thousand_actors_live_side_by_side_and_stop() -> None:
    system, log = ActorSystem(), Log()
    refs = [await system.spawn(Subject(log), f"actor-{number}") for number in range(10_000)]
    answers = await asyncio.gather(*(ref.ask(Note("x"), timeout_s=FOR_EVER_S) for ref in refs))
    assert answers == list(range(1, 10_001))
    await system.close()
    assert len(log.lines) == 20_000


# Deadlines and cancelling.


@virtually
async def test_a_nested_ask_has_the_smaller_of_the_two_deadlines() -> None:
    system, log = virtual_system(), Log()
    first = await system.spawn(Subject(log), "first")
    second = await system.spawn(Subject(log), "second")
    began_s = now_s()
    with pytest.raises(DeadlineExceeded):
        await first.ask(AskOn(second, Nap(60.0), 30.0), timeout_s=2.0)
    assert now_s() - began_s == pytest.approx(2.0, abs=0.01)
    await asyncio.sleep(0.1)
    assert log.lines == ["cancelled"]
    with pytest.raises(DeadlineExceeded, match="second did not answer"):
        await first.ask(AskOn(second, Nap(60.0), 3.0), timeout_s=20.0)
    assert now_s() - began_s == pytest.approx(5.1, abs=0.02)
    await system.close()


@virtually
async def test_a_background_task_does_not_inherit_the_deadline_of_the_message_that_began_it() -> None:
    system, log = virtual_system(), Log()
    first = await system.spawn(Subject(log), "first")
    second = await system.spawn(Subject(Log()), "second")
    await first.ask(TellLater(second, Nap(60.0)), timeout_s=1.0)
    await asyncio.sleep(61.0)
    assert log.lines == ["background: 60.0"]
    await system.close()


@virtually
async def test_a_message_whose_time_is_over_is_dropped_when_its_turn_comes() -> None:
    system, log = virtual_system(), Log()
    ref = await system.spawn(Subject(log), "subject")
    ref.tell(Nap(5.0))
    began_s = now_s()
    with pytest.raises(DeadlineExceeded):
        await ref.ask(Note("too late"), timeout_s=1.0)
    assert now_s() - began_s == pytest.approx(1.0, abs=0.01)
    assert await ref.ask(Note("in time"), timeout_s=60.0) == 1
    assert log.lines == ["woke", "in time"]
    await system.close()


@virtually
async def test_a_handler_that_swallows_its_cancellation_holds_up_its_actor_but_not_its_asker() -> None:
    system, log = virtual_system(), Log()
    ref = await system.spawn(Subject(log), "subject")
    began_s = now_s()
    with pytest.raises(DeadlineExceeded):
        await ref.ask(Swallow(), timeout_s=2.0)
    assert now_s() - began_s == pytest.approx(2.0, abs=0.01)
    assert await ref.ask(Note("next"), timeout_s=10.0) == 1
    assert log.lines == ["swallowed", "went on", "next"]
    await system.close()
    assert log.lines[-1] == "stopped 1"


@virtually
async def test_cancelling_an_asker_cancels_the_ask_that_its_handler_makes() -> None:
    system, log = virtual_system(), Log()
    first = await system.spawn(Subject(log), "first")
    second = await system.spawn(Subject(log), "second")
    asking = TaskScope("test").spawn(first.ask(AskOn(second, Nap(60.0), 60.0), timeout_s=60.0), "ask")
    await asyncio.sleep(1.0)
    asking.cancel()
    await asyncio.sleep(0.1)
    assert log.lines == ["cancelled"]
    for ref in (first, second):
        assert await ref.ask(Note("alive"), timeout_s=1.0) in (1, 2)
    await system.close()
