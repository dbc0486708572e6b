"""Actors on one loop: order, concurrency, deadlines, cancelling, streams, failures, ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import NamedTuple

import pytest
from loops import on_both_loops

from sllm_actor.errors import (
    ActorDied,
    DeadlineExceeded,
    HandlerFailed,
    InvalidRequest,
    MailboxFull,
    ModelNotFound,
    NoSuchActor,
    SllmError,
)
from sllm_actor.runtime import Actor, ActorRef, ActorSystem, Backlog, Limits, handles
from sllm_actor.runtime.tasks import TaskScope

FOR_EVER_S = 3600.0


class Note(NamedTuple):
    text: str


class Hold(NamedTuple):
    """Answered once the gate is open."""


class HoldAside(NamedTuple):
    """Like `Hold`, by a concurrent handler."""


class Count(NamedTuple):
    """Answered by a stream of so many numbers."""

    numbers: int


class Look(NamedTuple):
    """Answered by a plain function, with how much was seen."""


class Fail(NamedTuple):
    error: BaseException


class StopYourself(NamedTuple):
    pass


class Unheard(NamedTuple):
    pass


class Recorder(Actor):
    """Remembers what reached it, and lets a test open its gate."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.gate = asyncio.Event()
        self.begun = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.made = 0
        self.closed_streams = 0
        self.ends = 0

    @handles(Note)
    async def note(self, message: Note) -> str:
        self.seen.append(f"begin {message.text}")
        await asyncio.sleep(0)
        self.seen.append(f"end {message.text}")
        return message.text

    @handles(Hold)
    async def hold(self, _: Hold) -> str:
        return await self._held()

    @handles(HoldAside, concurrent=True)
    async def hold_aside(self, _: HoldAside) -> str:
        return await self._held()

    async def _held(self) -> str:
        self.begun.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return "held"

    @handles(Count)
    async def count(self, message: Count) -> AsyncGenerator[int, None]:
        try:
            for number in range(message.numbers):
                self.made += 1
                yield number
        finally:
            self.closed_streams += 1
            self.cancelled.set()

    @handles(Look)
    def look(self, _: Look) -> int:
        return len(self.seen)

    @handles(Fail)
    async def fail(self, message: Fail) -> None:
        raise message.error

    @handles(StopYourself)
    async def stop_yourself(self, _: StopYourself) -> None:
        await self.context.system.stop(self.context.self_ref.name)

    async def stopped(self) -> None:
        self.ends += 1


class Broken(Actor):
    """Its plain function has a bug."""

    @handles(Look)
    def look(self, _: Look) -> int:
        raise RuntimeError("a bug")


async def turn(times: int = 20) -> None:
    """Let everything that can run now do so."""
    for _ in range(times):
        await asyncio.sleep(0)


async def recorder(*, mailbox_messages: int = 16, stream_credit: int = 4) -> tuple[ActorSystem, Recorder, ActorRef]:
    system = ActorSystem(limits=Limits(mailbox_messages=mailbox_messages, stream_credit=stream_credit))
    actor = Recorder()
    return system, actor, await system.spawn(actor, "recorder")


@on_both_loops
async def test_messages_of_one_sender_are_handled_in_order_and_one_at_a_time() -> None:
    system, actor, ref = await recorder()
    for text in "abc":
        ref.tell(Note(text))
    assert await ref.ask(Note("d"), timeout_s=FOR_EVER_S) == "d"
    assert actor.seen == [f"{step} {text}" for text in "abcd" for step in ("begin", "end")]
    await system.close()


@on_both_loops
async def test_a_plain_function_answers_an_idle_actors_asker_without_a_turn_of_the_loop() -> None:
    system, _, ref = await recorder()
    await ref.ask(Note("a"), timeout_s=FOR_EVER_S)
    await turn()
    asking = ref.ask(Look(), timeout_s=FOR_EVER_S)
    with pytest.raises(StopIteration) as answered:
        asking.send(None)  # It is a coroutine, which has not waited for anything.
    assert answered.value.value == 2
    await system.close()


@on_both_loops
async def test_a_plain_function_that_has_a_bug_fails_its_asker_and_has_the_actor_made_anew() -> None:
    system = ActorSystem()
    ref = await system.spawn(Broken, "broken")
    for restarts in (1, 2):
        with pytest.raises(HandlerFailed):
            await ref.ask(Look(), timeout_s=FOR_EVER_S)
        await turn()
        assert system.cell("broken").restarts == restarts
    await system.close()


