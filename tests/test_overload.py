"""More requests than a node can take: who waits, in which order, how long, and what the others are told."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request
from clusters import eventually
from conftest import SMALL

from sllm_actor.actors.slots import Slots
from sllm_actor.actors.waiting_room import WaitingRoom
from sllm_actor.domain import ModelName
from sllm_actor.errors import DeadlineExceeded, InvalidRequest, QueueFull
from sllm_actor.frontend.deadline import timeout_of, within
from sllm_actor.runtime.clock import LoopClock, SystemClock
from sllm_actor.testing.node_process import NodeProcess, Reply, running_node

pytestmark = pytest.mark.usefixtures("warm_starts")

CHAT = "/v1/chat/completions"
KNOBS = (*SMALL, "max_requests_per_instance=1", "max_waiting_per_model=3", "max_waiting_requests=4")


def ask(model: str = "a", content: str = "What is 1 + 1?", **options: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": content}], **options}


LONG = "Count from 1 to 999."


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node whose instances run one request at a time, with two models that run."""
    with running_node(tmp_path_factory.mktemp("narrow"), *KNOBS) as node:
        for name in ("a", "b"):
            node.deploy("builtin:demo", name)
            node.chat(name, "What is 1 + 1?")
        yield node


def active(node: NodeProcess, model: str) -> int:
    instances = node.call("GET", "/admin/instances")["instances"]
    return sum(instance["active"] for instance in instances if instance["model"] == model)


def queued(node: NodeProcess, threads: ThreadPoolExecutor, body: dict[str, Any], request_id: str = "") -> Any:
    """Ask on a thread and return once the request waits for its model's slot."""
    before = active(node, body["model"])
    headers = {"X-Request-Id": request_id} if request_id else {}
    asked = threads.submit(node.request, "POST", CHAT, body, headers)
    eventually(lambda: active(node, body["model"]) > before)
    return asked


def test_those_who_wait_for_a_slot_go_by_priority_and_then_by_arrival(narrow: NodeProcess) -> None:
    priorities = {"late": 5, "second": 0, "third": 0, "first": -7}
    with ThreadPoolExecutor(4) as threads, closing(narrow.stream(CHAT, ask(content=LONG))) as running:
        next(running)
        asked = [queued(narrow, threads, ask(priority=priorities[name]), name) for name in ("late", "second", "first")]
        running.close()
        assert [reply.result().status for reply in asked] == [200] * 3
    first_token_s = {
        name: narrow.call("GET", f"/admin/requests/{name}")["first_token_s"] for name in ("late", "second", "first")
    }
    assert sorted(first_token_s, key=first_token_s.__getitem__) == ["first", "second", "late"]


def refused(reply: Reply, status: int, code: str) -> str:
    assert (reply.status, reply.json()["error"]["code"]) == (status, code)
    assert int(reply.headers["Retry-After"]) >= 1
    message: str = reply.json()["error"]["message"]
    return message


