"""The log of streams on virtual time: what is written when, whose it is, and when it is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from metadata_stores import LIMITS
from test_shapes import wish
from test_supervision import now_s, virtually

from sllm_actor.domain import FinishReason, RequestId
from sllm_actor.domain.tokens import pack_uint32
from sllm_actor.errors import StreamNotFound, StreamTaken
from sllm_actor.frontend.keys import Key
from sllm_actor.frontend.live_stream import LiveStream
from sllm_actor.frontend.orders import CompletionOrder, new_stream_id
from sllm_actor.frontend.schema import CompletionRequest
from sllm_actor.frontend.stream_log import WRITTEN_WITHIN_S, StreamLimits, StreamLog
from sllm_actor.frontend.stream_records import PART_TOKENS, PREFIX, Found
from sllm_actor.messages.generation import Finished
from sllm_actor.metadata import SqliteStore, Store
from sllm_actor.testing.simulated_store import MemoryStore, Way
from sllm_actor.testing.virtual_loop import VirtualLoop

LAG_S, KEPT_S, REQUEST_S = 0.5, 60.0, 100.0
MODEL = wish().model
ALICE, BOB = Key(name="alice", sha256="a" * 64), Key(name="bob", sha256="b" * 64)
END = Finished(request_id=RequestId("r"), reason=FinishReason.LENGTH, prompt_tokens=2, generated_tokens=3)


def knobs(log_bytes: int = 100_000, most: int = 100, kept_s: float = KEPT_S) -> StreamLimits:
    return StreamLimits(LAG_S, kept_s, log_bytes, most, REQUEST_S)


def order(**options: object) -> CompletionOrder:
    return CompletionOrder(
        stream_id=new_stream_id(),
        answer_id=RequestId("r"),
        created_wall_s=1.0,
        body=msgspec.convert({"model": "m", "prompt": "hi", "seed": 1, **options}, CompletionRequest),
        prompts=(pack_uint32([1, 2]),),
        echoes=("",),
    )


def truth() -> MemoryStore:
    return MemoryStore(VirtualLoop.running().clock)


def way(store: MemoryStore) -> Way:
    return Way(store, VirtualLoop.running().clock)


@asynccontextmanager
async def opened(store: Store, limits: StreamLimits | None = None, *, shared: bool = True) -> AsyncIterator[StreamLog]:
    log = StreamLog(store, VirtualLoop.running().clock, limits or knobs(), shared=shared)
    await log.open()
    try:
        yield log
    finally:
        await log.close()


async def begun(log: StreamLog, key: Key | None = None, choices: int = 1, **options: object) -> LiveStream:
    stream = log.begin(order(**options), choices, MODEL, key)
    await stream.decided.wait()
    return stream


async def known(log: StreamLog, stream: LiveStream, key: Key | None = None) -> list[list[int]]:
    """Take a stream over; give the tokens that are known of its choices."""
    taken = await log.take_over(await log.find(stream.id, key), key)
    return [choice.tokens for choice in taken.logs]


@virtually
async def test_what_was_asked_is_written_at_once_and_tokens_within_the_lag() -> None:
    store = truth()
    async with opened(way(store)) as log, opened(way(store)) as other:
        stream = log.begin(order(), 2, MODEL, None)
        assert stream.undecided
        assert stream.undecided
        assert (await log.find(stream.id, None)).record.choices == 2, "who asks for it at once waits for that"
        await stream.decided.wait()
        assert stream.kept
        for token in (7, 8, 9):
            stream.logs[1].take(token)
        began_s = now_s()
        while not (await store.list(f"{PREFIX}{stream.id}/1/")).facts:
            await asyncio.sleep(0.01)
        assert now_s() - began_s <= LAG_S + 0.1
        assert await known(other, stream) == [[], [7, 8, 9]]


@virtually
async def test_one_asked_for_elsewhere_before_it_is_written_is_waited_for_and_what_never_comes_not_long() -> None:
    store = truth()
    async with (
        opened(slow := way(store)) as log,
        opened(way(store)) as other,
        opened(way(store), shared=False) as alone,
    ):
        slow.latency_s = 0.1
        stream = log.begin(order(), 1, MODEL, ALICE)
        assert (await other.find(stream.id, ALICE)).record.choices == 1
        for asked, stream_id, key, waits in (
            (other, new_stream_id(), ALICE, True),
            (other, stream.id, BOB, True),
            (other, "stream-1", ALICE, False),
            (alone, new_stream_id(), ALICE, False),
        ):
            began_s = now_s()
            with pytest.raises(StreamNotFound):
                await asked.find(stream_id, key)
            assert (WRITTEN_WITHIN_S <= now_s() - began_s < 2 * WRITTEN_WITHIN_S) is waits


@virtually
async def test_an_end_is_written_behind_the_tokens_and_long_answers_in_parts() -> None:
    store = truth()
    async with opened(way(store)) as log, opened(way(store)) as other:
        stream = await begun(log)
        tokens = list(range(PART_TOKENS * 2))
        for token in tokens:
            stream.logs[0].take(token)
            if token % 300 == 0:
                await asyncio.sleep(2 * LAG_S)
        stream.logs[0].finish(END)
        await log.flush()
        taken = await other.take_over(await other.find(stream.id, None), None)
        assert (taken.logs[0].tokens, taken.logs[0].end) == (tokens, END)
        assert len((await store.list(f"{PREFIX}{stream.id}/0/")).facts) == 2


@virtually
async def test_streams_that_begin_together_are_written_together() -> None:
    store = truth()
    async with opened(way(store)) as log:
        before = (await store.list("")).revision
        streams = [log.begin(order(), 1, MODEL, None) for _ in range(40)]
        for stream in streams:
            await stream.decided.wait()
        assert (await store.list("")).revision == before + 1
        for stream in streams:
            stream.logs[0].take(5)
        await log.flush()
        assert (await store.list("")).revision == before + 2


@virtually
async def test_who_goes_on_with_a_stream_ends_it_where_it_was() -> None:
    store = truth()
    async with opened(way(store)) as log, opened(way(store)) as other:
        stream, untouched = await begun(log), await begun(log)
        began_s = now_s()
        with pytest.raises(StreamTaken):
            async with stream.held():
                assert await known(other, stream) == [[]]
                for one in (stream, untouched):
                    one.logs[0].take(3)
                await asyncio.sleep(1000)
        assert now_s() - began_s < 3 * LAG_S, "it learns of it with its next tokens"
        assert not stream.kept and untouched.kept
        # The former owner writes nothing any more.
        stream.logs[0].take(4)
        await log.flush()
        assert not (await store.list(f"{PREFIX}{stream.id}/0/")).facts
        assert len((await store.list(f"{PREFIX}{untouched.id}/0/")).facts) == 1


@virtually
async def test_of_two_who_go_on_at_once_the_last_one_has_it() -> None:
    store = truth()
    async with opened(way(store)) as log, opened(way(store)) as other:
        stream = await begun(log)
        founds: list[Found] = [await one.find(stream.id, None) for one in (log, other)]
        both = await asyncio.gather(log.take_over(founds[0], None), other.take_over(founds[1], None))
        for taken in both:
            taken.logs[0].take(1)
        await asyncio.sleep(3 * LAG_S)
        assert sorted(taken.kept for taken in both) == [False, True]


@virtually
async def test_another_key_finds_nothing_and_neither_does_whoever_guesses() -> None:
    async with opened(truth()) as log:
        stream = await begun(log, ALICE)
        assert (await log.find(stream.id, ALICE)).record.choices == 1
        for key in (BOB, None):
            with pytest.raises(StreamNotFound):
                await log.find(stream.id, key)
        for stream_id in ("", "stream-", "../models/a", "stream-" + "0" * 32, stream.id + "/0", stream.id.upper()):
            with pytest.raises(StreamNotFound):
                await log.find(stream_id, ALICE)


@virtually
async def test_a_stream_is_forgotten_some_time_after_its_connection_has_ended() -> None:
    store = truth()
    async with opened(way(store)) as log:
        stream = await begun(log)
        with log.answering(stream):
            stream.logs[0].take(5)
            await asyncio.sleep(REQUEST_S - 1)
        await asyncio.sleep(KEPT_S - 5)
        assert await log.find(stream.id, None)
        await asyncio.sleep(10)
        with pytest.raises(StreamNotFound):
            await log.find(stream.id, None)
        assert not (await store.list(PREFIX)).facts


@virtually
async def test_one_that_was_gone_on_with_meanwhile_is_not_forgotten() -> None:
    store = truth()
    async with opened(way(store)) as log, opened(way(store)) as other:
        stream = await begun(log)
        with log.answering(stream):
            stream.logs[0].take(5)
        await asyncio.sleep(KEPT_S - 5)
        assert await known(other, stream) == [[5]]
        await asyncio.sleep(10)
        assert await known(other, stream) == [[5]]


@virtually
async def test_what_a_lost_gateway_has_left_in_a_shared_store_ends_with_its_lease() -> None:
    store = truth()
    async with opened(way(store)) as log:
        for token in range(3):
            (await begun(log)).logs[0].take(token)
        await log.flush()
    assert (await store.list(PREFIX)).facts
    await asyncio.sleep(REQUEST_S + KEPT_S + 120)
    assert not (await store.list("")).facts


async def test_what_a_lone_node_has_left_is_there_after_its_restart_and_forgotten_in_time(tmp_path: Path) -> None:
    clock = ShiftedClock()
    store = await SqliteStore.open(tmp_path / "m.db", clock, LIMITS)
    log = StreamLog(store, clock, knobs(), shared=False)
    await log.open()
    stream = await begun(log)
    stream.logs[0].take(5)
    await log.flush()
    await store.put(f"{PREFIX}stream-{'0' * 32}/0/000000", b"of no record")
    await log.close()
    await store.close()
    store = await SqliteStore.open(tmp_path / "m.db", clock, LIMITS)
    again = StreamLog(store, clock, knobs(), shared=False)
    await again.open()
    assert {fact.key.split("/")[1] for fact in (await store.list(PREFIX)).facts} == {stream.id}
    assert await known(again, stream) == [[5]]
    await again.close()
    later = StreamLog(store, clock, knobs(), shared=False)
    await later.open()
    clock.shift_s = REQUEST_S + KEPT_S + 1
    with pytest.raises(StreamNotFound):
        await later.find(stream.id, None)
    await later.sweep()
    assert not (await store.list(PREFIX)).facts
    await later.close()
    await store.close()


class ShiftedClock:
    """The machine's clock, moved on by as much as a test says."""

    def __init__(self) -> None:
        self.shift_s = 0.0

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time() + self.shift_s

    def wall_s(self) -> float:
        return 1_000_000.0 + self.monotonic_s()

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)