@on_both_loops
async def test_a_plain_function_waits_its_turn_behind_what_came_before_it() -> None:
    system, actor, ref = await recorder()
    await turn()
    async with asyncio.TaskGroup() as group:
        group.create_task(ref.ask(Hold(), timeout_s=FOR_EVER_S))
        await actor.begun.wait()
        ref.tell(Note("a"))
        asked = group.create_task(ref.ask(Look(), timeout_s=FOR_EVER_S))
        await turn()
        assert not asked.done()
        actor.gate.set()
    assert asked.result() == 2
    await system.close()


@on_both_loops
async def test_a_concurrent_handler_does_not_hold_up_the_messages_behind_it() -> None:
    system, actor, ref = await recorder()
    tasks = TaskScope("test")
    held = tasks.spawn(ref.ask(HoldAside(), timeout_s=FOR_EVER_S), "held")
    assert await ref.ask(Note("behind"), timeout_s=FOR_EVER_S) == "behind"
    assert not held.done()
    actor.gate.set()
    assert await held == "held"
    await system.close()


@on_both_loops
async def test_a_plain_handler_does_hold_up_the_messages_behind_it() -> None:
    system, actor, ref = await recorder()
    ref.tell(Hold())
    ref.tell(Note("behind"))
    await actor.begun.wait()
    await turn()
    assert actor.seen == []
    actor.gate.set()
    assert await ref.ask(Note("last"), timeout_s=FOR_EVER_S) == "last"
    assert actor.seen[0] == "begin behind"
    await system.close()


@on_both_loops
async def test_an_ask_past_its_deadline_fails_and_cancels_the_handler() -> None:
    system, actor, ref = await recorder()
    with pytest.raises(DeadlineExceeded, match="recorder did not answer Hold"):
        await ref.ask(Hold(), timeout_s=0.01)
    await actor.cancelled.wait()
    assert await ref.ask(Note("alive"), timeout_s=FOR_EVER_S) == "alive"
    await system.close()


@on_both_loops
async def test_cancelling_the_caller_cancels_the_handler() -> None:
    system, actor, ref = await recorder()
    caller = TaskScope("test").spawn(ref.ask(Hold(), timeout_s=FOR_EVER_S), "caller")
    await actor.begun.wait()
    caller.cancel()
    await actor.cancelled.wait()
    assert await ref.ask(Note("alive"), timeout_s=FOR_EVER_S) == "alive"
    await system.close()


@on_both_loops
async def test_an_ask_given_up_while_it_waits_is_never_handled() -> None:
    system, actor, ref = await recorder()
    ref.tell(Hold())
    await actor.begun.wait()
    with pytest.raises(DeadlineExceeded):
        await ref.ask(Note("given up"), timeout_s=0.01)
    actor.gate.set()
    await ref.ask(Note("kept"), timeout_s=FOR_EVER_S)
    assert actor.seen == ["begin kept", "end kept"]
    await system.close()


@on_both_loops
async def test_a_stream_runs_ahead_of_its_reader_by_no_more_than_the_credit() -> None:
    system, actor, ref = await recorder(stream_credit=4)
    async with aclosing(ref.stream(Count(100))) as numbers:
        assert await anext(numbers) == 0
        await turn()
        # One taken, four waiting, and the one that its maker holds in hand.
        assert actor.made == 6
        assert [number async for number in numbers] == list(range(1, 100))
    await system.close()


@on_both_loops
async def test_closing_a_stream_ends_its_handler() -> None:
    system, actor, ref = await recorder()
    async with aclosing(ref.stream(Count(10**9))) as numbers:
        assert [await anext(numbers) for _ in range(10)] == list(range(10))
    await actor.cancelled.wait()
    assert actor.closed_streams == 1
    assert actor.made < 30
    await system.close()


