"""Raw with nothing left to leave out: `python -m benchmarks.actors_raw_tuned server | client PORT`.

A frame is `[kind, number, body]` and nothing else: msgpack itself says where it ends. One packer's buffer takes all
frames of a write, the C unpacker all bytes of a read, and a stream sends in bursts. Nothing of this could be refused
before it is built, so it is no limit for a protocol that must; it is measured for who wants to know.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import msgpack

from benchmarks.actors_process import Commands, Tally, measure, serve
from benchmarks.actors_raw_plain import ANSWER, ASK, FLOOD, WRITE_FRAMES, Asking, Frame, Serving

HOST = "127.0.0.1"


class _Unframed(asyncio.Protocol):
    """Packs frames into one buffer: written when it holds 32, or else at the end of the turn."""

    def __init__(self) -> None:
        super().__init__()
        self._packer = msgpack.Packer(autoreset=False)
        self._pack = self._packer.pack
        self._unpacker = msgpack.Unpacker(use_list=False)
        self._gathered = 0
        self._scheduled = False
        self._call_soon = asyncio.get_running_loop().call_soon

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._write = cast(asyncio.Transport, transport).write

    def send(self, frame: Frame) -> None:
        self._pack(frame)
        self._gathered += 1
        if self._gathered >= WRITE_FRAMES:
            self._gathered = 0
            self._write(self._packer.bytes())
            self._packer.reset()
        elif not self._scheduled:
            self._scheduled = True
            self._call_soon(self._turn_ends)

    def _turn_ends(self) -> None:
        self._scheduled = False
        self.flush()

    def flush(self) -> None:
        if self._gathered:
            self._gathered = 0
            self._write(self._packer.bytes())
            self._packer.reset()


class TunedServer(Serving, _Unframed):
    """The server's end of one connection."""

    flood_frames = 32

    def data_received(self, data: bytes) -> None:
        self._unpacker.feed(data)
        self._scheduled = True  # What is answered here is written below.
        for kind, number, body in self._unpacker:
            if kind == ASK:
                self.send((ANSWER, number, body))
            else:
                self.serve(kind, number, body)
        self._scheduled = False
        self.flush()


class TunedClient(Asking, _Unframed):
    """The client's end of one connection."""

    def data_received(self, data: bytes) -> None:
        self._unpacker.feed(data)
        pending = self._pending
        for kind, number, body in self._unpacker:
            if kind == ANSWER:
                pending.pop(number).set_result(body)
            else:
                self.arrived(number, body)


async def server() -> tuple[str, Commands]:
    """Listen."""
    listening = await asyncio.get_running_loop().create_server(TunedServer, HOST, 0)
    return str(listening.sockets[0].getsockname()[1]), {}


async def client(port: str) -> tuple[None, Commands]:
    """Connect."""
    _, made = await asyncio.get_running_loop().create_connection(TunedClient, HOST, int(port))

    async def ask(outstanding: int, item_bytes: int, seconds: float) -> Any:
        tally = Tally()
        return await measure(tally, [made.ask(tally, bytes(item_bytes)) for _ in range(outstanding)], seconds)

    async def flood(streams: int, item_bytes: int, burst: bool, seconds: float) -> Any:
        tally = Tally()
        return await measure(tally, [made.read(tally, FLOOD, item_bytes) for _ in range(streams)], seconds)

    return None, {"ask": ask, "flood": flood}


if __name__ == "__main__":
    serve(server=server, client=client)
