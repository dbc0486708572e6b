"""What a client sees of a stream whose model is not running yet: comments, or a proper status."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from clusters import eventually
from conftest import SMALL

from sllm_actor.domain import Model, ModelName, ModelState
from sllm_actor.frontend.progress import Progress
from sllm_actor.messages.models import ListModels, ModelStatus
from sllm_actor.runtime import Actor, ActorSystem, SystemClock, handles
from sllm_actor.testing.node_process import NodeProcess, running_node

pytestmark = pytest.mark.usefixtures("warm_starts")

CHAT = "/v1/chat/completions"
LONG = "Count from 1 to 999."
KNOBS = (*SMALL, "max_instances=1", "stream_open_after_s=0.05", "heartbeat_interval_s=0.1", "start_timeout_s=2")


def ask(model: str, content: str = "What is 1 + 1?", **options: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": content}], **options}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node with one place and two models."""
    with running_node(tmp_path_factory.mktemp("narrow"), *KNOBS) as node:
        for name in ("a", "b"):
            node.deploy("builtin:demo", name)
        yield node


@contextmanager
def place_taken(node: NodeProcess) -> Iterator[Generator[Any, None, None]]:
    """Take the only place with a long answer of model a, which closing what this gives ends."""
    taking = node.stream(CHAT, ask("a", LONG))
    next(taking)
    try:
        yield taking
    finally:
        taking.close()


def lines(node: NodeProcess, body: dict[str, Any]) -> Iterator[str]:
    connection = node.connect()
    connection.request("POST", CHAT, json.dumps(body | {"stream": True}), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200
    for line in response:
        if line.strip():
            yield line.decode().strip()
    connection.close()


def test_a_stream_that_waits_gets_comments_and_then_its_answer(narrow: NodeProcess) -> None:
    with place_taken(narrow) as taking:
        waiting = lines(narrow, ask("b"))
        assert next(waiting) == ": waiting for a place for b"
        taking.close()
        events = [line for line in waiting if not line.startswith((":", "id: "))]
    assert all(event.startswith("data: ") for event in events)
    assert json.loads(events[0][6:])["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(json.loads(event[6:])["choices"][0]["delta"].get("content", "") for event in events[:-1])
    assert (text, events[-1]) == ("1 + 1 = 2", "data: [DONE]")


def test_the_official_client_does_not_notice_the_comments(narrow: NodeProcess) -> None:
    program = """
import sys, openai
client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="unused", max_retries=0)
messages = [{"role": "user", "content": "What is 1 + 1?"}]
chunks = client.chat.completions.create(model="b", messages=messages, stream=True, extra_headers={"X-Request-Id": "o"})
print("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
"""
    narrow.call("POST", "/admin/models/b/unload")
    with (
        place_taken(narrow) as taking,
        subprocess.Popen([sys.executable, "-c", program, narrow.url], stdout=subprocess.PIPE, text=True) as client,
    ):
        eventually(lambda: narrow.request("GET", "/admin/requests/o").status != 404)
        arrived_s = narrow.call("GET", "/admin/requests/o")["arrived_s"]
        eventually(lambda: time.monotonic() >= arrived_s + 0.5)  # Comments have gone out by then.
        taking.close()
        assert client.communicate(timeout=60)[0] == "1 + 1 = 2\n"


def test_a_start_that_fails_after_the_stream_has_opened_is_an_error_event(narrow: NodeProcess) -> None:
    narrow.call("POST", "/admin/models/b/unload")
    with place_taken(narrow):
        seen = list(lines(narrow, ask("b")))
    assert seen[0] == ": waiting for a place for b"
    assert json.loads(seen[-1].removeprefix("data: "))["error"]["code"] == "no_capacity"


def test_a_stream_whose_model_runs_has_no_comment(node: NodeProcess) -> None:
    node.chat("demo", "What is 1 + 1?")
    assert not [line for line in lines(node, ask("demo")) if line.startswith(":")]


def model(name: str = "m", size_bytes: int = 1000) -> Model:
    return Model(
        name=ModelName(name), path="", fingerprint="", architecture="", dtype="", size_bytes=size_bytes,
        host_bytes=2048, context_tokens=8, vocabulary_tokens=8, eos_token_ids=(), default_temperature=0.0,
        default_top_p=1.0, chat=True, keep_alive_s=1.0, registered_wall_s=0.0,
    )  # fmt: skip


class Manager(Actor):
    """Tells of one model, and counts who asked."""

    def __init__(self, state: ModelState, loading_bytes: int = 0) -> None:
        self.status = ModelStatus(model=model(), state=state, instances=0, host_bytes=0, loading_bytes=loading_bytes)
        self.asked = 0

    @handles(ListModels)
    async def list_models(self, _: ListModels) -> tuple[ModelStatus, ...]:
        self.asked += 1
        return (self.status,)


@asynccontextmanager
async def progress_of(manager: Manager) -> AsyncIterator[Progress]:
    system = ActorSystem()
    try:
        yield Progress(await system.spawn(manager, "manager"), SystemClock(), 5.0)
    finally:
        await system.close()


@pytest.mark.parametrize(
    ("state", "loading_bytes", "said"),
    [
        (ModelState.RUNNING, 0, "waiting"),
        (ModelState.COLD, 0, "waiting for a place for m"),
        (ModelState.LOADING, 0, "loading m"),
        (ModelState.LOADING, 450, "loading m 45%"),
        (ModelState.LOADING, 2000, "loading m 100%"),
    ],
)
async def test_progress_says_what_a_model_waits_for(state: ModelState, loading_bytes: int, said: str) -> None:
    async with progress_of(Manager(state, loading_bytes)) as progress:
        assert await progress.of(model(), 0.0) == said
        assert await progress.of(model("removed"), 0.0) == "waiting"


async def test_all_who_wait_are_told_from_one_look() -> None:
    manager = Manager(ModelState.LOADING)
    async with progress_of(manager) as progress:
        assert [await progress.of(model(), 0.0) for _ in range(100)] == ["loading m"] * 100
    assert manager.asked < 100


async def test_a_wait_is_told_of_no_look_from_before_it_began() -> None:
    manager = Manager(ModelState.LOADING)
    async with progress_of(manager) as progress:
        assert await progress.of(model(), 0.0) == "loading m"
        manager.status = Manager(ModelState.COLD).status
        assert await progress.of(model(), SystemClock.monotonic_s()) == "waiting for a place for m"
