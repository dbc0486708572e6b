"""A client that leaves: its slot is free at once, and its engine computes at most the step that it is in."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sllm_actor import Config, Node
from sllm_actor.domain import ModelName, RequestId
from sllm_actor.engine.client import Engine
from sllm_actor.errors import RequestNotFound
from sllm_actor.messages.generation import Finished, GetTimeline, Tokens
from sllm_actor.messages.instances import ListInstances
from sllm_actor.messages.models import RegisterModel

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Config(
        data_dir=str(tmp_path_factory.mktemp("node")), port=0, host_pool_bytes=64 * 2**20, chunk_bytes=2**20,
        engine_threads=1, warm_engines=1,
    )  # fmt: skip


@pytest.fixture
async def running(small: Config) -> AsyncIterator[Node]:
    async with Node(small) as node:
        await node.system.ref("model-manager").ask(
            RegisterModel(name=ModelName("demo"), source="builtin:demo", keep_alive_s=None, replace=True), timeout_s=60
        )
        yield node


def asking(content: str, **options: Any) -> bytes:
    return json.dumps({"model": "demo", "messages": [{"role": "user", "content": content}], **options}).encode()


async def send(node: Node, body: bytes, request_id: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = node.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"X-Request-Id: {request_id}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    return reader, writer


async def until(come_true: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not await come_true():
            await asyncio.sleep(0)


async def generated(node: Node, request_id: str) -> tuple[int, str]:
    try:
        timeline = await node.system.ref("router").ask(GetTimeline(request_id=RequestId(request_id)), timeout_s=10)
    except RequestNotFound:
        return 0, "unknown"
    return timeline.generated_tokens, timeline.outcome


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_slot_and_the_engine_ends_with_its_step(
    running: Node, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    taken: list[Any] = []
    take = Engine._take

    def noting(engine: Engine, message: Any) -> None:
        taken.append(message)
        take(engine, message)

    monkeypatch.setattr(Engine, "_take", noting)

    _, writer = await send(running, asking("Count from 1 to 999.", stream=stream), "leaver")

    async def has_begun() -> bool:
        return (await generated(running, "leaver"))[0] > 10

    await until(has_begun)
    (instance,) = await running.system.ref("model-manager").ask(ListInstances(), timeout_s=10)
    # While the engine stands still, nothing but the closed connection can free the slot.
    os.kill(instance.pid, signal.SIGSTOP)
    try:
        await until(lambda: asyncio.sleep(0, is_stopped(instance.pid)))
        count = -1
        while count != len(taken):  # What it had sent before is read.
            count = len(taken)
            await asyncio.sleep(0.05)
        writer.transport.abort()

        async def is_free() -> bool:
            (seen,) = await running.system.ref("model-manager").ask(ListInstances(), timeout_s=10)
            return bool(seen.active == 0)

        await until(is_free)
        assert (await generated(running, "leaver"))[1] == "cancelled"
        assert len(taken) == count
    finally:
        os.kill(instance.pid, signal.SIGCONT)

    async with aiohttp.ClientSession() as session:
        headers = {"Content-Type": "application/json"}
        async with session.post(f"{running.url}{CHAT}", data=asking("What is 2 + 2?"), headers=headers) as answer:
            assert (await answer.json())["choices"][0]["message"]["content"] == "2 + 2 = 4"
    later = [message for message in taken[count:] if isinstance(message, Tokens | Finished)]
    newest = later[-1].request_id
    assert len([message for message in later if message.request_id != newest]) <= 1