@on_both_loops
async def test_a_function_that_gives_a_generator_answers_a_stream() -> None:
    class Giver(Actor):
        @handles(Count, stream=True)
        def count(self, message: Count) -> AsyncGenerator[int, None]:
            if not message.numbers:
                raise InvalidRequest("none")
            return self._numbers(message.numbers)

        async def _numbers(self, numbers: int) -> AsyncGenerator[int, None]:
            for number in range(numbers):
                yield number

    system = ActorSystem()
    ref = await system.spawn(Giver(), "giver")
    assert [number async for number in ref.stream(Count(3))] == [0, 1, 2]
    with pytest.raises(InvalidRequest, match="none"):
        await anext(ref.stream(Count(0)))
    with pytest.raises(NoSuchActor):
        await ref.ask(Count(1), timeout_s=FOR_EVER_S)
    await system.close()


@on_both_loops
async def test_an_empty_stream_ends() -> None:
    system, _, ref = await recorder()
    assert [number async for number in ref.stream(Count(0))] == []
    await system.close()


@on_both_loops
async def test_a_backlog_tells_whether_the_next_item_of_a_stream_is_there_already() -> None:
    system, _, ref = await recorder()
    backlog = Backlog()
    assert not backlog
    more = [bool(backlog) async for _ in ref.stream(Count(3), backlog)]
    assert more == [True, True, False]
    await system.close()


@on_both_loops
async def test_a_stream_fails_after_its_items_with_what_its_handler_raised() -> None:
    class Torn(Actor):
        @handles(Count)
        async def count(self, message: Count) -> AsyncGenerator[int, None]:
            for number in range(message.numbers):
                yield number
            raise ModelNotFound("no more")

    system = ActorSystem(limits=Limits(stream_credit=8))
    ref = await system.spawn(Torn(), "torn")
    read = []
    with pytest.raises(ModelNotFound, match="no more"):
        async for number in ref.stream(Count(5)):
            read.append(number)
    assert read == [0, 1, 2, 3, 4]
    await system.close()


@on_both_loops
async def test_a_typed_error_reaches_the_caller_as_it_is() -> None:
    system, _, ref = await recorder()
    error = ModelNotFound("it is not here", param="model", retry_after_s=2.0)
    with pytest.raises(ModelNotFound) as caught:
        await ref.ask(Fail(error), timeout_s=FOR_EVER_S)
    assert caught.value is error
    await system.close()


@on_both_loops
async def test_an_untyped_failure_becomes_handler_failed_without_its_text_and_the_actor_lives_on() -> None:
    system, _, ref = await recorder()
    logging.disable(logging.CRITICAL)
    try:
        with pytest.raises(SllmError) as caught:
            await ref.ask(Fail(ZeroDivisionError("secret")), timeout_s=FOR_EVER_S)
    finally:
        logging.disable(logging.NOTSET)
    assert "secret" not in caught.value.message
    assert await ref.ask(Note("alive"), timeout_s=FOR_EVER_S) == "alive"
    await system.close()


@on_both_loops
async def test_a_handler_that_is_cancelled_from_inside_leaves_no_caller_waiting() -> None:
    system, _, ref = await recorder()
    with pytest.raises(ActorDied, match="gave up on Fail"):
        await ref.ask(Fail(asyncio.CancelledError()), timeout_s=FOR_EVER_S)
    assert await ref.ask(Note("alive"), timeout_s=FOR_EVER_S) == "alive"
    await system.close()


@on_both_loops
async def test_a_full_mailbox_refuses_an_ask_at_once_and_counts_a_tell_as_a_dead_letter() -> None:
    system, actor, ref = await recorder(mailbox_messages=3)
    ref.tell(Hold())
    await actor.begun.wait()
    for text in "abc":
        ref.tell(Note(text))
    assert system.dead_letters == 0
    with pytest.raises(MailboxFull) as caught:
        await ref.ask(Note("d"), timeout_s=FOR_EVER_S)
    assert caught.value.retry_after_s is not None
    ref.tell(Note("e"))
    assert system.dead_letters == 1
    actor.gate.set()
    await turn()
    assert await ref.ask(Note("f"), timeout_s=FOR_EVER_S) == "f"
    assert [seen for seen in actor.seen if seen.startswith("end")] == ["end a", "end b", "end c", "end f"]
    await system.close()


@on_both_loops
async def test_concurrent_handlers_are_bounded_like_the_mailbox_and_hold_up_no_others() -> None:
    system, actor, ref = await recorder(mailbox_messages=3)
    tasks = TaskScope("test")
    held = [tasks.spawn(ref.ask(HoldAside(), timeout_s=FOR_EVER_S), f"held-{k}") for k in range(3)]
    await turn()
    with pytest.raises(MailboxFull):
        await ref.ask(HoldAside(), timeout_s=FOR_EVER_S)
    assert await ref.ask(Note("a plain one"), timeout_s=FOR_EVER_S) == "a plain one"
    actor.gate.set()
    assert [await one for one in held] == ["held"] * 3
    assert await ref.ask(HoldAside(), timeout_s=FOR_EVER_S) == "held"
    await system.close()


