"""An HTTP origin whose answers leave at a limited rate: nginx, and a relay before it that shares one allowance.

nginx's own `limit_rate` gives each request its first second's bytes at once, which is all of a chunk. A child:
`python -m benchmarks.remote_origin origin FOLDER BYTES_PER_S`; it is ready with the port of the relay.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from benchmarks.actors_process import Commands, serve

UNPACKED = Path(".servers")
PIECE_BYTES = 256 * 1024
# What the allowance may save up while nobody reads.
BURST_S = 0.02
CONFIG = """
daemon off;
{user}
pid {own}/pid;
events {{ worker_connections 512; }}
http {{
    access_log off;
    sendfile on;
    client_body_temp_path {own}/temp;
    proxy_temp_path {own}/temp;
    fastcgi_temp_path {own}/temp;
    uwsgi_temp_path {own}/temp;
    scgi_temp_path {own}/temp;
    server {{ listen 127.0.0.1:{port}; location / {{ alias {folder}/; }} }}
}}
"""


class Allowance:
    """So many bytes a second for all who share it, in the order of their asking."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0

    async def take(self, size_bytes: int) -> None:
        """Wait until so many bytes may go."""
        now_s = asyncio.get_running_loop().time()
        self._free_s = max(self._free_s, now_s - BURST_S) + size_bytes / self._bytes_per_s
        if self._free_s > now_s:
            await asyncio.sleep(self._free_s - now_s)


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, allowance: Allowance | None) -> None:
    with suppress(ConnectionError):
        while piece := await reader.read(PIECE_BYTES):
            if allowance is not None:
                await allowance.take(len(piece))
            writer.write(piece)
            await writer.drain()
    writer.close()


def _nginx() -> tuple[str, Mapping[str, str]]:
    installed = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if installed is not None:
        return installed, {}
    unpacked = UNPACKED.absolute() / "usr" / "sbin" / "nginx"
    if not unpacked.exists():
        raise SystemExit("nginx is not here; scripts/bench remote brings it")
    libraries = [*UNPACKED.absolute().glob("usr/lib/*-linux-gnu*"), *UNPACKED.absolute().glob("lib/*-linux-gnu*")]
    return str(unpacked), {"LD_LIBRARY_PATH": ":".join(map(str, libraries))}


async def origin(folder: str, bytes_per_s: str) -> tuple[dict[str, Any], Commands]:
    """Start both."""
    stack = ExitStack()
    own = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    binary, environment = _nginx()
    with socket.create_server(("127.0.0.1", 0), backlog=511) as listener:
        port = listener.getsockname()[1]
        # Its worker would become somebody who may not look into a folder of root's.
        user = "user root;" if os.getuid() == 0 else ""
        config = CONFIG.format(own=own, port=port, folder=Path(folder).absolute(), user=user)
        (own / "nginx.conf").write_text(config)
        inherited = {"NGINX": f"{listener.fileno()};"}
        command = [binary, "-p", str(own), "-c", str(own / "nginx.conf"), "-e", str(own / "error.log")]
        process = await asyncio.create_subprocess_exec(
            *command,
            env={**os.environ, **environment, **inherited},
            pass_fds=[listener.fileno()],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
        )
    allowance = Allowance(float(bytes_per_s))

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_origin, to_origin = await asyncio.open_connection("127.0.0.1", port, limit=PIECE_BYTES)
        await asyncio.gather(_relay(reader, to_origin, None), _relay(from_origin, writer, allowance))

    relay = await asyncio.start_server(meet, "127.0.0.1", 0, limit=PIECE_BYTES)

    async def stop() -> None:
        relay.close()
        process.terminate()
        await process.wait()
        stack.close()

    return {"port": relay.sockets[0].getsockname()[1]}, {"stop": stop}


if __name__ == "__main__":
    serve(origin=origin)
