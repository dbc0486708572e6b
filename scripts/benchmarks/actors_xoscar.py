"""xoscar's actors as processes: `python -m benchmarks.actors_xoscar server | client ADDRESS`.

The pool has no processes of its own besides the server, so that an ask is answered where it arrives.
"""

from __future__ import annotations

import socket
from typing import Any

import xoscar

from benchmarks.actors_process import Commands, Tally, measure, serve
from benchmarks.actors_raw_plain import TELL_FRAMES

UID = "bench"


class Bench(xoscar.Actor):  # type: ignore[misc]
    """Echoes what it is asked, and counts what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self._told = 0

    async def echo(self, body: bytes) -> bytes:
        return body

    async def take(self, body: bytes) -> None:
        self._told += 1


async def server() -> tuple[str, Commands]:
    """Make a pool with one actor."""
    with socket.socket() as probe:  # The pool wants to know its port beforehand.
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    pool = await xoscar.create_actor_pool(address, n_process=0)
    await xoscar.create_actor(Bench, uid=UID, address=address)

    async def end() -> None:
        await pool.stop()

    return address, {"end": end}


class Client:
    """The measurements of one client, by their names."""

    def __init__(self, ref: Any) -> None:
        self._ref = ref

    async def _ask(self, tally: Tally, body: bytes) -> None:
        echo = self._ref.echo
        while tally.running:
            await echo(body)
            tally.count += 1

    async def _tell(self, tally: Tally, body: bytes) -> None:
        while tally.running:
            for _ in range(TELL_FRAMES):
                await self._ref.take.tell(body)
            await self._ref.echo(b"")
            tally.count += TELL_FRAMES

    async def ask(self, outstanding: int, item_bytes: int, seconds: float) -> Any:
        tally = Tally()
        return await measure(tally, [self._ask(tally, bytes(item_bytes)) for _ in range(outstanding)], seconds)

    async def tell(self, tellers: int, item_bytes: int, seconds: float) -> Any:
        tally = Tally()
        return await measure(tally, [self._tell(tally, bytes(item_bytes)) for _ in range(tellers)], seconds)


async def client(address: str) -> tuple[None, Commands]:
    """Get a reference to the actor."""
    made = Client(await xoscar.actor_ref(address=address, uid=UID))
    return None, {"ask": made.ask, "tell": made.tell}


if __name__ == "__main__":
    serve(server=server, client=client)
