"""The aiohttp server: bind, serve, drain, close."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import resource
import socket

from aiohttp import web

from sllm_actor.errors import AddressInUse, ConfigInvalid
from sllm_actor.frontend.app import build_app
from sllm_actor.frontend.connections import ConnectionLimits, Connections
from sllm_actor.frontend.gateway import Gateway

log = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT_S = 2.0
BACKLOG = 1024
# What a node may have open that is no client's connection: engines, sources, peers, files.
OTHER_FILES = 256
MIN_CONNECTIONS = 16


class HttpServer:
    """Owns the listening socket and the connections. Belongs to one event loop."""

    def __init__(self, gateway: Gateway, limits: ConnectionLimits) -> None:
        self._gateway = gateway
        self._limits = limits
        self._runner = web.AppRunner(
            build_app(gateway, log),
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        )
        self._serving: asyncio.Server | None = None
        self.url = ""

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is being answered."""
        return self._gateway.is_quiet

    async def start(self, listening: socket.socket) -> None:
        """Serve on a socket that `bind` gave."""
        await self._runner.setup()
        assert self._runner.server is not None
        connections = Connections(self._runner.server, within_open_files(self._limits), self._gateway.clock)
        self._gateway.connections = connections
        self._gateway.tasks.spawn(connections.watch(), "connections")
        self._gateway.tasks.spawn(self._gateway.access.watch(), "keys")
        # What is accepted from it has the same buffer.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._limits.send_buffer_bytes)
        loop = asyncio.get_running_loop()
        self._serving = await loop.create_server(connections, sock=listening, backlog=BACKLOG)
        host, port = listening.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def drain(self) -> None:
        """Take no new connections and begin no new answers; wait for those that run, within the drain time."""
        self._gateway.stop()
        if self._serving is not None:
            self._serving.close()
        if not await self._gateway.drained():
            log.warning("some answers were cut off: the drain time is over")

    async def close(self) -> None:
        """Close every connection."""
        if self._serving is not None:
            self._serving.close()
        await self._runner.cleanup()


def within_open_files(limits: ConnectionLimits) -> ConnectionLimits:
    """Lower the bound on connections to what this process may open beside everything else."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    possible = max(MIN_CONNECTIONS, soft - OTHER_FILES)
    if soft == resource.RLIM_INFINITY or limits.max_connections <= possible:
        return limits
    log.warning("at most %d connections: this process may open %d files", possible, soft)
    return limits._replace(max_connections=possible)


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach a bind to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int, *, has_key: bool) -> socket.socket:
    """Bind and listen.

    Raises:
        ConfigInvalid: an address off loopback without an API key, or one that is not this machine's.
        AddressInUse: the port is taken.
    """
    if not is_loopback(host) and not has_key:
        raise ConfigInvalid(
            f"host: {host} can be reached from other machines; set api_key_file, or bind 127.0.0.1",
            param="host",
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(f"port {port} of {host} is in use; choose another with --port", param="port") from None
        raise ConfigInvalid(f"can't bind {host}:{port}: {error.strerror or error}", param="host") from None
    listening.setblocking(False)
    return listening
