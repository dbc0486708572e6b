"""A TCP proxy that cuts a connection, both halves of it, after a number of bytes in one direction."""

from __future__ import annotations

import asyncio
import enum
import socket
import struct
from types import TracebackType

RECEIVE_BYTES = 64 * 1024


class Way(enum.Enum):
    """Whose bytes are counted."""

    TO_SERVER = "to server"
    TO_CLIENT = "to client"


class How(enum.Enum):
    """How a connection ends: with an orderly end, or as when a machine is reset."""

    FIN = "fin"
    RST = "rst"


class CuttingProxy:
    """Stands between dialers and one server. `arm` makes the next connection a short one; later ones are whole."""

    def __init__(self, host: str, port: int) -> None:
        self._server = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._way: Way | None = None
        self._how = How.FIN
        self._after_bytes = 0
        # Bytes that the latest connection has carried each way, and whether the armed cut was made.
        self.carried = {Way.TO_SERVER: 0, Way.TO_CLIENT: 0}
        self.was_cut = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._sockets: set[socket.socket] = set()

    async def __aenter__(self) -> CuttingProxy:
        self._spawn(self._accept())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()
        assert not self._sockets

    def arm(self, way: Way, after_bytes: int, how: How) -> None:
        """Cut the next connection once it has carried exactly so many bytes that way."""
        self._way, self._after_bytes, self._how = way, after_bytes, how
        self.was_cut = False

    def _spawn(self, work: object) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(self._listener)
            client.setblocking(False)
            way, self._way = self._way, None
            self._spawn(self._carry(client, way, self._after_bytes, self._how))

    async def _carry(self, client: socket.socket, way: Way | None, after_bytes: int, how: How) -> None:
        loop = asyncio.get_running_loop()
        server = socket.socket()
        server.setblocking(False)
        self._sockets |= {client, server}
        self.carried = carried = {Way.TO_SERVER: 0, Way.TO_CLIENT: 0}
        pumps: list[asyncio.Task[None]] = []
        try:
            await loop.sock_connect(server, self._server)
            for source, sink, this_way in ((client, server, Way.TO_SERVER), (server, client, Way.TO_CLIENT)):
                allowed = after_bytes if this_way is way else None
                pumps.append(loop.create_task(self._pump(source, sink, this_way, allowed, carried)))
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            pass
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            if way is not None:
                self.was_cut = carried[way] == after_bytes
            for end in (client, server):
                if way is not None and how is How.RST:
                    # Lingering for no time at all means a reset.
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.close()
                self._sockets.discard(end)

    async def _pump(
        self, source: socket.socket, sink: socket.socket, way: Way, allowed: int | None, carried: dict[Way, int]
    ) -> None:
        """Move bytes until the source ends or as many as allowed have gone."""
        loop = asyncio.get_running_loop()
        while allowed is None or carried[way] < allowed:
            most = RECEIVE_BYTES if allowed is None else min(RECEIVE_BYTES, allowed - carried[way])
            data = await loop.sock_recv(source, most)
            if not data:
                return
            await loop.sock_sendall(sink, data)
            carried[way] += len(data)
