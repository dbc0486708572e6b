"""Nodes in other processes that are killed, stopped, continued, or run out of descriptors."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from remote_pairs import (
    FOR_EVER_S,
    QUICK,
    Carry,
    Count,
    Everyman,
    HoldAside,
    Say,
    WatchIt,
    link_of,
    node,
    on_both_loops,
    outcome,
    until,
)

from sllm_actor.errors import NodeUnreachable
from sllm_actor.runtime import ActorRef, Blob

SCRIPT = Path(__file__).with_name("peer_process.py")
WATCHFUL = msgspec.structs.replace(QUICK, heartbeat_s=0.05, acceptable_pause_s=0.2, down_after_s=0.3)


class PeerProcess:
    """A running `peer_process.py`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.address = ""

    async def line(self) -> str:
        """Read its next line."""
        assert self.process.stdout is not None
        return (await self.process.stdout.readline()).decode().strip()

    def say(self, line: str) -> None:
        """Write it a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())

    async def kill(self) -> None:
        """Kill it, and wait until the kernel has buried it."""
        self.process.kill()
        await self.process.wait()


@asynccontextmanager
async def started(*words: str) -> AsyncIterator[PeerProcess]:
    """Run the script for a while; it is dead afterwards."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(SCRIPT), *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    peer = PeerProcess(process)
    try:
        yield peer
    finally:
        if process.returncode is None:
            await peer.kill()
        process._transport.close()  # type: ignore[attr-defined]


@asynccontextmanager
async def serving(name: str = "b", endpoint: str = "tcp://127.0.0.1:0") -> AsyncIterator[PeerProcess]:
    """Run a node in a process of its own."""
    async with started("serve", name, endpoint) as peer:
        peer.address = await peer.line()
        yield peer


async def ask(ref: ActorRef, text: str = "x") -> object:
    return await outcome(ref.ask(Say(text=text), timeout_s=FOR_EVER_S))


async def comes_back(ref: ActorRef) -> None:
    while await ask(ref, "back") != "back":
        await asyncio.sleep(0.002)


async def last_of(ref: ActorRef) -> object:
    """Read a stream without an end."""
    return [item async for item in ref.stream(Count(upto=10**9)) if item == -1]


@on_both_loops
async def test_when_a_node_is_killed_asks_and_streams_fail_at_once_and_watchers_hear_of_it() -> None:
    async with node("a", WATCHFUL) as a, serving() as peer:
        ref = a.ref("man", peer.address)
        assert await ask(ref) == "x"
        watching = Everyman()
        assert await (await a.spawn(watching, "watching")).ask(WatchIt(ref=ref), timeout_s=FOR_EVER_S)
        ended = asyncio.ensure_future(ref.ended())
        works = [
            asyncio.ensure_future(outcome(work))
            for work in (
                ref.ask(HoldAside(), timeout_s=FOR_EVER_S),
                ref.ask(Carry(blob=Blob(bytes(2**26))), timeout_s=FOR_EVER_S),
                last_of(ref),
            )
        ]
        await ask(ref)
        await peer.kill()
        for work in works:
            assert type(await work) is NodeUnreachable
        assert (await ended).reason == "node_down"
        assert (await watching.ends.get()).reason == "node_down"
        assert type(await ask(ref)) is NodeUnreachable


@on_both_loops
async def test_a_node_that_was_killed_and_is_started_again_is_found_by_name() -> None:
    async with node("a") as a:
        async with serving() as first:
            ref = a.ref("man", first.address)
            assert await ask(ref) == "x"
            endpoint = first.address.partition("@")[2]
            await first.kill()
        async with serving("b", endpoint) as again:
            assert again.address == first.address
            await comes_back(ref)


@on_both_loops
async def test_a_node_that_is_stopped_is_suspected_and_reached_again_when_it_goes_on() -> None:
    patient = msgspec.structs.replace(WATCHFUL, down_after_s=FOR_EVER_S, handshake_timeout_s=0.3)
    async with node("a", patient) as a, serving() as peer:
        ref = a.ref("man", peer.address)
        assert await ask(ref) == "x"
        ended = asyncio.ensure_future(ref.ended())
        peer.process.send_signal(signal.SIGSTOP)
        try:
            held = await outcome(ref.ask(HoldAside(), timeout_s=FOR_EVER_S))
            assert type(held) is NodeUnreachable
        finally:
            peer.process.send_signal(signal.SIGCONT)
        await comes_back(ref)
        assert not ended.done()
        ended.cancel()
        assert link_of(a, "b").connections >= 2


@on_both_loops
async def test_a_node_that_is_stopped_for_too_long_is_down() -> None:
    async with node("a", WATCHFUL) as a, serving() as peer:
        ref = a.ref("man", peer.address)
        assert await ask(ref) == "x"
        ended = asyncio.ensure_future(ref.ended())
        stream = asyncio.ensure_future(outcome(last_of(ref)))
        peer.process.send_signal(signal.SIGSTOP)
        assert (await ended).reason == "node_down"
        assert type(await stream) is NodeUnreachable
        assert type(await ask(ref)) is NodeUnreachable


@on_both_loops
async def test_a_node_without_free_descriptors_fails_to_dial_with_a_typed_error_and_goes_on_later() -> None:
    async with node("b") as b:
        await b.spawn(Everyman(), "man")
        async with started("run-out", str(b.address)) as poor:
            assert await poor.line() == "NodeUnreachable"
            assert await poor.line() == "x"
            assert await poor.process.wait() == 0


@on_both_loops
async def test_a_node_without_free_descriptors_accepts_again_once_there_are_some() -> None:
    async with node("a") as a, node("c") as c, started("serve-without", "b", "tcp://127.0.0.1:0") as poor:
        address = await poor.line()
        first = a.ref("man", address)
        assert await ask(first) == "x"
        poor.say("take them")
        assert await poor.line() == "taken"
        assert await ask(first) == "x"
        waiting = asyncio.ensure_future(comes_back(c.ref("man", address)))
        assert await ask(first) == "x"
        poor.say("give them back")
        await waiting
        assert link_of(a, "b").connections == 1
        await until(lambda: link_of(c, "b").open)
