"""A small HTTP/1.1 server on real sockets that can misbehave: whoever answers a request has the socket in hand.

Each connection has a thread, so that tests of every kind can use it, and one request.
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

MAX_HEAD_BYTES = 64 * 1024


@dataclass(frozen=True)
class Request:
    """What was asked; requests of a server are numbered from 1, and header names are in lower case."""

    number: int
    method: str
    path: str
    headers: Mapping[str, str]
    raw: bytes = field(repr=False)
    client: socket.socket = field(repr=False)

    def asked_range(self, size_bytes: int) -> tuple[int, int] | None:
        """Give begin and end of the one range that is asked for; None where none is."""
        text = self.headers.get("range")
        if text is None:
            return None
        begin, end = text.removeprefix("bytes=").split("-")
        return int(begin), min(size_bytes, int(end) + 1)

    def reply(self, status: int, headers: Mapping[str, object] | None = None, body: bytes = b"") -> None:
        """Answer. The length is that of the body, unless `headers` tell another one or are told to tell none."""
        told: dict[str, object] = {"Content-Length": len(body), "Connection": "close", **(headers or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in told.items() if value is not None)
        self.client.sendall(f"HTTP/1.1 {status} Some\r\n{head}\r\n".encode() + (b"" if self.method == "HEAD" else body))

    def reply_file(self, body: bytes, headers: Mapping[str, object] | None = None, status: int = 0) -> None:
        """Answer as a server does that has ranges: with the part of a file that was asked for."""
        asked = self.asked_range(len(body))
        if asked is None:
            self.reply(status or 200, headers, body)
            return
        told = {"Content-Range": f"bytes {asked[0]}-{asked[1] - 1}/{len(body)}", **(headers or {})}
        self.reply(status or 206, told, body[asked[0] : asked[1]])

    def hold(self) -> None:
        """Say nothing until the client has gone, or the server ends."""
        while self.client.recv(4096):
            pass

    def reset(self) -> None:
        """End the connection as when a machine is reset."""
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


Answer = Callable[[Request], None]


class RawServer:
    """`with RawServer(answer) as server`: listens on `server.port`, and remembers what it was asked."""

    def __init__(self, answer: Answer, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        self._answer = answer
        self._tls = tls
        self._listener = socket.create_server((host, 0))
        self.host = host
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://{host}:{self.port}"
        self.asked: list[Request] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._open: set[socket.socket] = set()

    def __enter__(self) -> Self:
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        # Wakes the thread that accepts.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        with self._lock:
            for client in self._open:
                _shut(client)
        for thread in self._threads:
            thread.join()

    def asked_for(self, path: str, method: str = "GET") -> list[Request]:
        """Give the requests for a path."""
        return [request for request in self.asked if request.path == path and request.method == method]

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(client,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        client.settimeout(60)
        with self._lock:
            self._open.add(client)
            if self.closing.is_set():
                _shut(client)
        try:
            if self._tls is not None:
                plain, client = client, self._tls.wrap_socket(client, server_side=True)
                with self._lock:
                    self._open -= {plain}
                    self._open |= {client}
            request = self._receive(client)
            if request is not None:
                self._answer(request)
        except OSError:
            # The client has gone, or does not like what it sees: that is its test's business.
            pass
        finally:
            with self._lock:
                self._open.discard(client)
            _shut(client)
            client.close()

    def _receive(self, client: socket.socket) -> Request | None:
        raw = b""
        while b"\r\n\r\n" not in raw:
            piece = client.recv(4096)
            if not piece or len(raw) > MAX_HEAD_BYTES:
                return None
            raw += piece
        first, *lines = raw.split(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ", 2)
        headers = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines)}
        with self._lock:
            request = Request(len(self.asked) + 1, method, path, headers, raw, client)
            self.asked.append(request)
        return request


def _shut(client: socket.socket) -> None:
    try:
        client.shutdown(socket.SHUT_RDWR)
    except OSError:
        return