def test_a_full_queue_of_a_model_and_of_the_node_are_429_with_retry_after(narrow: NodeProcess) -> None:
    with (
        ThreadPoolExecutor(4) as threads,
        closing(narrow.stream(CHAT, ask("a", LONG))) as running_a,
        closing(narrow.stream(CHAT, ask("b", LONG))) as running_b,
    ):
        next(running_a), next(running_b)
        waiting = [queued(narrow, threads, ask("a")) for _ in range(3)]
        message = refused(narrow.request("POST", CHAT, ask("a")), 429, "queue_full")
        assert message == "3 requests for a are waiting already"
        waiting.append(queued(narrow, threads, ask("b")))
        for stream in (False, True):
            message = refused(narrow.request("POST", CHAT, ask("b", stream=stream)), 429, "queue_full")
            assert message == "4 requests are waiting already"
        running_a.close()
        running_b.close()
        assert [reply.result().status for reply in waiting] == [200] * 4
    assert narrow.chat("a", "What is 2 + 2?") == "2 + 2 = 4"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_past_its_deadline_ends_and_frees_its_slot(narrow: NodeProcess, stream: bool) -> None:
    reply = narrow.request("POST", CHAT, ask(content=LONG, stream=stream), {"X-Request-Timeout": "300ms"})
    if stream:
        assert b'"code":"deadline_exceeded"' in reply.body
        assert b"[DONE]" not in reply.body
    else:
        assert (reply.status, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert "0.3 s" in reply.json()["error"]["message"]
    assert narrow.chat("a", "What is 2 + 3?") == "2 + 3 = 5", "on the only slot"


def test_a_deadline_that_passes_in_the_queue_is_a_504_and_leaves_the_queue(narrow: NodeProcess) -> None:
    with closing(narrow.stream(CHAT, ask(content=LONG))) as running:
        next(running)
        reply = narrow.request("POST", CHAT, ask(stream=True), {"X-Request-Timeout": "0.2"})
        assert (reply.status, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert active(narrow, "a") == 1


def test_a_deadline_that_is_none_is_a_400_that_names_the_header(narrow: NodeProcess) -> None:
    for text in ("soon", "0", "-1", "", "nan", "9" * 400):
        reply = narrow.request("POST", CHAT, ask(), {"X-Request-Timeout": text})
        assert (reply.status, reply.json()["error"]["param"]) == (400, "X-Request-Timeout"), text


def test_the_nodes_own_bound_holds_where_a_client_asks_for_more() -> None:
    def timeout(asked: str | None) -> float:
        headers = {} if asked is None else {"X-Request-Timeout": asked}
        return timeout_of(make_mocked_request("POST", "/", headers=headers), 600.0)

    assert [timeout(asked) for asked in (None, "5", "2m", "1h")] == [600.0, 5.0, 120.0, 600.0]
    with pytest.raises(InvalidRequest):
        timeout("never")


async def test_what_is_past_its_deadline_is_closed_at_once() -> None:
    ended = []

    async def items() -> AsyncGenerator[int, None]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    clock = LoopClock()
    seen = []
    with pytest.raises(DeadlineExceeded):
        async for item in within(items(), 0.01, clock.monotonic_s(), clock):
            seen.append(item)
    assert (seen, ended) == ([1], [True])


def test_a_waiting_room_is_bounded_for_a_model_and_in_all() -> None:
    a, b, c = (ModelName(name) for name in "abc")
    room = WaitingRoom(SystemClock(), max_in_all=3, max_per_model=2)
    with room.place(a), room.place(a):
        with pytest.raises(QueueFull, match="for a"), room.place(a):
            pass
        with room.place(b):
            assert room.waiting() == {a: 2, b: 1}
            with pytest.raises(QueueFull, match="3 requests are"), room.place(c):
                pass
    assert room.waiting() == {}


def test_it_tells_how_many_wait_for_a_start_beside_the_first_at_every_doubling_and_at_the_end() -> None:
    a, b = ModelName("a"), ModelName("b")
    room, told = WaitingRoom(SystemClock(), max_in_all=9, max_per_model=9), list[dict[ModelName, int]]()
    room.on_awaited = lambda: told.append(room.awaited())
    with ExitStack() as others:
        for _ in range(5):
            others.enter_context(room.start(a))
        with room.start(b):
            assert told == [{a: 1}, {a: 3}]
            assert room.awaited() == {a: 4}
        assert told == [{a: 1}, {a: 3}]
    assert told[2:] == [{}]
    with room.start(a), room.start(a):
        assert told[3:] == [{a: 1}]


async def test_slots_are_never_lost_or_given_twice_whoever_is_cancelled() -> None:
    randomness = random.Random(7)
    slots, held = Slots(3), 0

    async def use(priority: int) -> None:
        nonlocal held
        if not slots.take_now():
            await slots.take(priority)
        held += 1
        assert held <= 3
        try:
            for _ in range(randomness.randrange(4)):
                await asyncio.sleep(0)
        finally:
            held -= 1
            slots.give()

    async with asyncio.TaskGroup() as group:
        users = [group.create_task(use(randomness.randrange(5))) for _ in range(500)]
        while not all(user.done() for user in users):
            randomness.choice(users).cancel()
            await asyncio.sleep(0)
    assert [slots.take_now() for _ in range(4)] == [True, True, True, False]


async def test_slots_go_to_the_lowest_number_first_and_then_by_arrival() -> None:
    slots, order = Slots(1), []
    assert slots.take_now()

    async def use(name: str, priority: int) -> None:
        await slots.take(priority)
        order.append(name)
        slots.give()

    async with asyncio.TaskGroup() as group:
        for name, priority in (("d", 9), ("b", 0), ("c", 0), ("a", -1)):
            group.create_task(use(name, priority))
            await asyncio.sleep(0)
        slots.give()
    assert order == ["a", "b", "c", "d"]