@on_both_loops
async def test_a_message_to_nobody_fails_an_ask_and_a_stream_and_counts_a_tell() -> None:
    system, _, ref = await recorder()
    nobody = system.ref("nobody")
    with pytest.raises(NoSuchActor, match="there is no actor nobody"):
        await nobody.ask(Note("x"), timeout_s=FOR_EVER_S)
    with pytest.raises(NoSuchActor):
        await anext(nobody.stream(Count(1)))
    nobody.tell(Note("x"))
    with pytest.raises(NoSuchActor, match="does not handle Unheard"):
        await ref.ask(Unheard(), timeout_s=FOR_EVER_S)
    ref.tell(Unheard())
    assert system.dead_letters == 2
    await system.close()


@on_both_loops
async def test_stopping_an_actor_fails_what_runs_and_what_waits_with_actor_died() -> None:
    system, actor, ref = await recorder()
    tasks = TaskScope("test")
    asks = [
        tasks.spawn(ref.ask(message, timeout_s=FOR_EVER_S), str(k))
        for k, message in enumerate([HoldAside(), Hold(), Note("waits"), Note("waits too")])
    ]
    stream = ref.stream(Count(10**9))
    await actor.begun.wait()
    await turn()
    await system.stop("recorder")
    for ask in asks:
        with pytest.raises(ActorDied, match="recorder has stopped"):
            await ask
    assert actor.ends == 1
    with pytest.raises(NoSuchActor):
        await anext(stream)
    await system.close()


@on_both_loops
async def test_stopping_an_actor_fails_a_stream_that_is_being_read() -> None:
    system, _, ref = await recorder(stream_credit=2)
    read = []
    with pytest.raises(ActorDied):
        async for number in ref.stream(Count(10**9)):
            read.append(number)
            if number == 5:
                await system.stop("recorder")
    assert read == list(range(len(read)))
    assert 6 <= len(read) <= 10
    await system.close()


@on_both_loops
async def test_stopping_twice_at_once_stops_once_and_both_wait() -> None:
    system, actor, _ = await recorder()
    await asyncio.gather(system.stop("recorder"), system.stop("recorder"), system.close())
    assert actor.ends == 1
    assert system.names() == []


@on_both_loops
async def test_an_actor_can_stop_itself() -> None:
    system, actor, ref = await recorder()
    with pytest.raises(ActorDied):
        await ref.ask(StopYourself(), timeout_s=FOR_EVER_S)
    await turn()
    assert (actor.ends, system.names()) == (1, [])
    await system.close()


class SlowToStop(Recorder):
    async def stopped(self) -> None:
        await self.gate.wait()
        self.ends += 1


@on_both_loops
async def test_who_asks_an_actor_that_is_stopping_hears_at_once_that_it_has() -> None:
    system = ActorSystem()
    actor = SlowToStop()
    ref = await system.spawn(actor, "slow")
    assert await ref.ask(Note("before"), timeout_s=FOR_EVER_S) == "before"
    stop = TaskScope("test").spawn(system.stop("slow"), "stop")
    while not system.cells["slow"].closed:
        await asyncio.sleep(0)
    for asker in (ref, system.ref("slow")):
        for _ in range(2):
            with pytest.raises(ActorDied, match="slow has stopped"):
                await asker.ask(Note("after"), timeout_s=5)
            await turn()
    actor.gate.set()
    await stop
    assert actor.seen == ["begin before", "end before"]
    await system.close()


@on_both_loops
async def test_a_stop_whose_caller_is_cancelled_goes_on_to_its_end() -> None:
    system = ActorSystem()
    actor = SlowToStop()
    await system.spawn(actor, "slow")
    impatient = TaskScope("test").spawn(system.stop("slow"), "impatient")
    await turn()
    impatient.cancel()
    await turn()
    assert actor.ends == 0
    actor.gate.set()
    await system.close()
    assert actor.ends == 1


