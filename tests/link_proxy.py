"""A TCP proxy between two processes that can be cut: nothing comes through, and no connection ends, or only one end."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from types import TracebackType

RECEIVE_BYTES = 64 * 1024
LOOK_S = 0.05


class LinkProxy:
    """Carries bytes both ways. While it is cut, connections stay open and silent, as in a partition."""

    def __init__(self, host: str, port: int) -> None:
        self._server = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._closed = threading.Event()
        self._whole = threading.Event()
        self._whole.set()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._half_open: set[socket.socket] = set()

    def __enter__(self) -> LinkProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._whole.set()
        self._listener.close()

    def cut(self) -> None:
        """Let nothing through from now on."""
        self._whole.clear()

    def mend(self) -> None:
        """Let everything through again, also what was held back."""
        self._whole.set()

    def half_open(self) -> int:
        """End the server's side of every connection; its client hears nothing. Gives how many there were."""
        ended = 0
        for client, server in self._pairs:
            if client not in self._half_open and server.fileno() >= 0:
                self._half_open.add(client)
                with suppress(OSError):
                    server.shutdown(socket.SHUT_RDWR)
                    ended += 1
        return ended

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                self._pairs.append((client, server))
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        source.settimeout(LOOK_S)
        with suppress(OSError), source, sink:
            while not self._closed.is_set():
                try:
                    data = source.recv(RECEIVE_BYTES)
                except TimeoutError:
                    continue
                self._whole.wait()
                if self._half_open & {source, sink}:
                    if source in self._half_open and data:
                        continue  # What the client sends vanishes.
                    self._closed.wait()
                if not data:
                    return
                sink.sendall(data)
