"""A proxy on real sockets between an HTTP client and one origin, which can cut, stall, slow and corrupt an answer.

`with FaultProxy(port_of_origin) as proxy`: requests to `proxy.url` go on to the origin as they are. What happens to a
request is chosen by its number, counted from 1, or by a function of the request. Each request has its own connection.
Bytes are those of the answer's body; the head goes through whole.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from raw_server import MAX_HEAD_BYTES, RawServer, Request

PIECE_BYTES = 256 * 1024


@dataclass(frozen=True)
class Fault:
    """What happens to one answer; several may be combined.

    `cut_after_bytes` ends the connection once so many bytes of the body have gone, by a reset with `reset`.
    `stall_after_bytes` sends nothing more from there on, until the proxy ends. `bytes_per_s` is a rate.
    `corrupt_byte` flips the bits of that byte of the body, counted from 0.
    """

    cut_after_bytes: int | None = None
    reset: bool = False
    stall_after_bytes: int | None = None
    bytes_per_s: float | None = None
    corrupt_byte: int | None = None


Choose = Callable[[Request], Fault | None]
WHOLE = Fault()


class FaultProxy(RawServer):
    """`faults` has faults by the number of the request; `choose` is asked about those that it does not have."""

    def __init__(
        self, port: int, faults: dict[int, Fault] | None = None, choose: Choose | None = None, host: str = "127.0.0.1"
    ) -> None:
        super().__init__(self._relay)
        self._origin = (host, port)
        self.faults = dict(faults or {})
        # Of all answers together.
        self.body_bytes = 0
        self._counting = threading.Lock()
        self.choose = choose

    def count(self, size_bytes: int) -> None:
        """Note that so much of a body has gone."""
        with self._counting:
            self.body_bytes += size_bytes

    def _relay(self, request: Request) -> None:
        fault = self.faults.get(request.number) or (self.choose(request) if self.choose else None) or WHOLE
        with socket.create_connection(self._origin, timeout=60) as origin:
            origin.sendall(_for_one_request(request.raw))
            body = _relay_head(origin, request.client)
            _relay_body(self, origin, request, fault, body)


def _for_one_request(raw: bytes) -> bytes:
    head, rest = raw.split(b"\r\n\r\n", 1)
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
    return b"\r\n".join([*lines, b"Connection: close", b"", rest])


def _relay_head(origin: socket.socket, client: socket.socket) -> bytes:
    """Send the head of the answer on, and return the beginning of the body that came with it."""
    raw = b""
    while b"\r\n\r\n" not in raw:
        piece = origin.recv(4096)
        if not piece or len(raw) > MAX_HEAD_BYTES:
            raise OSError("the origin answers without a head")
        raw += piece
    head, body = raw.split(b"\r\n\r\n", 1)
    client.sendall(head + b"\r\n\r\n")
    return body


def _relay_body(proxy: FaultProxy, origin: socket.socket, request: Request, fault: Fault, piece: bytes) -> None:
    sent = 0
    begun_s = time.monotonic()
    limits = [limit for limit in (fault.cut_after_bytes, fault.stall_after_bytes) if limit is not None]
    limit = min(limits) if limits else None
    rate = fault.bytes_per_s
    piece_bytes = PIECE_BYTES if rate is None else max(1, min(PIECE_BYTES, int(rate / 50)))
    while True:
        if limit is not None:
            piece = piece[: limit - sent]
        if fault.corrupt_byte is not None and sent <= fault.corrupt_byte < sent + len(piece):
            at = fault.corrupt_byte - sent
            piece = piece[:at] + bytes([piece[at] ^ 0xFF]) + piece[at + 1 :]
        request.client.sendall(piece)
        sent += len(piece)
        proxy.count(len(piece))
        if limit is not None and sent == limit:
            if limit == fault.stall_after_bytes:
                request.hold()
            elif fault.reset:
                request.reset()
            return
        if rate is not None and proxy.closing.wait(max(0.0, sent / rate - (time.monotonic() - begun_s))):
            return
        piece = origin.recv(piece_bytes)
        if not piece:
            return
