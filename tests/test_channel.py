"""Channels: messages over a socket, on a loop and blocking, through slow readers, garbage and ends."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from loops import on_both_loops

from sllm_actor.domain import RequestId
from sllm_actor.errors import ActorDied, FrameInvalid, FrameTooLong, ProtocolViolation
from sllm_actor.messages.engine import CancelGeneration, EngineHello, ShutDown
from sllm_actor.runtime.blocking import BlockingChannel
from sllm_actor.runtime.channel import HIGH_WATER_BYTES, Channel
from sllm_actor.runtime.frames import Codec
from sllm_actor.runtime.tasks import TaskScope

TABLE = (EngineHello, CancelGeneration, ShutDown)
MAX_FRAME_BYTES = 64 * 1024


def codec() -> Codec:
    return Codec(TABLE, TABLE, MAX_FRAME_BYTES)


def cancel(request_id: str) -> CancelGeneration:
    return CancelGeneration(request_id=RequestId(request_id))


class End:
    """A channel and what it said."""

    def __init__(self) -> None:
        self.received: asyncio.Queue[Any] = asyncio.Queue()
        self.closed: asyncio.Future[ProtocolViolation | None] = asyncio.get_running_loop().create_future()
        self.channel: Channel

    @classmethod
    async def open(cls, sock: socket.socket) -> End:
        end = cls()
        end.channel = await Channel.open(sock, codec(), end.received.put_nowait, end.closed.set_result)
        return end


@on_both_loops
async def test_messages_arrive_in_order_both_ways() -> None:
    left, right = [await End.open(sock) for sock in socket.socketpair()]
    for k in range(1000):
        left.channel.send_now(cancel(str(k)))
        right.channel.send_now(EngineHello())
    assert [(await right.received.get()).request_id for _ in range(1000)] == [str(k) for k in range(1000)]
    assert [await left.received.get() for _ in range(1000)] == [EngineHello()] * 1000
    left.channel.close()
    assert await right.closed is None
    assert await left.closed is None


@on_both_loops
async def test_sending_waits_while_the_other_end_does_not_read() -> None:
    ours, theirs = socket.socketpair()
    end = await End.open(ours)
    said = cancel("x" * 60_000)
    sent = 0

    async def send_much() -> None:
        nonlocal sent
        for _ in range(100):
            await end.channel.send(said)
            sent += 1

    sending = TaskScope("test").spawn(send_much(), "send")
    for _ in range(200):
        await asyncio.sleep(0)
    assert not sending.done()
    assert sent * 60_000 < 3 * HIGH_WATER_BYTES
    reader = await End.open(theirs)
    await sending
    assert [await reader.received.get() for _ in range(100)] == [said] * 100
    end.channel.close()
    await reader.closed


@on_both_loops
async def test_a_sender_that_waits_is_told_when_the_other_end_goes() -> None:
    ours, theirs = socket.socketpair()
    end = await End.open(ours)

    async def send_for_ever() -> None:
        while True:
            await end.channel.send(cancel("x" * 60_000))

    sending = TaskScope("test").spawn(send_for_ever(), "send", on_failure=lambda _: None)
    for _ in range(200):
        await asyncio.sleep(0)
    theirs.close()
    with pytest.raises(ActorDied):
        await sending
    assert await end.closed is None


@on_both_loops
async def test_garbage_closes_the_channel_and_names_the_violation() -> None:
    for garbage, kind in (
        (b"\xff\xff\xff\xff", FrameTooLong),
        (b"\x00\x00\x00\x01\xc1", FrameInvalid),
        (b"GET / HTTP/1.1\r\n\r\n", FrameTooLong),
    ):
        ours, theirs = socket.socketpair()
        end = await End.open(ours)
        theirs.sendall(codec().encode(EngineHello()) + garbage + codec().encode(EngineHello()))
        assert isinstance(await end.closed, kind)
        assert end.received.get_nowait() == EngineHello()
        assert end.received.empty()
        assert theirs.recv(1) == b""
        theirs.close()


@on_both_loops
async def test_a_channel_that_is_closing_takes_no_more_messages() -> None:
    ours, theirs = socket.socketpair()
    end = await End.open(ours)
    end.channel.close()
    assert (end.channel.closed, end.channel.ended) == (True, False)
    with pytest.raises(ActorDied):
        end.channel.send_now(EngineHello())
    assert await end.closed is None
    assert (end.channel.closed, end.channel.ended) == (True, True)
    with pytest.raises(ActorDied):
        await end.channel.send(EngineHello())
    theirs.close()


@on_both_loops
async def test_a_channel_closed_by_its_own_message_gives_no_further_ones() -> None:
    ours, theirs = socket.socketpair()
    received: list[Any] = []
    closed = asyncio.get_running_loop().create_future()

    def take(message: Any) -> None:
        received.append(message)
        channel.close()

    channel = await Channel.open(ours, codec(), take, closed.set_result)
    theirs.sendall(codec().encode(EngineHello()) * 3)
    await closed
    assert received == [EngineHello()]
    theirs.close()


@on_both_loops
async def test_the_last_words_of_an_end_that_has_gone_are_read() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(codec().encode(EngineHello()) * 100 + codec().encode(ShutDown())[:-1])
    theirs.close()
    end = await End.open(ours)
    assert await end.closed is None
    assert end.received.qsize() == 100


def test_a_blocking_channel_gives_what_has_come_and_none_where_nothing_has() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = BlockingChannel(ours, codec())
        assert channel.receive(wait=False) is None
        raw = codec().encode(cancel("a")) + codec().encode(cancel("b"))
        theirs.sendall(raw[:10])
        assert channel.receive(wait=False) is None
        theirs.sendall(raw[10:])
        assert channel.receive(wait=True) == cancel("a")
        assert channel.receive(wait=False) == cancel("b")
        assert channel.receive(wait=False) is None
        channel.send(EngineHello())
        assert list(codec().feed(theirs.recv(4096))) == [EngineHello()]


def test_a_blocking_channel_tells_of_the_end_after_the_last_message() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        channel = BlockingChannel(ours, codec())
        theirs.sendall(codec().encode(EngineHello()))
        theirs.close()
        assert channel.receive(wait=True) == EngineHello()
        for wait in (True, False):
            with pytest.raises(EOFError):
                channel.receive(wait=wait)
        with pytest.raises(OSError, match="Broken pipe"):
            channel.send(EngineHello())


def test_a_blocking_channel_refuses_garbage() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"\xff" * 100)
        with pytest.raises(FrameTooLong):
            BlockingChannel(ours, codec()).receive(wait=True)


def test_whoever_waits_for_the_other_end_to_close_reads_all_that_comes_before() -> None:
    ours, theirs = socket.socketpair()

    def last_words() -> None:
        with theirs:
            channel = BlockingChannel(theirs, codec())
            channel.send(EngineHello())
            channel.wait_closed()

    with ThreadPoolExecutor(1) as pool, ours:
        leaving = pool.submit(last_words)
        # More than the socket holds: it would fail, or wait for ever, were it not read.
        ours.settimeout(60)
        ours.sendall(bytes(8 * 1024 * 1024))
        assert [*codec().feed(ours.recv(MAX_FRAME_BYTES))] == [EngineHello()]
        assert not leaving.done()
        ours.shutdown(socket.SHUT_RDWR)
        leaving.result()
