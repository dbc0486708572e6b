"""An HTTP origin whose answers leave at a limited rate: nginx, and a relay before it that shares one allowance.

nginx's own `limit_rate` gives each request its first second's bytes at once, which is all of a chunk. A child:
`python -m benchmarks.remote_origin origin FOLDER BYTES_PER_S`; it is ready with the port of the relay. It also speaks
as much of the Hub's API as huggingface_hub needs to download the folder as the model REPOSITORY.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from benchmarks.actors_process import Commands, serve
from sllm_actor.testing.nginx import running_nginx

UNPACKED = Path(".servers")
REPOSITORY, COMMIT = "bench/model", "0" * 40
LOCATIONS = """
location / {{ alias {folder}/; }}
location /api/models/{repository}/revision/ {{ default_type application/json; rewrite ^ /model break; root {own}; }}
location /api/models/{repository}/tree/ {{ default_type application/json; rewrite ^ /tree break; root {own}; }}
location /{repository}/resolve/{commit}/ {{ alias {folder}/; add_header X-Repo-Commit {commit}; }}
"""
PIECE_BYTES = 256 * 1024
# What the allowance may save up while nobody reads.
BURST_S = 0.02


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


async def origin(folder: str, bytes_per_s: str) -> tuple[dict[str, Any], Commands]:
    """Start both."""
    stack = ExitStack()
    own = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    served = Path(folder).absolute()
    sizes = {path.name: path.stat().st_size for path in sorted(served.iterdir())}
    model = {"id": REPOSITORY, "sha": COMMIT, "private": False, "siblings": [{"rfilename": name} for name in sizes]}
    (own / "model").write_text(json.dumps(model))
    tree = [{"type": "file", "path": name, "size": size, "oid": COMMIT} for name, size in sizes.items()]
    (own / "tree").write_text(json.dumps(tree))
    own.chmod(0o755)
    locations = LOCATIONS.format(folder=served, own=own, repository=REPOSITORY, commit=COMMIT)
    port = stack.enter_context(running_nginx(own, locations, UNPACKED))
    allowance = Allowance(float(bytes_per_s))

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_origin, to_origin = await asyncio.open_connection("127.0.0.1", port, limit=PIECE_BYTES)
        await asyncio.gather(_relay(reader, to_origin, None), _relay(from_origin, writer, allowance))

    relay = await asyncio.start_server(meet, "127.0.0.1", 0, limit=PIECE_BYTES)

    async def stop() -> None:
        relay.close()
        stack.close()

    return {"port": relay.sockets[0].getsockname()[1]}, {"stop": stop}


if __name__ == "__main__":
    serve(origin=origin)
