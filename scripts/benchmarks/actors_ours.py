"""Our actors as processes: `python -m benchmarks.actors_ours server | client ADDRESS`. Loopback TCP, no secret."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Awaitable
from typing import Any

from benchmarks.actors_process import Commands, Tally, measure, serve
from benchmarks.actors_raw_plain import STAMP, TELL_FRAMES
from sllm_actor.messages.declare import message
from sllm_actor.runtime import Actor, ActorRef, ActorSystem, Blob, SystemClock, handles
from sllm_actor.runtime.network import SocketNetwork

NAME = "bench"
ASK_TIMEOUT_S = 30.0
# What a reader takes before it stalls: it has been a good one until then.
ITEMS_BEFORE_STALL = 10


@message("bench.ask")
class Ask:
    """Answered by `Answer` with the same body."""

    body: bytes


@message("bench.answer")
class Answer:
    """Answers `Ask`."""

    body: bytes


@message("bench.tell")
class Tell:
    """Is counted."""

    body: bytes


@message("bench.flood")
class Flood:
    """Answered by a stream of `Item`, as many as are taken: in bursts, or each after a turn of the loop."""

    item_bytes: int
    burst: bool = False


@message("bench.paced")
class Paced:
    """Answered by a stream of `Item` with stamps, one a period."""

    item_bytes: int
    period_s: float
    phase_s: float


@message("bench.item")
class Item:
    """One item of a stream."""

    body: bytes


@message("bench.bulk")
class Bulk:
    """Answered by the payload's size, an int."""

    payload: Blob


MESSAGES = [Ask, Answer, Tell, Flood, Paced, Item, Bulk]


class Bench(Actor):
    """Echoes, counts and streams. Owns how often it was told."""

    def __init__(self) -> None:
        self._told = 0

    @handles(Ask)
    async def ask(self, message: Ask) -> Answer:
        return Answer(body=message.body)

    @handles(Tell)
    async def tell(self, message: Tell) -> None:
        self._told += 1

    @handles(Bulk)
    async def bulk(self, message: Bulk) -> int:
        return len(message.payload.data)

    @handles(Flood)
    async def flood(self, message: Flood) -> AsyncGenerator[Item, None]:
        body = bytes(message.item_bytes)
        while True:
            if not message.burst:
                await asyncio.sleep(0)
            yield Item(body=body)

    @handles(Paced)
    async def paced(self, message: Paced) -> AsyncGenerator[Item, None]:
        filling = bytes(message.item_bytes - STAMP.size)
        due_s = time.monotonic() + message.phase_s
        while True:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            yield Item(body=STAMP.pack(time.monotonic_ns()) + filling)
            due_s += message.period_s


def new_system(node_id: str) -> ActorSystem:
    """Make a system that knows the messages of the benchmark."""
    return ActorSystem(
        node_id=node_id, messages=MESSAGES, clock=SystemClock(), network=SocketNetwork(), randomness=os.urandom
    )


async def server() -> tuple[str, Commands]:
    """Spawn the actor and listen."""
    system = new_system("bench-server")
    address = await system.listen("tcp://127.0.0.1:0")
    await system.spawn(Bench(), NAME)
    return address, {"close": system.close}


