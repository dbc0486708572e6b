"""The limit of large payloads: raw, with the payload beside the envelope and received into its own buffer.

A frame is a 4-byte length, a msgpack envelope `[kind, number, payload_bytes, body]`, and the payload as it is.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any, cast

import msgpack

from benchmarks.actors_process import Tally
from benchmarks.actors_raw_plain import ANSWER, ASK, WRITE_FRAMES, Asking, Frame, Serving

LENGTH = struct.Struct(">I")
# Small, as what it holds of a payload is copied out of it.
SCRATCH_BYTES = 16 * 1024


class _Beside(asyncio.BufferedProtocol):
    """Receives envelopes into a scratch buffer, and each payload into a bytearray of its size."""

    def __init__(self) -> None:
        super().__init__()
        self._pack = msgpack.Packer().pack
        self._frames: list[bytes] = []
        self._scheduled = False
        self._call_soon = asyncio.get_running_loop().call_soon
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._filled = 0
        self._payload: memoryview | None = None
        self._missing = 0
        self._envelope: tuple[int, int, int, Any] = (0, 0, 0, None)

    def received(self, kind: int, number: int, body: Any) -> None:
        """Take a frame that has come; its payload, where it has one, is its body."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def send(self, frame: Frame) -> None:
        kind, number, body = frame
        envelope = self._pack((kind, number, 0, body))
        self._frames.append(LENGTH.pack(len(envelope)) + envelope)
        if len(self._frames) >= WRITE_FRAMES:
            self.flush()
        elif not self._scheduled:
            self._scheduled = True
            self._call_soon(self._turn_ends)

    def send_bulk(self, kind: int, number: int, payload: bytes) -> None:
        envelope = self._pack((kind, number, len(payload), None))
        frames, self._frames = self._frames, []
        self._transport.writelines([*frames, LENGTH.pack(len(envelope)) + envelope, payload])

    def _turn_ends(self) -> None:
        self._scheduled = False
        self.flush()

    def flush(self) -> None:
        if self._frames:
            frames, self._frames = self._frames, []
            self._transport.write(b"".join(frames))

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._payload is not None:
            return self._payload[-self._missing :]
        return self._scratch[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._payload is None:
            self._filled += nbytes
            self._parse()
            return
        self._missing -= nbytes
        if not self._missing:
            (kind, number, _, _), payload, self._payload = self._envelope, self._payload, None
            self.received(kind, number, payload.obj)

    def _parse(self) -> None:
        scratch, filled, at = self._scratch, self._filled, 0
        while filled - at >= LENGTH.size:
            begin = at + LENGTH.size
            end = begin + LENGTH.unpack_from(scratch, at)[0]
            if end > filled:
                break
            kind, number, payload_bytes, body = envelope = msgpack.unpackb(scratch[begin:end], use_list=False)
            if not payload_bytes:
                self.received(kind, number, body)
                at = end
                continue
            payload = bytearray(payload_bytes)
            here = min(payload_bytes, filled - end)
            payload[:here] = scratch[end : end + here]
            at = end + here
            if here < payload_bytes:
                self._envelope, self._payload, self._missing = envelope, memoryview(payload), payload_bytes - here
                break
            self.received(kind, number, payload)
        scratch[: filled - at] = bytes(scratch[at:filled])
        self._filled = filled - at


class BulkServer(Serving, _Beside):
    """The server's end of one connection."""

    def received(self, kind: int, number: int, body: Any) -> None:
        if kind == ASK:
            self.send((ANSWER, number, len(body)))
        else:
            self.serve(kind, number, body)


class BulkClient(Asking, _Beside):
    """The client's end of one connection."""

    def received(self, kind: int, number: int, body: Any) -> None:
        if kind == ANSWER:
            self._pending.pop(number).set_result(body)
        else:
            self.arrived(number, body)

    async def ask_bulk(self, tally: Tally, payload: bytes) -> None:
        """Ask with a large payload, one after the other."""
        while tally.running:
            number = self._number = self._number + 1
            answer = self._pending[number] = self._loop.create_future()
            self.send_bulk(ASK, number, payload)
            await answer
            tally.count += 1
