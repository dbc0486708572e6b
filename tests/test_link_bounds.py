"""Two honest nodes never break each other's rules, however much they say at once; and one that is not costs little."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from math import inf, nan
from typing import Any

import pytest
from loops import on_both_loops
from protocol_client import ASK, BEAT, WATCH, Client
from wire_pairs import Message

from sllm_actor.errors import DeadlineExceeded, LinkFull, SllmError
from sllm_actor.runtime import Actor, ActorRef, ActorSystem, Blob, Limits, handles
from sllm_actor.runtime.wire import MAX_BATCH_BYTES

LIMIT_S = 30.0
# Turns of the loop without a byte, after which nothing more will come.
QUIET_TURNS = 1000
SMALL_BUFFER = Limits(link_buffer_bytes=32 * 1024, link_unread_bytes=128 * 1024)


class Note(Message, frozen=True, tag="note"):
    number: int
    text: str = ""


class Fetch(Message, frozen=True, tag="fetch"):
    size: int


class Fetched(Message, frozen=True, tag="fetched"):
    blob: Blob


class Hang(Message, frozen=True, tag="hang"):
    """Answered never."""


TABLE = [Note, Fetch, Fetched, Hang]


class Listener(Actor):
    """Remembers the numbers of its notes."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.hanging = asyncio.Event()

    @handles(Note)
    async def note(self, message: Note) -> int:
        self.seen.append(message.number)
        return len(self.seen)

    @handles(Fetch, concurrent=True)
    async def fetch(self, message: Fetch) -> Fetched:
        return Fetched(blob=Blob(bytes(message.size)))

    @handles(Hang, concurrent=True)
    async def hang(self, _: Hang) -> None:
        self.hanging.set()
        await asyncio.Event().wait()


class Asker(Actor):
    """Asks another actor what it was asked itself."""

    def __init__(self, other: ActorRef) -> None:
        self._other = other

    @handles(Hang, concurrent=True)
    async def hang(self, message: Hang) -> None:
        await self._other.ask(message, timeout_s=1000)


@asynccontextmanager
async def connected(theirs: Limits | None = None) -> AsyncIterator[tuple[ActorRef, Listener]]:
    """Two connected nodes, of which the asking one has these limits; a reference to a listener on the other."""
    here = ActorSystem(node_id="here", messages=TABLE)
    there = ActorSystem(node_id="there", messages=TABLE, limits=theirs)
    listener = Listener()
    await here.spawn(listener, "listener")
    ref = there.ref("listener", at=await here.listen("tcp://127.0.0.1:0"))
    try:
        await ref.ask(Note(number=-1), timeout_s=LIMIT_S)
        yield ref, listener
    finally:
        await there.close()
        await here.close()


@on_both_loops
async def test_letters_that_fill_more_than_one_frame_stay_in_order() -> None:
    for large, small in ((32, 32), (31, 40), (33, 32), (40, 200)):
        async with connected() as (ref, listener):
            for number in range(large + small):
                ref.tell(Note(number=number, text="y" * 3000 if number < large else ""))
            while len(listener.seen) < 1 + large + small:
                await ref.ask(Note(number=-1), timeout_s=LIMIT_S)
            assert [number for number in listener.seen if number >= 0] == list(range(large + small))


@on_both_loops
async def test_two_letters_that_just_fill_a_frame_are_taken() -> None:
    async with connected() as (ref, listener):
        for total in range(MAX_BATCH_BYTES - 60, MAX_BATCH_BYTES + 6):
            before = len(listener.seen)
            ref.tell(Note(number=0, text="y" * 20_000))
            ref.tell(Note(number=0, text="y" * (total - 20_000 - 60)))
            for _ in range(5):
                await asyncio.sleep(0)
            assert await ref.ask(Note(number=-1), timeout_s=LIMIT_S) == before + 3, "both were lost"


@on_both_loops
async def test_many_answers_with_blobs_at_once_do_not_break_the_connection() -> None:
    async with connected() as (ref, _):
        answers = await asyncio.gather(*(ref.ask(Fetch(size=1000), timeout_s=LIMIT_S) for _ in range(200)))
        assert [len(answer.blob) for answer in answers] == [1000] * 200


@on_both_loops
async def test_blobs_that_are_too_many_bytes_together_do_not_break_the_connection() -> None:
    async with connected(Limits(max_blob_bytes=1024 * 1024)) as (ref, _):
        asks = (ref.ask(Fetch(size=600_000), timeout_s=LIMIT_S) for _ in range(6))
        answers = await asyncio.gather(*asks, return_exceptions=True)
        assert all(isinstance(answer, Fetched | LinkFull) for answer in answers), answers


def answered(client: Client) -> None:
    """Wait for the answer to one more ask; the one before may have failed by then."""
    number = client.call(ASK, "listener", 10.0, None, {"kind": "note", "number": 1})
    while client.hear()[1] != number:
        pass


@pytest.mark.parametrize("ttl_s", [nan, inf, -inf, -1.0, 1e308])
async def test_a_time_that_is_no_time_leaves_everybodys_deadlines_alone(ttl_s: float) -> None:
    system = ActorSystem(node_id="here", messages=TABLE)
    listener = Listener()
    ref = await system.spawn(listener, "listener")
    await system.spawn(Asker(ref), "asker")
    host, port = (await system.listen("tcp://127.0.0.1:0")).removeprefix("here@tcp://").rsplit(":", 1)
    client = await asyncio.to_thread(Client, host, int(port), b"")
    try:
        client.call(ASK, "asker", ttl_s, None, {"kind": "hang"})
        await asyncio.to_thread(answered, client)
        async with asyncio.timeout(5):
            asks = [ref.ask(Hang(), timeout_s=0.05 * step) for step in range(1, 4)]
            ends = await asyncio.gather(*asks, return_exceptions=True)
        assert [type(end) for end in ends] == [DeadlineExceeded] * 3
    finally:
        client.close()
        await system.close()


@pytest.mark.parametrize(
    "letter",
    [
        pytest.param(lambda number: [BEAT, 2**64 - 1], id="beats"),
        pytest.param(lambda number: [ASK, number, "nobody", 10.0, None, {"kind": "hang"}], id="asks"),
        pytest.param(lambda number: [ASK, number, "nobody", 10.0, None, {"kind": "unknown"}], id="unreadable asks"),
        pytest.param(lambda number: [WATCH, number, "nobody"], id="watches"),
    ],
)
async def test_a_peer_that_speaks_and_never_reads_costs_a_bounded_buffer(letter: Callable[[int], list[Any]]) -> None:
    system = ActorSystem(node_id="here", messages=TABLE, limits=SMALL_BUFFER)
    host, port = (await system.listen("tcp://127.0.0.1:0")).removeprefix("here@tcp://").rsplit(":", 1)
    client = await asyncio.to_thread(Client, host, int(port), b"")

    def flood() -> None:
        client._socket.settimeout(1.0)
        with suppress(OSError):
            for begin in range(1, 100_000, 500):
                client.say(*map(letter, range(begin, begin + 500)))

    flooding = asyncio.get_running_loop().run_in_executor(None, flood)
    most = received = quiet_turns = 0
    try:
        while not flooding.done() or quiet_turns < QUIET_TURNS:
            await asyncio.sleep(0)
            links = system.stats().links
            most = max([most, *(link.waiting_bytes for link in links)])
            before, received = received, sum(link.received_bytes for link in links)
            quiet_turns = quiet_turns + 1 if received == before else 0
        assert most <= 2 * SMALL_BUFFER.link_unread_bytes
    finally:
        with suppress(SllmError):
            await flooding
        client.close()
        await system.close()