class Client:
    """The measurements of one client, by their names."""

    def __init__(self, ref: ActorRef) -> None:
        self._ref = ref
        self._others: tuple[Tally, list[asyncio.Task[None]]] = (Tally(), [])
        self._stalled: Any = None

    async def _ask(self, tally: Tally, body: bytes) -> None:
        ask = self._ref.ask
        while tally.running:
            await ask(Ask(body=body), timeout_s=ASK_TIMEOUT_S)
            tally.count += 1

    async def _tell(self, tally: Tally, body: bytes) -> None:
        tell = self._ref.tell
        while tally.running:
            for _ in range(TELL_FRAMES):
                tell(Tell(body=body))
            await self._ref.ask(Ask(body=b""), timeout_s=ASK_TIMEOUT_S)
            tally.count += TELL_FRAMES

    async def _ask_bulk(self, tally: Tally, payload: bytes) -> None:
        while tally.running:
            await self._ref.ask(Bulk(payload=Blob(payload)), timeout_s=ASK_TIMEOUT_S)
            tally.count += 1

    async def _flood(self, tally: Tally, item_bytes: int, burst: bool = False) -> None:
        items = self._ref.stream(Flood(item_bytes=item_bytes, burst=burst))
        async for _ in items:
            tally.count += 1
            if not tally.running:
                break
        await items.aclose()

    async def _paced(self, tally: Tally, message: Paced) -> None:
        items = self._ref.stream(message)
        async for item in items:
            tally.ages_ns.append(time.monotonic_ns() - STAMP.unpack_from(item.body)[0])
            if not tally.running:
                break
        await items.aclose()

    def _all_paced(self, tally: Tally, streams: int, item_bytes: int, period_s: float) -> list[Awaitable[None]]:
        """Read paced streams that take turns evenly over their period."""
        turns = [period_s * turn / streams for turn in range(streams)]
        return [
            self._paced(tally, Paced(item_bytes=item_bytes, period_s=period_s, phase_s=phase_s)) for phase_s in turns
        ]

    async def ask(self, outstanding: int, item_bytes: int, seconds: float) -> Any:
        tally = Tally()
        return await measure(tally, [self._ask(tally, bytes(item_bytes)) for _ in range(outstanding)], seconds)

    async def tell(self, tellers: int, item_bytes: int, seconds: float) -> Any:
        tally = Tally()
        return await measure(tally, [self._tell(tally, bytes(item_bytes)) for _ in range(tellers)], seconds)

    async def flood(self, streams: int, item_bytes: int, burst: bool, seconds: float) -> Any:
        tally = Tally()
        return await measure(tally, [self._flood(tally, item_bytes, burst) for _ in range(streams)], seconds)

    async def paced(self, streams: int, item_bytes: int, period_s: float, seconds: float) -> Any:
        tally = Tally()
        return await measure(tally, self._all_paced(tally, streams, item_bytes, period_s), seconds)

    async def bulk(self, outstanding: int, payload_bytes: int, seconds: float) -> Any:
        tally = Tally()
        payload = bytes(payload_bytes)
        return await measure(tally, [self._ask_bulk(tally, payload) for _ in range(outstanding)], seconds)

    async def mixed(
        self, streams: int, item_bytes: int, period_s: float, outstanding: int, payload_bytes: int, seconds: float
    ) -> Any:
        tally = Tally()
        workers = self._all_paced(tally, streams, item_bytes, period_s)
        payload = bytes(payload_bytes)
        workers += [self._ask_bulk(tally, payload) for _ in range(outstanding)]
        return await measure(tally, workers, seconds)

    async def others_begin(self, streams: int, item_bytes: int, period_s: float) -> None:
        """Begin the streams that go on while another stalls."""
        tally = Tally()
        workers = self._all_paced(tally, streams, item_bytes, period_s)
        self._others = (tally, [asyncio.ensure_future(worker) for worker in workers])

    async def others_end(self) -> int:
        """End them; give how many items they have brought."""
        tally, tasks = self._others
        tally.running = False
        await asyncio.gather(*tasks)
        return len(tally.ages_ns)

    async def stall_begin(self, item_bytes: int) -> None:
        """Read the beginning of a flood, and then no more of it."""
        self._stalled = aiter(self._ref.stream(Flood(item_bytes=item_bytes)))
        for _ in range(ITEMS_BEFORE_STALL):
            await anext(self._stalled)

    async def stall_end(self) -> None:
        """Let go of the stream that stalled."""
        await self._stalled.aclose()

    def commands(self) -> Commands:
        """Give what can be asked for from outside."""
        names = ["ask", "tell", "flood", "paced", "bulk", "mixed"]
        names += ["others_begin", "others_end", "stall_begin", "stall_end"]
        return {name: getattr(self, name) for name in names}


async def client(address: str) -> tuple[None, Commands]:
    """Make a node that refers to the server's actor."""
    return None, Client(new_system("bench-client").ref(NAME, at=address)).commands()


if __name__ == "__main__":
    serve(server=server, client=client)
