"""Actors on other nodes: the same answers, order, deadlines, cancelling, streams and ends as here, and what differs."""

from __future__ import annotations

import asyncio
import math
from contextlib import aclosing

import msgspec
import pytest
from loops import LoopFactory
from remote_pairs import (
    CAN_NOT_TRAVEL,
    CAN_TRAVEL,
    FOR_EVER_S,
    GIVEN,
    KIB,
    LOOPS,
    MIB,
    PLACES,
    QUICK,
    Acquainted,
    BlobStream,
    Carry,
    Count,
    Crash,
    Everyman,
    Give,
    GiveStream,
    Hold,
    HoldAside,
    Introduce,
    Loose,
    NotInTheTable,
    OpenGate,
    Pair,
    Raise,
    Relay,
    Say,
    Unheard,
    WatchIt,
    everywhere,
    link_of,
    node,
    on_both_loops,
    outcome,
    pair,
    run_on,
    until,
)

from sllm_actor.errors import (
    ActorDied,
    DeadlineExceeded,
    FrameInvalid,
    FrameTooLong,
    HandlerFailed,
    MailboxFull,
    ModelNotFound,
    NodeUnreachable,
    NoSuchActor,
    SllmError,
)
from sllm_actor.runtime import Actor, ActorRef, ActorSystem, Blob, FreeForm, NodeAddress, Supervision
from sllm_actor.runtime.calls import CURRENT, NO_ENVELOPE
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.runtime.values import MAX_FREE_FORM_BYTES, MAX_FREE_FORM_ITEMS

# The same, wherever the actor is.


@everywhere
async def test_an_ask_is_answered_and_a_tell_is_handled_before_a_later_ask(both: Pair) -> None:
    both.ref.tell(Say(text="told"))
    assert await both.ref.ask(Say(text="asked"), timeout_s=FOR_EVER_S) == "asked"
    assert both.man.seen == ["told", "asked"]
    assert both.b.dead_letters == 0


@everywhere
async def test_an_ask_may_wait_without_an_end(both: Pair) -> None:
    assert await both.ref.ask(Say(text="x"), timeout_s=math.inf) == "x"
    assert await both.ref.ask(Say(text="x"), timeout_s=1e300) == "x"


@everywhere
async def test_messages_of_one_sender_stay_in_order(both: Pair) -> None:
    texts = [str(number) for number in range(300)]
    answers = await asyncio.gather(*(both.ref.ask(Say(text=text), timeout_s=FOR_EVER_S) for text in texts))
    assert answers == texts == both.man.seen


@everywhere
async def test_large_blobs_and_small_messages_to_one_actor_stay_in_order(both: Pair) -> None:
    asks = []
    for number in range(6):
        both.ref.tell(Say(text=f"before {number}"))
        asks.append(asyncio.ensure_future(both.ref.ask(Carry(blob=Blob(bytes(MIB))), timeout_s=FOR_EVER_S)))
        await asyncio.sleep(0)
        both.ref.tell(Say(text=f"after {number}"))
    await asyncio.gather(*asks)
    await both.ref.ask(Say(text="last"), timeout_s=FOR_EVER_S)
    steps = [(f"before {number}", f"{MIB} bytes ", f"after {number}") for number in range(6)]
    assert both.man.seen == [step for three in steps for step in three] + ["last"]