@virtually
async def test_a_stream_that_is_too_long_or_one_too_many_is_not_kept_and_the_oldest_that_was_left_makes_way() -> None:
    store = truth()
    async with opened(store, knobs(log_bytes=1000, most=2)) as log:
        assert not (await begun(log, user="u" * 1000)).kept
        first, second = await begun(log), await begun(log)
        assert first.kept and second.kept
        assert not (await begun(log)).kept
        with log.answering(first):
            pass
        third = await begun(log)
        assert third.kept
        await asyncio.sleep(2)
        with pytest.raises(StreamNotFound):
            await log.find(first.id, None)
        assert (await log.find(second.id, None)) and (await log.find(third.id, None))
    async with opened(store, knobs(kept_s=0.0)) as log:
        assert not (await begun(log)).kept, "nothing is kept where nobody wants it"


@virtually
async def test_tokens_beyond_the_bound_are_not_written() -> None:
    store = truth()
    async with opened(store, knobs(log_bytes=2000)) as log:
        stream = await begun(log)
        for token in range(100):
            stream.logs[0].take(token)
        await log.flush()
        for token in range(2000):
            stream.logs[0].take(token)
        await log.flush()
        assert [len(tokens) for tokens in await known(log, stream)] == [100]


@virtually
async def test_of_streams_with_log_probabilities_no_tokens_are_written() -> None:
    store = truth()
    async with opened(store) as log:
        stream = await begun(log, logprobs=0)
        stream.logs[0].take(5)
        await log.flush()
        assert await known(log, stream) == [[]]


@virtually
async def test_without_a_store_new_streams_are_not_kept_and_those_that_run_are_written_when_it_is_back() -> None:
    store = truth()
    cut = way(store)
    async with opened(cut) as log:
        stream = await begun(log)
        cut.cut = True
        stream.logs[0].take(5)
        assert not (await begun(log)).kept
        await asyncio.sleep(20)
        assert not log.begin(order(), 1, MODEL, None).undecided, "once it is known to be away, nobody tries"
        assert log.observe()["lag_s"] > 20 and log.observe()["failures"] > 0
        cut.cut = False
        await asyncio.sleep(30)
        assert log.observe()["lag_s"] == 0
        assert (await begun(log)).kept
        assert await known(log, stream) == [[5]]


@virtually
async def test_one_whose_lease_has_ended_is_kept_no_more_and_the_others_are() -> None:
    store = truth()
    async with opened(way(store)) as log:
        first = await begun(log)
        await asyncio.sleep(100)
        second = await begun(log)
        assert first.lease is not None and first.lease != second.lease
        await store.revoke(first.lease)
        for stream in (first, second):
            stream.logs[0].take(5)
        await log.flush()
        assert not first.kept and second.kept
        assert await known(log, second) == [[5]]
