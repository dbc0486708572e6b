"""A node inside a replica of Ray Serve: Ray places and restarts the process, the node serves many models in it.

    pip install "ray[serve]"
    serve run examples.ray_serve:app            # then: curl http://127.0.0.1:8000/v1/models

Every path goes to the node as it came, streams included: who speaks OpenAI's HTTP to a node speaks it to Ray's port.
`python examples/ray_serve.py [PORT]` starts Ray on this machine, asks twice, the second time for a stream, and stops.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import AsyncIterator
from urllib.request import Request as Asked
from urllib.request import urlopen

import aiohttp
from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse

from sllm_actor import Config, Node

# What belongs to one hop alone.
HOP = {"connection", "content-length", "date", "host", "keep-alive", "server", "transfer-encoding"}


@serve.deployment(ray_actor_options={"num_cpus": 1}, max_ongoing_requests=256, graceful_shutdown_timeout_s=60)
class SllmNode:
    """Owns a node on a free port of its machine, and passes on what Ray's proxy gives it."""

    async def __init__(self, models: str, knobs: dict[str, int | str]) -> None:  # type: ignore[misc]
        # Ray awaits this on the replica's own loop, and lets no request in before.
        self._folder = tempfile.TemporaryDirectory(prefix="sllm-")
        self._session = aiohttp.ClientSession(auto_decompress=False, timeout=aiohttp.ClientTimeout())
        config = Config(data_dir=self._folder.name, port=0, models=models, **knobs)  # type: ignore[arg-type]
        self._node: Node | None = await Node(config).__aenter__()

    async def check_health(self) -> None:
        """Have Ray replace the replica whose node no longer answers."""
        assert self._node is not None
        async with self._session.get(f"{self._node.url}/health") as response:
            response.raise_for_status()

    async def __call__(self, request: Request) -> StreamingResponse:
        assert self._node is not None
        url = f"{self._node.url}{request.url.path}" + (f"?{request.url.query}" if request.url.query else "")
        headers = {name: value for name, value in request.headers.items() if name not in HOP}
        response = await self._session.request(request.method, url, headers=headers, data=await request.body())

        async def body() -> AsyncIterator[bytes]:
            # Who leaves closes this, and with it the node's answer.
            async with response:
                async for part in response.content.iter_any():
                    yield part

        kept = {name: value for name, value in response.headers.items() if name.lower() not in HOP}
        return StreamingResponse(body(), response.status, kept)

    async def __del__(self) -> None:
        """Finish what is being answered, and leave no engine behind."""
        if self._node is not None:
            node, self._node = self._node, None
            await node.__aexit__(None, None, None)
            await self._session.close()


KNOBS: dict[str, int | str] = {"host_pool_bytes": 64 * 2**20, "chunk_bytes": 2**20, "engine_threads": 1}
app = SllmNode.bind("demo=builtin:demo", KNOBS)


def main(port: int) -> None:
    """Start Ray here, ask the demo model by Ray's port, and stop."""
    serve.start(http_options={"port": port})
    serve.run(app)
    question = {"model": "demo", "messages": [{"role": "user", "content": "What is 47 + 35?"}]}
    for body in (question, question | {"stream": True}):
        asked = Asked(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode())
        asked.add_header("Content-Type", "application/json")
        with urlopen(asked, timeout=120) as answer:
            text = answer.read().decode()
        if "stream" in body:
            events = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
            print("".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events))
        else:
            print(json.loads(text)["choices"][0]["message"]["content"])
    serve.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
