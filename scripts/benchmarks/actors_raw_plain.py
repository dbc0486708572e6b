"""The limit, called raw: an asyncio.Protocol with msgpack arrays as frames, gathered into writes of at most 32.

A frame is a 4-byte length and the array `[kind, number, body]`, written and read by `msgpack.packb` and `unpackb`, as
one would by hand. No types, no deadlines, no mailboxes, no credit. `actors_raw_tuned` goes without the framing, too.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, cast

import msgpack

from benchmarks.actors_process import Tally

ASK, TELL, FLOOD, PACED, CANCEL, ANSWER, ITEM, END = range(8)
# Frames of one write: a longer one is faster to send, but keeps the other process waiting for its first.
WRITE_FRAMES = 32
# Tells between two asks that wait for them; two tellers stay within a mailbox of ours.
TELL_FRAMES = 256
LENGTH = struct.Struct(">I")
STAMP = struct.Struct(">Q")
Frame = tuple[int, int, Any]


class Serving:
    """What a raw server does with a frame: echo it, count it, or start a stream."""

    send: Callable[[Frame], None]
    flush: Callable[[], None]
    # Of one stream, before the next one has its turn: one, as from a producer that waits for each.
    flood_frames = 1

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._told = 0
        self._open: dict[int, asyncio.Task[None]] = {}
        self._writable: asyncio.Future[None] | None = None

    def pause_writing(self) -> None:
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        assert self._writable is not None
        self._writable.set_result(None)
        self._writable = None

    def serve(self, kind: int, number: int, body: Any) -> None:
        """Serve any frame that is no ask."""
        if kind == TELL:
            self._told += 1
        elif kind == CANCEL:
            self._open.pop(number)
        elif kind == FLOOD:
            self._open[number] = self._loop.create_task(self._flood(number, bytes(body)))
        elif kind == PACED:
            self._open[number] = self._loop.create_task(self._pace(number, *body))

    async def _flood(self, number: int, body: bytes) -> None:
        send, opened = self.send, self._open
        while number in opened:
            for _ in range(self.flood_frames):
                send((ITEM, number, body))
            if self._writable is not None:
                await self._writable
            else:
                await asyncio.sleep(0)
        send((END, number, None))
        self.flush()

    async def _pace(self, number: int, size_bytes: int, period_s: float, phase_s: float) -> None:
        filling = bytes(size_bytes - STAMP.size)
        due_s = time.monotonic() + phase_s
        while number in self._open:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            self.send((ITEM, number, STAMP.pack(time.monotonic_ns()) + filling))
            due_s += period_s
        self.send((END, number, None))


class _Reader:
    """One stream's items that have come and are not read yet."""

    __slots__ = ("items", "waiter")

    def __init__(self) -> None:
        self.items: deque[Any] = deque()
        self.waiter: asyncio.Future[None] | None = None


class Asking:
    """What a raw client does: workers that ask, tell and read streams until they are told to stop."""

    send: Callable[[Frame], None]

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._number = 0
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._readers: dict[int, _Reader] = {}

    def arrived(self, number: int, body: Any) -> None:
        """Give an item, or None as the end, to the reader of its stream."""
        reader = self._readers[number]
        reader.items.append(body)
        waiter = reader.waiter
        if waiter is not None:
            reader.waiter = None
            waiter.set_result(None)

    async def ask(self, tally: Tally, body: bytes) -> None:
        """Ask, one after the other."""
        while tally.running:
            number = self._number = self._number + 1
            answer = self._pending[number] = self._loop.create_future()
            self.send((ASK, number, body))
            await answer
            tally.count += 1

    async def tell(self, tally: Tally, body: bytes) -> None:
        """Tell many times, then ask, which is answered when all have been served."""
        while tally.running:
            for _ in range(TELL_FRAMES):
                self.send((TELL, 0, body))
            number = self._number = self._number + 1
            answer = self._pending[number] = self._loop.create_future()
            self.send((ASK, number, b""))
            await answer
            tally.count += TELL_FRAMES

    async def read(self, tally: Tally, kind: int, body: Any) -> None:
        """Read one stream; a paced one's items are as old as their stamp says."""
        number = self._number = self._number + 1
        reader = self._readers[number] = _Reader()
        items = reader.items
        self.send((kind, number, body))
        cancelled = False
        while True:
            while not items:
                reader.waiter = self._loop.create_future()
                await reader.waiter
            item = items.popleft()
            if item is None:
                break
            if kind == PACED:
                tally.ages_ns.append(time.monotonic_ns() - STAMP.unpack_from(item)[0])
            else:
                tally.count += 1
            if not tally.running and not cancelled:
                self.send((CANCEL, number, None))
                cancelled = True
        del self._readers[number]


class _Framed(asyncio.Protocol):
    """Gathers frames into a list: written when it holds 32, or else at the end of the turn."""

    def __init__(self) -> None:
        super().__init__()
        self._frames: list[bytes] = []
        self._rest = b""
        self._scheduled = False
        self._call_soon = asyncio.get_running_loop().call_soon

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._write = cast(asyncio.Transport, transport).write

    def send(self, frame: Frame) -> None:
        body = msgpack.packb(frame)
        self._frames.append(LENGTH.pack(len(body)) + body)
        if len(self._frames) >= WRITE_FRAMES:
            self.flush()
        elif not self._scheduled:
            self._scheduled = True
            self._call_soon(self._turn_ends)

    def _turn_ends(self) -> None:
        self._scheduled = False
        self.flush()

    def flush(self) -> None:
        if self._frames:
            frames, self._frames = self._frames, []
            self._write(b"".join(frames))

    def received(self, data: bytes) -> Iterator[Frame]:
        """Give the frames that have come whole."""
        data, at = self._rest + data, 0
        while len(data) - at >= LENGTH.size:
            begin = at + LENGTH.size
            end = begin + LENGTH.unpack_from(data, at)[0]
            if end > len(data):
                break
            yield msgpack.unpackb(data[begin:end], use_list=False)
            at = end
        self._rest = data[at:]


class PlainServer(Serving, _Framed):
    """The raw server's end of one connection."""

    def data_received(self, data: bytes) -> None:
        for kind, number, body in self.received(data):
            if kind == ASK:
                self.send((ANSWER, number, body))
            else:
                self.serve(kind, number, body)


class PlainClient(Asking, _Framed):
    """The raw client's end of one connection."""

    def data_received(self, data: bytes) -> None:
        pending = self._pending
        for kind, number, body in self.received(data):
            if kind == ANSWER:
                pending.pop(number).set_result(body)
            else:
                self.arrived(number, body)
