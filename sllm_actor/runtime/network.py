"""Where connections come from: TCP and Unix sockets of this machine, or a simulated network in their place.

An endpoint is written `tcp://HOST:PORT` (IPv6 hosts in brackets) or `unix:///PATH`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
import ssl
import stat
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, Protocol

from sllm_actor.errors import AddressInUse, ConfigInvalid
from sllm_actor.runtime.tasks import TaskScope

log = logging.getLogger(__name__)

ProtocolFactory = Callable[[], asyncio.BufferedProtocol]
# What the kernel may hold unsent: more would only make small frames wait behind bulk.
NOT_SENT_LOW_WATER_BYTES = 128 * 1024
BACKLOG_CONNECTIONS = 256
ACCEPT_AGAIN_S = 0.2
# A TLS peer may be gone when it is to confirm the end.
TLS_SHUTDOWN_S = 1.0
TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)


class Listener(Protocol):
    """A place where peers connect."""

    @property
    def endpoint(self) -> str:
        """The endpoint as it can be dialled: a port of 0 has become the one that was given."""

    def close(self) -> None:
        """Accept no more connections; those that are open stay."""


class Network(Protocol):
    """Opens connections. Each runs an `asyncio.BufferedProtocol` from the factory over an `asyncio.Transport`."""

    async def listen(self, endpoint: str, factory: ProtocolFactory, tls: ssl.SSLContext | None) -> Listener:
        """Accept connections at an endpoint.

        Raises:
            AddressInUse: someone listens there.
            ConfigInvalid: it is no endpoint of this machine.
        """

    async def dial(self, endpoint: str, factory: ProtocolFactory, tls: ssl.SSLContext | None) -> None:
        """Connect to an endpoint.

        Raises:
            OSError: nobody can be reached there (`ssl.SSLError` is one).
            ConfigInvalid: it is no endpoint.
        """


class Endpoint(NamedTuple):
    """An endpoint's parts: a path, or a host and a port."""

    path: str
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Read `tcp://HOST:PORT` or `unix:///PATH`.

        Raises:
            ConfigInvalid: it is neither.
        """
        scheme, separator, rest = text.partition("://")
        if scheme == "unix" and rest.startswith("/") and "\0" not in rest and len(rest.encode()) < 108:
            return cls(rest, "", 0)
        if scheme == "tcp" and separator:
            host, _, port = rest.rpartition(":")
            bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
            if (
                bare
                and ("[" not in bare)
                and port.isascii()
                and port.isdigit()
                and len(port) <= 5
                and int(port) < 65536
            ):
                return cls("", bare, int(port))
        raise ConfigInvalid(f"{text[:200]!r} is no endpoint; write tcp://HOST:PORT or unix:///PATH", param="endpoint")

    @property
    def is_local(self) -> bool:
        """Tell whether only processes of this machine can reach it."""
        if self.path or self.host == "localhost":
            return True
        with suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return False


class SocketNetwork:
    """The machine's own sockets. Whoever connects has `handshake_timeout_s` seconds for the TLS handshake, and at most
    `max_handshakes` are under way at a listener."""

    def __init__(self, handshake_timeout_s: float = 5.0, max_handshakes: int = 128) -> None:
        self._handshake_timeout_s = handshake_timeout_s
        self._max_handshakes = max_handshakes

    async def listen(self, endpoint: str, factory: ProtocolFactory, tls: ssl.SSLContext | None) -> Listener:
        where = Endpoint.parse(endpoint)
        try:
            sock = _bind(where)
        except OSError as error:
            raise AddressInUse(f"can't listen at {endpoint}: {error.strerror or error}", param="endpoint") from error
        host = f"[{where.host}]" if ":" in where.host else where.host
        given = endpoint if where.path else f"tcp://{host}:{sock.getsockname()[1]}"
        return _SocketListener(sock, given, where.path, factory, tls, self._handshake_timeout_s, self._max_handshakes)

    async def dial(self, endpoint: str, factory: ProtocolFactory, tls: ssl.SSLContext | None) -> None:
        where = Endpoint.parse(endpoint)
        loop = asyncio.get_running_loop()
        secured: dict[str, Any] = {}
        if tls is not None:
            secured = {"ssl": tls, "server_hostname": "", "ssl_shutdown_timeout": TLS_SHUTDOWN_S}
        if where.path:
            # The name in a certificate is checked by us: it is a node's, not a host's.
            await loop.create_unix_connection(factory, where.path, **secured)
        else:
            await loop.create_connection(factory, where.host, where.port, **secured)


def _bind(where: Endpoint) -> socket.socket:
    if where.path:
        _remove_dead_socket(where.path)
        sock = socket.socket(socket.AF_UNIX)
        place: Any = where.path
    else:
        family, *_, place = socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(place)
        sock.listen(BACKLOG_CONNECTIONS)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


class _SocketListener:
    """Accepts connections itself: an asyncio server removes a living node's socket file, and loses a connection that
    comes while it closes."""

    def __init__(
        self,
        sock: socket.socket,
        endpoint: str,
        path: str,
        factory: ProtocolFactory,
        tls: ssl.SSLContext | None,
        handshake_timeout_s: float,
        max_handshakes: int,
    ) -> None:
        self._max_handshakes = max_handshakes
        self.endpoint = endpoint
        self._sock = sock
        self._path = path
        self._factory = factory
        self._tls = tls
        self._handshake_timeout_s = handshake_timeout_s if tls is not None else None
        self._loop = asyncio.get_running_loop()
        self._scope = TaskScope(f"accept-{endpoint}")
        self._closed = False
        self._loop.add_reader(sock.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(BACKLOG_CONNECTIONS):
            try:
                connection, _ = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                # No descriptor or memory is left: who waits in the backlog is taken when there is again.
                log.error("no connection can be accepted at %s: %s", self.endpoint, error)
                self._loop.remove_reader(self._sock.fileno())
                self._loop.call_later(ACCEPT_AGAIN_S, self._resume)
                return
            if len(self._scope) >= self._max_handshakes:
                connection.close()
                continue
            connection.setblocking(False)
            task = self._scope.spawn(self._take(connection), "handshake", on_failure=_not_a_peer)
            # One that is cancelled before its first step closes nothing by itself.
            task.add_done_callback(partial(_close_if_cancelled, connection))

    async def _take(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._factory,
                connection,
                ssl=self._tls,
                ssl_handshake_timeout=self._handshake_timeout_s,
                ssl_shutdown_timeout=TLS_SHUTDOWN_S if self._tls is not None else None,
            )
        except BaseException:
            connection.close()
            raise

    def _resume(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._sock.fileno(), self._accept)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        for handshake in self._scope.tasks():
            handshake.cancel()
        if self._path:
            with suppress(OSError):
                os.unlink(self._path)


def _close_if_cancelled(connection: socket.socket, handshake: asyncio.Task[None]) -> None:
    if handshake.cancelled():
        connection.close()


def _not_a_peer(error: BaseException) -> None:
    log.info("a connection was not taken: %s", error)


def _remove_dead_socket(path: str) -> None:
    """Remove a socket file that a killed process left: one that nobody answers at."""
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path).st_mode):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.setblocking(False)
                try:
                    probe.connect(path)
                except ConnectionRefusedError:
                    os.unlink(path)


def tune(transport: asyncio.BaseTransport) -> None:
    """Let a socket hold little that is unsent, so that a small frame overtakes the rest of a large one."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, NOT_SENT_LOW_WATER_BYTES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
