"""The raw server and client as processes: `python -m benchmarks.actors_raw server | client PLAIN_PORT BULK_PORT`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from benchmarks.actors_process import Commands, Tally, measure, serve
from benchmarks.actors_raw_bulk import BulkClient, BulkServer
from benchmarks.actors_raw_plain import FLOOD, PACED, PlainClient, PlainServer

HOST = "127.0.0.1"


async def server() -> tuple[list[str], Commands]:
    """Listen with both kinds of frames."""
    loop = asyncio.get_running_loop()
    listening = [await loop.create_server(kind, HOST, 0) for kind in (PlainServer, BulkServer)]
    return [str(one.sockets[0].getsockname()[1]) for one in listening], {}


class Client:
    """The measurements of one client, by their names."""

    def __init__(self, plain: PlainClient, bulk: BulkClient) -> None:
        self._plain = plain
        self._bulk = bulk

    async def ask(self, outstanding: int, item_bytes: int, seconds: float) -> Any:
        tally = Tally()
        return await measure(tally, [self._plain.ask(tally, bytes(item_bytes)) for _ in range(outstanding)], seconds)

    async def tell(self, tellers: int, item_bytes: int, seconds: float) -> Any:
        tally = Tally()
        return await measure(tally, [self._plain.tell(tally, bytes(item_bytes)) for _ in range(tellers)], seconds)

    async def flood(self, streams: int, item_bytes: int, burst: bool, seconds: float) -> Any:
        tally = Tally()
        return await measure(tally, [self._plain.read(tally, FLOOD, item_bytes) for _ in range(streams)], seconds)

    async def paced(self, streams: int, item_bytes: int, period_s: float, seconds: float) -> Any:
        tally = Tally()
        return await measure(tally, _paced(self._plain, tally, streams, item_bytes, period_s), seconds)

    async def bulk(self, outstanding: int, payload_bytes: int, seconds: float) -> Any:
        tally = Tally()
        payload = bytes(payload_bytes)
        return await measure(tally, [self._bulk.ask_bulk(tally, payload) for _ in range(outstanding)], seconds)

    async def mixed(
        self, streams: int, item_bytes: int, period_s: float, outstanding: int, payload_bytes: int, seconds: float
    ) -> Any:
        tally = Tally()
        workers = _paced(self._bulk, tally, streams, item_bytes, period_s)
        payload = bytes(payload_bytes)
        workers += [self._bulk.ask_bulk(tally, payload) for _ in range(outstanding)]
        return await measure(tally, workers, seconds)


def _paced(
    peer: PlainClient | BulkClient, tally: Tally, streams: int, item_bytes: int, period_s: float
) -> list[Awaitable[None]]:
    """Read paced streams that take turns evenly over their period."""
    return [peer.read(tally, PACED, (item_bytes, period_s, period_s * turn / streams)) for turn in range(streams)]


async def client(plain_port: str, bulk_port: str) -> tuple[None, Commands]:
    """Connect both ways."""
    loop = asyncio.get_running_loop()
    _, plain = await loop.create_connection(PlainClient, HOST, int(plain_port))
    _, bulk = await loop.create_connection(BulkClient, HOST, int(bulk_port))
    made = Client(plain, bulk)
    names = ("ask", "tell", "flood", "paced", "bulk", "mixed")
    return None, {name: getattr(made, name) for name in names}


if __name__ == "__main__":
    serve(server=server, client=client)