@on_both_loops
async def test_an_actor_that_fails_to_stop_keeps_no_other_from_stopping() -> None:
    class Broken(Actor):
        async def stopped(self) -> None:
            raise ZeroDivisionError

    system, actor, _ = await recorder()
    await system.spawn(Broken(), "broken")
    logging.disable(logging.CRITICAL)
    try:
        await system.close()
    finally:
        logging.disable(logging.NOTSET)
    assert (actor.ends, system.names()) == (1, [])


@on_both_loops
async def test_a_spawn_that_fails_leaves_nothing_and_fails_who_asked_meanwhile() -> None:
    entered, gate = asyncio.Event(), asyncio.Event()
    background: list[asyncio.Task[None]] = []

    class Unborn(Recorder):
        async def started(self) -> None:
            background.append(self.context.tasks.spawn(asyncio.sleep(FOR_EVER_S), "background"))
            entered.set()
            await gate.wait()
            raise ModelNotFound("nothing to start from")

    system = ActorSystem()
    tasks = TaskScope("test")
    spawning = tasks.spawn(system.spawn(Unborn(), "unborn"), "spawn", on_failure=lambda _: None)
    await entered.wait()
    asked = tasks.spawn(system.ref("unborn").ask(Note("x"), timeout_s=FOR_EVER_S), "ask", on_failure=lambda _: None)
    await turn()
    gate.set()
    with pytest.raises(ModelNotFound):
        await spawning
    with pytest.raises(ActorDied):
        await asked
    assert background[0].cancelled()
    assert system.names() == []
    await system.spawn(Recorder(), "unborn")
    await system.close()


@on_both_loops
async def test_closing_stops_the_youngest_first_and_lets_nothing_start_any_more() -> None:
    order: list[str] = []
    system = ActorSystem()

    class Ordered(Actor):
        async def stopped(self) -> None:
            order.append(self.context.self_ref.name)
            with pytest.raises(ActorDied):
                await system.spawn(Recorder(), "late")

    for name in ("first", "second", "third"):
        await system.spawn(Ordered(), name)
    assert system.names() == ["first", "second", "third"]
    await system.close()
    assert order == ["third", "second", "first"]


@on_both_loops
async def test_stopping_an_actor_ends_its_background_work() -> None:
    class Worker(Actor):
        async def started(self) -> None:
            self.task = self.context.tasks.spawn(asyncio.sleep(FOR_EVER_S), "work")

    system = ActorSystem()
    worker = Worker()
    await system.spawn(worker, "worker")
    await system.close()
    assert worker.task.cancelled()


@on_both_loops
async def test_asking_for_a_stream_and_streaming_an_answer_are_refused() -> None:
    system, _, ref = await recorder()
    with pytest.raises(NoSuchActor, match="by a stream"):
        await ref.ask(Count(1), timeout_s=FOR_EVER_S)
    with pytest.raises(NoSuchActor, match="no stream"):
        await anext(ref.stream(Note("x")))
    ref.tell(Count(1))
    assert system.dead_letters == 1
    with pytest.raises(AssertionError):
        await system.spawn(Recorder(), "recorder")
    await system.close()


@on_both_loops
async def test_a_task_scope_reports_a_failure_and_takes_nothing_once_closed() -> None:
    failures: list[BaseException] = []
    scope = TaskScope("test")

    async def fail() -> None:
        raise ModelNotFound("gone")

    scope.spawn(fail(), "fail", on_failure=failures.append)
    waiting = scope.spawn(asyncio.sleep(FOR_EVER_S), "wait")
    await turn()
    assert [str(failure) for failure in failures] == ["gone"]
    await scope.close()
    assert waiting.cancelled()
    assert len(scope) == 0
    with pytest.raises(asyncio.CancelledError):
        scope.spawn(fail(), "late")


def test_a_subclass_inherits_and_overrides_handlers_and_one_class_handles_a_message_once() -> None:
    class Louder(Recorder):
        @handles(Note)
        async def louder(self, message: Note) -> str:
            return message.text.upper()

    assert Louder.handlers[Note].function is Louder.louder
    assert Louder.handlers[Hold].function is Recorder.hold
    with pytest.raises(AssertionError, match="handles Note twice"):

        class Twice(Actor):
            @handles(Note)
            async def one(self, message: Note) -> None: ...

            @handles(Note)
            async def two(self, message: Note) -> None: ...
