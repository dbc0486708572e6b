"""What the gateway bench asks: our HTTP endpoint with an engine that does nothing, or a bare aiohttp handler.

Both stream the same number of events, paced alike. Prints its URL, and at the end of its input how late its loop was.
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import uvloop
from aiohttp import web

from sllm_actor import Config
from sllm_actor.cli.collecting import look_for_cycles
from sllm_actor.domain import FinishReason, Model, ModelName
from sllm_actor.domain.roles import Role
from sllm_actor.domain.tokens import pack_uint32
from sllm_actor.frontend.access import Access
from sllm_actor.frontend.connections import ConnectionLimits
from sllm_actor.frontend.gateway import Gateway, Limits
from sllm_actor.frontend.server import HttpServer, bind
from sllm_actor.frontend.stream_log import StreamLimits, StreamLog
from sllm_actor.messages.generation import Finished, Generate, Tokens
from sllm_actor.messages.models import GetModel
from sllm_actor.messages.text import Encoded
from sllm_actor.metadata import SqliteStore
from sllm_actor.node.node import knobs_of
from sllm_actor.runtime import Actor, ActorSystem, SystemClock, handles
from sllm_actor.runtime.lag import LoopLag
from sllm_actor.runtime.tasks import TaskScope

EVENTS = 20
PACE_S = 0.05
MODEL = Model(
    name=ModelName("m"), path="", fingerprint="", architecture="", dtype="", size_bytes=1, host_bytes=1,
    context_tokens=4096, vocabulary_tokens=100, eos_token_ids=(), default_temperature=0.0, default_top_p=1.0,
    chat=True, keep_alive_s=1.0, registered_wall_s=0.0,
)  # fmt: skip


class Manager(Actor):
    """Knows one model."""

    @handles(GetModel)
    def get(self, _: GetModel) -> Model:
        return MODEL


class Router(Actor):
    """Answers at once, and then at a pace."""

    @handles(Generate)
    async def generate(self, request: Generate) -> AsyncGenerator[Tokens | Finished, None]:
        for index in range(EVENTS):
            yield Tokens(request_id=request.request_id, index=index, token_ids=(7,))
            await asyncio.sleep(PACE_S)
        yield Finished(
            request_id=request.request_id, reason=FinishReason.STOP, prompt_tokens=1, generated_tokens=EVENTS
        )


class Text:
    """Templates and tokenizes nothing."""

    async def render(self, *_: Any, **__: Any) -> Encoded:
        return Encoded(call=0, token_ids=pack_uint32([1]))

    def detokenizer(self, *_: Any, **__: Any) -> Text:
        return self

    async def push(self, token_ids: Sequence[int], *, final: bool = False) -> str:
        return "" if final else "word "


def more_open_files() -> None:
    """Take as many as this process may have: every stream is one."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def ours(tasks: TaskScope, stack: AsyncExitStack) -> str:
    config, clock, system = Config(port=0), SystemClock(), ActorSystem()
    stack.push_async_callback(system.close)
    router, manager = await system.spawn(Router(), "router"), await system.spawn(Manager(), "manager")
    # As a lone node has it: each stream is on the disk before its first event.
    store = await SqliteStore.open(Path(stack.enter_context(TemporaryDirectory())) / "metadata.db", clock)
    stack.push_async_callback(store.close)
    streams = StreamLog(store, clock, knobs_of(StreamLimits, config), shared=False)
    await streams.open()
    stack.push_async_callback(streams.close)
    gateway = Gateway(
        router=router, manager=manager, coordinator=manager, nodes=manager, text=cast(Any, Text()),
        grammars=cast(Any, None), clock=clock,
        limits=knobs_of(Limits, config), observe=dict, tasks=tasks, access=Access("", clock), telemetry=None,
        streams=streams,
        roles=frozenset(Role),
    )  # fmt: skip
    server = HttpServer(gateway, knobs_of(ConnectionLimits, config))
    stack.push_async_callback(server.close)
    await server.start(bind("127.0.0.1", 0, has_key=False))
    return server.url


async def bare(stack: AsyncExitStack) -> str:
    chunk = {"id": "c", "created": 1, "model": "m", "object": "chat.completion.chunk"}
    chunk |= {"choices": [{"index": 0, "delta": {"content": "word "}, "logprobs": None, "finish_reason": None}]}

    async def handle(request: web.Request) -> web.StreamResponse:
        await request.json()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(EVENTS):
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
            await asyncio.sleep(PACE_S)
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", handle)
    runner = web.AppRunner(app, access_log=None)
    stack.push_async_callback(runner.cleanup)
    await runner.setup()
    listening = bind("127.0.0.1", 0, has_key=False)
    await web.SockSite(runner, listening).start()
    host, port = listening.getsockname()
    return f"http://{host}:{port}"


async def main() -> None:
    more_open_files()
    tasks, lag = TaskScope("bench"), LoopLag(SystemClock(), 0.05)
    tasks.spawn(lag.watch(), "lag")
    async with AsyncExitStack() as stack:
        stack.push_async_callback(tasks.close)
        url = await ours(tasks, stack) if sys.argv[1] == "ours" else await bare(stack)
        # As `sllm-node start` does, and here for both.
        gc.collect()
        gc.freeze()
        tasks.spawn(look_for_cycles(lambda: False, SystemClock()), "cycles")
        print(url, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        print(json.dumps({"worst_s": lag.worst_s, "faults": lag.faults}), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