@everywhere
async def test_a_blob_comes_back_as_it_was_sent(both: Pair) -> None:
    for size_bytes in (0, 1, 4 * KIB, 128 * KIB, 3 * MIB + 1):
        data = bytes(range(256)) * (size_bytes // 256 + 1)
        answer = await both.ref.ask(Carry(blob=Blob(data[:size_bytes]), note="n"), timeout_s=FOR_EVER_S)
        assert bytes(answer.blob.data) == data[:size_bytes]
        assert answer.note == "n"


@everywhere
async def test_every_kind_of_answer_comes_back_as_it_was_given(both: Pair) -> None:
    for what in CAN_TRAVEL:
        answer = await both.ref.ask(Give(what=what), timeout_s=FOR_EVER_S)
        assert (answer, type(answer)) == (GIVEN[what](), type(GIVEN[what]()))
        items = [item async for item in both.ref.stream(GiveStream(what=what))]
        assert items == ["good", GIVEN[what]()]


@everywhere
async def test_bytes_travel_in_a_message_and_not_by_themselves(both: Pair) -> None:
    answer = await outcome(both.ref.ask(Give(what="bytes"), timeout_s=FOR_EVER_S))
    assert answer == b"bytes" if both.ref.is_local else isinstance(answer, FrameInvalid)


@everywhere
async def test_a_typed_error_keeps_its_kind_its_param_and_when_to_try_again(both: Pair) -> None:
    with pytest.raises(ModelNotFound, match="it is not here") as caught:
        await both.ref.ask(Raise(what="typed"), timeout_s=FOR_EVER_S)
    assert (caught.value.param, caught.value.retry_after_s) == ("model", 2.5)


@everywhere
async def test_a_bug_of_a_handler_fails_its_ask_without_its_text(both: Pair) -> None:
    with pytest.raises(HandlerFailed) as caught:
        await both.ref.ask(Raise(what="bug"), timeout_s=FOR_EVER_S)
    assert "secret" not in caught.value.message
    assert await both.ref.ask(Say(text="alive"), timeout_s=FOR_EVER_S) == "alive"


@everywhere
async def test_a_handler_cancelled_from_inside_leaves_no_caller_waiting(both: Pair) -> None:
    with pytest.raises(ActorDied, match="gave up on Raise"):
        await both.ref.ask(Raise(what="cancelled"), timeout_s=FOR_EVER_S)
    assert await both.ref.ask(Say(text="alive"), timeout_s=FOR_EVER_S) == "alive"


@everywhere
async def test_an_error_that_can_hardly_be_written_still_reaches_the_asker_and_the_actor_lives_on(both: Pair) -> None:
    for what in ("undecodable path", "long param", "param that is no text"):
        with pytest.raises(SllmError) as caught:
            await both.ref.ask(Raise(what=what), timeout_s=FOR_EVER_S)
        assert not isinstance(caught.value, NodeUnreachable), what
        assert await both.ref.ask(Say(text="alive"), timeout_s=FOR_EVER_S) == "alive"


@everywhere
async def test_nobody_and_a_message_that_nobody_handles_are_told_apart_from_faults(both: Pair) -> None:
    nobody = both.a.ref("nobody", str(both.b.address)) if not both.ref.is_local else both.a.ref("nobody")
    with pytest.raises(NoSuchActor, match="there is no actor nobody"):
        await nobody.ask(Say(text="x"), timeout_s=FOR_EVER_S)
    with pytest.raises(NoSuchActor, match="there is no actor nobody"):
        await anext(nobody.stream(Count(upto=1)))
    with pytest.raises(NoSuchActor, match="does not handle Unheard"):
        await both.ref.ask(Unheard(), timeout_s=FOR_EVER_S)
    with pytest.raises(NoSuchActor, match="by a stream"):
        await both.ref.ask(Count(upto=1), timeout_s=FOR_EVER_S)
    with pytest.raises(NoSuchActor, match="no stream"):
        await anext(both.ref.stream(Say(text="x")))
    for message in (Say(text="x"), Unheard(), Count(upto=1)):
        (nobody if isinstance(message, Say) else both.ref).tell(message)
    await until(lambda: both.b.dead_letters == 3, "three dead letters")


@everywhere
async def test_a_past_deadline_fails_the_ask_and_cancels_the_handler(both: Pair) -> None:
    timeout_s = 0.02
    while not both.man.begun.is_set():  # A slow machine may not have begun to handle it in that time.
        with pytest.raises(DeadlineExceeded, match="man did not answer Hold"):
            await both.ref.ask(Hold(), timeout_s=timeout_s)
        timeout_s *= 2
    await both.man.cancelled.wait()
    assert await both.ref.ask(Say(text="alive"), timeout_s=FOR_EVER_S) == "alive"
    with pytest.raises(DeadlineExceeded):
        await both.ref.ask(Say(text="x"), timeout_s=0)
    assert both.man.seen[-1] == "alive"


@everywhere
async def test_what_was_given_up_while_it_waited_is_never_handled(both: Pair) -> None:
    both.ref.tell(Hold())
    await both.man.begun.wait()
    with pytest.raises(DeadlineExceeded):
        await both.ref.ask(Say(text="given up"), timeout_s=0.02)
    waiting = both.b.cells["man"].queue
    await until(lambda: any(reply is not None and reply.done() for _, reply, *_ in waiting), "it is known there, too")
    both.man.gate.set()
    await both.ref.ask(Say(text="kept"), timeout_s=FOR_EVER_S)
    assert both.man.seen == ["hold ", "kept"]


@everywhere
async def test_cancelling_the_caller_cancels_the_handler(both: Pair) -> None:
    for message in (Hold(), HoldAside()):
        both.man.begun.clear()
        both.man.cancelled.clear()
        caller = TaskScope("test").spawn(both.ref.ask(message, timeout_s=FOR_EVER_S), "caller")
        await both.man.begun.wait()
        caller.cancel()
        await both.man.cancelled.wait()
        assert await both.ref.ask(Say(text="alive"), timeout_s=FOR_EVER_S) == "alive"


@everywhere
async def test_a_priority_message_is_handled_before_what_waits(both: Pair) -> None:
    held = TaskScope("test").spawn(both.ref.ask(HoldAside(), timeout_s=FOR_EVER_S), "held")
    await both.man.begun.wait()
    both.ref.tell(OpenGate())
    assert await held == "held"


@everywhere
async def test_a_stream_gives_its_items_in_order_and_ends(both: Pair) -> None:
    for upto in (0, 1, 63, 64, 65, 1000):
        assert [item async for item in both.ref.stream(Count(upto=upto))] == list(range(upto))


@everywhere
async def test_a_stream_fails_after_its_items_with_what_its_handler_raised(both: Pair) -> None:
    read = []
    with pytest.raises(ModelNotFound, match="no more") as caught:
        async for item in both.ref.stream(Count(upto=100, fails=True)):
            read.append(item)
    assert read == list(range(100))
    assert caught.value.param == "model"


@everywhere
async def test_closing_a_stream_early_cancels_its_handler(both: Pair) -> None:
    async with aclosing(both.ref.stream(Count(upto=10**9))) as numbers:
        assert [await anext(numbers) for _ in range(10)] == list(range(10))
    await both.man.cancelled.wait()
    assert both.man.made <= 10 + QUICK.stream_credit + 1


@everywhere
async def test_a_stream_carries_blobs(both: Pair) -> None:
    items = [item async for item in both.ref.stream(BlobStream(count=20, size_bytes=100 * KIB))]
    assert [item.note for item in items] == [str(number) for number in range(20)]
    assert all(bytes(item.blob.data) == bytes([k]) * 100 * KIB for k, item in enumerate(items))


@everywhere
async def test_free_form_data_comes_back_as_it_was_sent(both: Pair) -> None:
    data = {"a": [1, 2.5, None, True, "text", b"bytes"], "nested": {"deep": [[[]]]}}
    answer = await both.ref.ask(Loose(data=FreeForm(data)), timeout_s=FOR_EVER_S)
    assert answer.data == FreeForm(data)


@everywhere
async def test_stopping_the_actor_fails_what_runs_what_waits_and_what_streams(both: Pair) -> None:
    tasks = TaskScope("test")
    asks = [
        tasks.spawn(outcome(both.ref.ask(message, timeout_s=FOR_EVER_S)), "ask")
        for message in (HoldAside(), Hold(), Say(text="waits"))
    ]
    stream = both.ref.stream(Count(upto=10**9))
    assert await anext(stream) == 0
    await until(lambda: any(actor.mailbox_depth for actor in both.b.stats().actors), "one waits")
    ended = tasks.spawn(both.ref.ended(), "ended")
    await both.b.stop("man")
    for ask in asks:
        assert type(await ask) is ActorDied
    with pytest.raises(ActorDied):
        async for _ in stream:
            pass
    assert (await ended).reason == "stopped"
    assert await outcome(both.ref.ask(Say(text="x"), timeout_s=FOR_EVER_S))
    with pytest.raises(NoSuchActor):
        await both.ref.ask(Say(text="x"), timeout_s=FOR_EVER_S)
    assert (await both.ref.ended()).reason == "no_such_actor"


# What differs between nodes: what travels.

REMOTE = [place for place in PLACES if place != "local"]


@on_both_loops
async def test_an_answer_that_can_not_travel_fails_its_ask_with_a_typed_error() -> None:
    async with pair() as both:
        for what in CAN_NOT_TRAVEL:
            with pytest.raises((FrameInvalid, FrameTooLong, HandlerFailed)):
                await both.ref.ask(Give(what=what), timeout_s=FOR_EVER_S)
            assert await both.ref.ask(Say(text="alive"), timeout_s=FOR_EVER_S) == "alive"
        assert link_of(both.a, "b").connections == 1


@on_both_loops
async def test_an_item_that_can_not_travel_fails_its_stream_with_a_typed_error() -> None:
    async with pair() as both:
        for what in CAN_NOT_TRAVEL:
            read = []
            with pytest.raises((FrameInvalid, FrameTooLong, HandlerFailed)):
                async for item in both.ref.stream(GiveStream(what=what)):
                    read.append(item)
            assert read == ["good"], what
        assert await both.ref.ask(Say(text="alive"), timeout_s=FOR_EVER_S) == "alive"
        assert link_of(both.a, "b").connections == 1
        assert link_of(both.b, "a").running_calls == 0


@on_both_loops
async def test_a_message_that_can_not_travel_fails_at_its_sender_before_anything_is_sent() -> None:
    async with pair() as both:
        await both.ref.ask(Say(text="connected"), timeout_s=FOR_EVER_S)
        bad: list[object] = [
            NotInTheTable(),
            "text",
            Say(text="\udcff"),
            Count(upto=2**70),
            Loose(data=FreeForm({1, 2})),
            Carry(blob=Blob(memoryview(b"abcdef")[::2])),
            Carry(blob=Blob(None)),  # type: ignore[arg-type]
        ]
        for message in bad:
            with pytest.raises(FrameInvalid):
                await both.ref.ask(message, timeout_s=FOR_EVER_S)
            with pytest.raises(FrameInvalid):
                await anext(both.ref.stream(message))
            both.ref.tell(message)
        await until(lambda: both.a.dead_letters == len(bad), "a dead letter each")
        assert link_of(both.a, "b").waiting_asks == 0
        assert await both.ref.ask(Say(text="alive"), timeout_s=FOR_EVER_S) == "alive"
        assert link_of(both.a, "b").connections == 1


@on_both_loops
async def test_a_message_with_a_field_of_the_wrong_type_fails_at_its_asker_and_the_connection_stands() -> None:
    async with pair() as both:
        wrong = Say(text=5)  # type: ignore[arg-type]
        with pytest.raises(FrameInvalid, match="Expected `str`, got `int`"):
            await both.ref.ask(wrong, timeout_s=FOR_EVER_S)
        with pytest.raises(FrameInvalid):
            await anext(both.ref.stream(wrong))
        both.ref.tell(wrong)
        await until(lambda: both.b.dead_letters == 1, "a dead letter")
        assert await both.ref.ask(Say(text="alive"), timeout_s=FOR_EVER_S) == "alive"
        assert link_of(both.a, "b").connections == 1


@on_both_loops
async def test_a_message_that_only_one_node_knows_fails_at_its_asker() -> None:
    async with node("b") as b:
        await b.spawn(Everyman(), "man")
        a = ActorSystem(node_id="a", messages=[Say, NotInTheTable], limits=QUICK)
        ref = a.ref("man", str(b.address))
        with pytest.raises(FrameInvalid):
            await ref.ask(NotInTheTable(), timeout_s=FOR_EVER_S)
        assert await ref.ask(Say(text="known"), timeout_s=FOR_EVER_S) == "known"
        await a.close()


@on_both_loops
async def test_a_message_that_is_too_long_fails_at_its_sender_and_the_connection_stands() -> None:
    async with pair(b_limits=msgspec.structs.replace(QUICK, max_blob_bytes=2 * MIB)) as both:
        await both.ref.ask(Say(text="connected"), timeout_s=FOR_EVER_S)
        for message in (Say(text="x" * 2 * MIB), Carry(blob=Blob(bytes(2 * MIB + 1)))):
            with pytest.raises(FrameTooLong):
                await both.ref.ask(message, timeout_s=FOR_EVER_S)
            with pytest.raises(FrameTooLong):
                await anext(both.ref.stream(message))
            both.ref.tell(message)
        await until(lambda: both.a.dead_letters == 2, "two dead letters")
        just_fits = await both.ref.ask(Carry(blob=Blob(bytes(2 * MIB))), timeout_s=FOR_EVER_S)
        assert len(just_fits.blob) == 2 * MIB
        assert len(await both.ref.ask(Say(text="x" * 1000 * KIB), timeout_s=FOR_EVER_S)) == 1000 * KIB
        assert link_of(both.a, "b").connections == 1


@on_both_loops
async def test_free_form_data_beyond_its_bounds_is_refused_and_the_connection_stands() -> None:
    async with pair() as both:
        deep: list[object] = []
        for _ in range(2000):
            deep = [deep]
        too_much: list[object] = [[0] * (MAX_FREE_FORM_ITEMS + 1), "x" * MAX_FREE_FORM_BYTES, {1: 2}, deep]
        too_much += [{str(k): k for k in range(MAX_FREE_FORM_ITEMS + 1)}, object()]
        for value in too_much:
            with pytest.raises((FrameInvalid, FrameTooLong)):
                await both.ref.ask(Loose(data=FreeForm(value)), timeout_s=FOR_EVER_S)
        fits = FreeForm([0] * MAX_FREE_FORM_ITEMS)
        assert (await both.ref.ask(Loose(data=fits), timeout_s=FOR_EVER_S)).data == fits
        assert link_of(both.a, "b").connections == 1


# Order and fairness.


@on_both_loops
async def test_a_small_message_to_another_actor_overtakes_a_large_blob() -> None:
    async with pair() as both:
        other = Everyman()
        await both.b.spawn(other, "other")
        quick = both.a.ref("other", str(both.b.address))
        await quick.ask(Say(text="connected"), timeout_s=FOR_EVER_S)
        large = asyncio.ensure_future(both.ref.ask(Carry(blob=Blob(bytes(48 * MIB))), timeout_s=FOR_EVER_S))
        await asyncio.sleep(0)
        assert await quick.ask(Say(text="overtakes"), timeout_s=FOR_EVER_S) == "overtakes"
        assert both.man.seen == []
        assert not large.done()
        await large


@on_both_loops
async def test_a_full_mailbox_refuses_an_ask_from_another_node_at_once() -> None:
    async with pair(b_limits=msgspec.structs.replace(QUICK, mailbox_messages=3)) as both:
        both.ref.tell(Hold())
        await both.man.begun.wait()
        for text in "abc":
            both.ref.tell(Say(text=text))
        with pytest.raises(MailboxFull) as caught:
            await both.ref.ask(Say(text="d"), timeout_s=FOR_EVER_S)
        assert caught.value.retry_after_s is not None
        both.ref.tell(Say(text="e"))
        await until(lambda: both.b.dead_letters == 1, "a dead letter")
        both.man.gate.set()
        await until(lambda: both.man.seen == ["hold ", "a", "b", "c"])
        assert await both.ref.ask(Say(text="f"), timeout_s=FOR_EVER_S) == "f"


@on_both_loops
async def test_a_stream_runs_ahead_by_its_credit_of_items_and_no_further() -> None:
    async with (
        pair(a_limits=msgspec.structs.replace(QUICK, stream_credit=4)) as both,
        aclosing(both.ref.stream(Count(upto=1000))) as numbers,
    ):
        assert await anext(numbers) == 0
        await until(lambda: link_of(both.b, "a").credit_stalls > 0, "the maker waits")
        assert await both.ref.ask(Say(text="others go on"), timeout_s=FOR_EVER_S) == "others go on"
        # One or two taken, as many as the credit on their way, and the one that its maker holds in hand.
        assert both.man.made <= 7
        assert [number async for number in numbers] == list(range(1, 1000))


@on_both_loops
async def test_a_stream_runs_ahead_by_its_window_of_bytes_and_no_further() -> None:
    async with (
        pair(a_limits=msgspec.structs.replace(QUICK, stream_window_bytes=64 * KIB)) as both,
        aclosing(both.ref.stream(Count(upto=200, text_bytes=16 * KIB))) as texts,
    ):
        assert (await anext(texts)).strip(".") == "0"
        await until(lambda: link_of(both.b, "a").credit_stalls > 0, "the maker waits")
        assert both.man.made <= 8
        assert [text.strip(".") async for text in texts] == [str(number) for number in range(1, 200)]


@on_both_loops
async def test_a_reader_that_stalls_does_not_stop_other_streams_and_asks() -> None:
    async with pair() as both:
        async with aclosing(both.ref.stream(Count(upto=10**6, text_bytes=4 * KIB))) as stalled:
            await anext(stalled)
            await until(lambda: link_of(both.b, "a").credit_stalls > 0, "the maker waits")
            assert [number async for number in both.ref.stream(Count(upto=5000))] == list(range(5000))
            assert await both.ref.ask(Say(text="x"), timeout_s=FOR_EVER_S) == "x"
            large = await both.ref.ask(Carry(blob=Blob(bytes(MIB))), timeout_s=FOR_EVER_S)
            assert len(large.blob) == MIB
        await both.man.cancelled.wait()


@on_both_loops
async def test_many_streams_and_asks_share_one_connection() -> None:
    async with pair() as both:

        async def read(upto: int) -> list[object]:
            return [item async for item in both.ref.stream(Count(upto=upto))]

        asks = [both.ref.ask(Say(text=str(k)), timeout_s=FOR_EVER_S) for k in range(200)]
        streams = [read(40 * k) for k in range(20)]
        results = await asyncio.gather(*asks, *streams)
        assert results == [str(k) for k in range(200)] + [list(range(40 * k)) for k in range(20)]
        assert link_of(both.a, "b").connections == 1
        assert link_of(both.a, "b").waiting_asks == link_of(both.b, "a").running_calls == 0


# Chains.


@on_both_loops
async def test_a_deadline_shrinks_along_a_chain_of_nodes() -> None:
    async with node("a") as a, node("b") as b, node("c") as c:
        for system in (b, c):
            await system.spawn(Everyman(), "man")
        relay = Relay(hops=(a.ref("man", str(c.address)),), what="left_s", timeout_s=FOR_EVER_S)
        left_s = await a.ref("man", str(b.address)).ask(relay, timeout_s=30.0)
        assert 0 < left_s < 30.0
        nearer = msgspec.structs.replace(relay, timeout_s=20.0)
        assert await a.ref("man", str(b.address)).ask(nearer, timeout_s=30.0) < 20.0


@on_both_loops
async def test_a_deadline_in_a_chain_ends_the_work_two_nodes_away() -> None:
    async with node("a") as a, node("b") as b, node("c") as c:
        far = Everyman()
        await b.spawn(Everyman(), "man")
        await c.spawn(far, "man")
        relay = Relay(hops=(a.ref("man", str(c.address)),), what="hold")
        with pytest.raises(DeadlineExceeded):
            await a.ref("man", str(b.address)).ask(relay, timeout_s=0.2)
        if far.begun.is_set():
            await far.cancelled.wait()
        assert await a.ref("man", str(b.address)).ask(Say(text="alive"), timeout_s=FOR_EVER_S) == "alive"


@on_both_loops
async def test_cancelling_the_caller_cancels_the_handler_two_nodes_away() -> None:
    async with node("a") as a, node("b") as b, node("c") as c:
        far, between = Everyman(), Everyman()
        await b.spawn(between, "man")
        await c.spawn(far, "man")
        relay = Relay(hops=(a.ref("man", str(c.address)),), what="hold")
        caller = TaskScope("test").spawn(a.ref("man", str(b.address)).ask(relay, timeout_s=FOR_EVER_S), "caller")
        await far.begun.wait()
        caller.cancel()
        await far.cancelled.wait()
        for system, peer in ((a, "b"), (b, "a"), (b, "c"), (c, "b")):
            await until(lambda s=system, p=peer: link_of(s, p).running_calls + link_of(s, p).waiting_asks == 0)  # type: ignore[misc]
        assert await a.ref("man", str(b.address)).ask(Say(text="alive"), timeout_s=FOR_EVER_S) == "alive"


@on_both_loops
async def test_a_typed_error_travels_back_along_a_chain() -> None:
    async with node("a") as a, node("b") as b:
        await b.spawn(Everyman(), "man")
        relay = Relay(hops=(a.ref("nobody"),), what="say")
        with pytest.raises(NoSuchActor, match="there is no actor nobody"):
            await a.ref("man", str(b.address)).ask(relay, timeout_s=FOR_EVER_S)


@on_both_loops
async def test_a_trace_travels_along_a_chain_and_to_nobody_else() -> None:
    """There is no public way to begin a trace; its place is the fifth of the current envelope."""
    async with node("a") as a, node("b") as b, node("c") as c:
        for system in (b, c):
            await system.spawn(Everyman(), "man")
        relay = Relay(hops=(a.ref("man", str(c.address)),), what="trace")
        first = a.ref("man", str(b.address))
        token = CURRENT.set((*NO_ENVELOPE[:4], b"\x01\x02 trace"))
        try:
            assert await first.ask(relay, timeout_s=FOR_EVER_S) == b"\x01\x02 trace".hex()
        finally:
            CURRENT.reset(token)
        assert await first.ask(relay, timeout_s=FOR_EVER_S) is None


# References in messages.


@on_both_loops
async def test_a_reference_to_a_third_node_works_where_it_is_received() -> None:
    async with node("a") as a, node("b") as b, node("c") as c:
        far = Everyman()
        await b.spawn(Everyman(), "man")
        await c.spawn(far, "far")
        relay = Relay(hops=(a.ref("far", str(c.address)),), what="through b")
        assert await a.ref("man", str(b.address)).ask(relay, timeout_s=FOR_EVER_S) == "through b"
        assert far.seen == ["through b"]
        # What a has got from b of c is as good as its own.
        answer = await a.ref("man", str(b.address)).ask(Introduce(ref=relay.hops[0]), timeout_s=FOR_EVER_S)
        assert type(answer) is Acquainted
        assert answer.ref == relay.hops[0]
        assert await answer.ref.ask(Say(text="from a"), timeout_s=FOR_EVER_S) == "from a"


@on_both_loops
async def test_a_reference_that_comes_home_is_local() -> None:
    async with node("a") as a, node("b") as b:
        home = Everyman()
        mine = await a.spawn(home, "mine")
        await b.spawn(Everyman(), "man")
        there = a.ref("man", str(b.address))
        answer = await there.ask(Introduce(ref=mine), timeout_s=FOR_EVER_S)
        assert (answer.ref, answer.ref.is_local, answer.was_local) == (mine, True, False)
        answer = await there.ask(Introduce(ref=there), timeout_s=FOR_EVER_S)
        assert (answer.ref.is_local, answer.was_local) == (False, True)
        assert await there.ask(Relay(hops=(mine,), what="home again"), timeout_s=FOR_EVER_S) == "home again"
        assert home.seen == ["home again"]


@on_both_loops
async def test_a_node_that_does_not_listen_is_reached_over_the_connection_that_it_made() -> None:
    async with node("b") as b, node("quiet", listen="") as quiet:
        shy = Everyman()
        mine = await quiet.spawn(shy, "shy")
        await b.spawn(Everyman(), "man")
        there = quiet.ref("man", str(b.address))
        assert await there.ask(Relay(hops=(mine,), what="heard"), timeout_s=FOR_EVER_S) == "heard"
        assert shy.seen == ["heard"]
        assert link_of(b, "quiet").connections == 1


@on_both_loops
async def test_a_reference_to_a_node_that_neither_listens_nor_is_connected_fails_at_once() -> None:
    async with node("a") as a, node("b") as b:
        await b.spawn(Everyman(), "man")
        shy = a.ref("shy", NodeAddress("quiet", "", 5))
        with pytest.raises(NodeUnreachable, match="does not listen"):
            await a.ref("man", str(b.address)).ask(Relay(hops=(shy,), what="x"), timeout_s=FOR_EVER_S)


# Ends.

SOON_DOWN = msgspec.structs.replace(QUICK, down_after_s=0.1)


async def watcher(both: Pair, ref: ActorRef) -> Everyman:
    """Let an actor of `a` watch."""
    watching = Everyman()
    mine = await both.a.spawn(watching, "watcher")
    assert await mine.ask(WatchIt(ref=ref), timeout_s=FOR_EVER_S)
    return watching


@on_both_loops
async def test_a_watcher_hears_once_that_an_actor_of_another_node_has_stopped() -> None:
    async with pair() as both:
        watching = await watcher(both, both.ref)
        await both.ref.ask(Say(text="the watch has come"), timeout_s=FOR_EVER_S)
        await both.b.stop("man")
        ended = await watching.ends.get()
        assert (ended.reason, ended.ref) == ("stopped", both.ref)
        await both.b.close()
        assert watching.ends.empty()


@on_both_loops
async def test_a_watcher_hears_that_nobody_is_there() -> None:
    async with pair() as both:
        watching = await watcher(both, both.a.ref("nobody", str(both.b.address)))
        assert (await watching.ends.get()).reason == "no_such_actor"


@on_both_loops
async def test_a_watcher_hears_at_once_that_a_node_has_said_goodbye() -> None:
    async with pair() as both:
        watching = await watcher(both, both.ref)
        waiting = asyncio.ensure_future(both.ref.ended())
        held = asyncio.ensure_future(outcome(both.ref.ask(HoldAside(), timeout_s=FOR_EVER_S)))
        await both.man.begun.wait()
        await both.b.close()
        assert (await watching.ends.get()).reason in ("stopped", "node_down")
        assert (await waiting).reason in ("stopped", "node_down")
        assert type(await held) in (ActorDied, NodeUnreachable)
        assert type(await outcome(both.ref.ask(Say(text="x"), timeout_s=FOR_EVER_S))) is NodeUnreachable


@on_both_loops
async def test_a_watcher_hears_that_a_node_can_not_be_reached() -> None:
    async with node("a", SOON_DOWN) as a:
        ended = await a.ref("man", "dead@tcp://127.0.0.1:1").ended()
        assert ended.reason == "node_down"


@on_both_loops
async def test_a_restart_is_no_end() -> None:
    async with node("b") as b, node("a") as a:
        await b.spawn(Everyman, "man", supervision=Supervision(restarts=1, window_s=FOR_EVER_S))
        ref = a.ref("man", str(b.address))
        ended = asyncio.ensure_future(ref.ended())
        with pytest.raises(HandlerFailed):
            await ref.ask(Crash(), timeout_s=FOR_EVER_S)
        assert await ref.ask(Say(text="made anew"), timeout_s=FOR_EVER_S) == "made anew"
        assert not ended.done()
        with pytest.raises(HandlerFailed):
            await ref.ask(Crash(), timeout_s=FOR_EVER_S)
        assert (await ended).reason == "failed"


@on_both_loops
async def test_who_stops_watching_hears_nothing_and_leaves_nothing_behind() -> None:
    async with pair() as both:
        for _ in range(3):
            waiting = asyncio.ensure_future(both.ref.ended())
            await until(lambda: bool(both.b.stats().links) and link_of(both.b, "a").running_calls == 1, "it watches")
            waiting.cancel()
            await until(lambda: link_of(both.b, "a").running_calls == 0, "it watches no more")


@on_both_loops
async def test_who_waits_for_a_remote_end_is_told_when_its_own_system_closes() -> None:
    async with pair() as both:
        unreachable = both.a.ref("man", "dead@tcp://127.0.0.1:1")
        ends = [asyncio.ensure_future(ref.ended()) for ref in (both.ref, unreachable)]
        await both.ref.ask(Say(text="it watches"), timeout_s=FOR_EVER_S)
        await both.a.close()
        done, _ = await asyncio.wait(ends, timeout=2.0)
        for one in ends:
            one.cancel()
        assert [one.result().reason for one in done] == ["node_down"] * 2


@on_both_loops
async def test_a_reference_to_an_earlier_incarnation_of_ones_own_node_has_ended() -> None:
    async with node("a") as a:
        earlier = a.ref("man", a.address._replace(uid=1))
        with pytest.raises(ActorDied):
            await earlier.ask(Say(text="x"), timeout_s=FOR_EVER_S)
        assert (await earlier.ended()).reason == "node_down"


@pytest.mark.parametrize("place", REMOTE)
@pytest.mark.parametrize("loop_factory", LOOPS)
def test_nothing_can_be_asked_any_more_once_the_system_is_closed(loop_factory: LoopFactory, place: str) -> None:
    async def body() -> None:
        async with pair(place) as both:
            never_dialled = both.a.ref("man", "other@tcp://127.0.0.1:1")
            await both.ref.ask(Say(text="connected"), timeout_s=FOR_EVER_S)
            await both.a.close()
            for ref in (both.ref, never_dialled):
                assert isinstance(await outcome(ref.ask(Say(text="x"), timeout_s=FOR_EVER_S)), SllmError)
                assert isinstance(await outcome(anext(ref.stream(Count(upto=1)))), SllmError)
                assert (await ref.ended()).reason == "node_down"
                ref.tell(Say(text="x"))
            assert both.a.dead_letters == 2

    run_on(loop_factory, body())


@on_both_loops
async def test_what_an_actor_asks_while_its_system_closes_ends() -> None:
    class Farewell(Actor):
        async def stopped(self) -> None:
            said.append(await outcome(elsewhere.ask(Say(text="farewell"), timeout_s=FOR_EVER_S)))

    said: list[object] = []
    async with pair() as both:
        elsewhere = both.ref
        await both.a.spawn(Farewell(), "farewell")
        await both.ref.ask(Say(text="connected"), timeout_s=FOR_EVER_S)
        await both.a.close()
        assert said == ["farewell"]
