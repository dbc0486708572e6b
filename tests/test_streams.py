"""Streams that a client goes on with: behind each of their events, and after all that may happen to them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, StartNode
from random_answers import DEMO
from streams import CHAT, COMPLETIONS, DONE, Event, comparable, reading, rest, some, whole
from test_response_format import ask as ask_form
from test_tools import TEMPLATE, TOOLS

from sllm_actor.testing.node_process import NodeProcess, running_node

pytestmark = pytest.mark.usefixtures("warm_starts")

LONG = "Count from 1 to 60."


def chat(prompt: str = "Count from 1 to 6.", **options: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"model": "demo", "messages": [{"role": "user", "content": prompt}], **options}


USAGE = {"include_usage": True}
CALL = {"tools": TOOLS, "tool_choice": "required", "temperature": 2.0, "seed": 3, "max_tokens": 60}
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": chat(stream_options=USAGE),
    "drawn": chat("Tell me a story.", temperature=1.5, max_tokens=24),
    "choices": chat(n=2, temperature=1.3, seed=5, max_tokens=12, stream_options={**USAGE}),
    "usage": chat(max_tokens=9, stream_options={"include_usage": True, "continuous_usage_stats": True}),
    "stop": chat(stop=["4, 5", "zzz"]),
    "logprobs": chat(logprobs=True, top_logprobs=2, max_tokens=8),
    "form": (CHAT, ask_form(temperature=1.2, seed=2, max_tokens=60)),
    "call": chat("What is 47 + 35?", **{**CALL, "model": "hermes"}),
    "completion": (
        COMPLETIONS, {"model": "demo", "prompt": ["Count", "One"], "echo": True, "max_tokens": 6, "temperature": 1.0},
    ),
    "scored": (COMPLETIONS, {"model": "demo", "prompt": "Count from", "echo": True, "logprobs": 1, "max_tokens": 4}),
}  # fmt: skip


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hermes") / "model"
    shutil.copytree(DEMO, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<MARK>", "<tool_call>"))
    return folder


# The first writes down all, the second what was asked and no tokens: there everything is generated once more.
@pytest.fixture(scope="module", params=["stream_log_bytes=256KiB", "stream_log_bytes=4KiB"])
def asked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, calling: Path
) -> Iterator[tuple[NodeProcess, dict[str, Any]]]:
    """A node, and what is to be in a request besides, so that it is as long as it has to be."""
    folder = tmp_path_factory.mktemp("node")
    with running_node(folder, *SMALL, "stream_log_lag_s=0.05", str(request.param)) as node:
        node.deploy("builtin:demo", "demo")
        node.deploy(calling, "hermes")
        yield node, {"filled": "4KiB" in request.param}


def filled(node: NodeProcess, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Make a request so long that nothing more can be written down of it."""
    most, least = 4000, 0
    while most - least > 8:
        middle = (most + least) // 2
        with reading(node, path, body | {"user": "u" * middle, "max_tokens": 1}) as stream:
            most, least = (most, middle) if stream.stream_id else (middle, least)
    return body | {"user": "u" * least}


@pytest.mark.parametrize("name", ASKED)
def test_behind_any_event_the_rest_is_that_of_the_undisturbed_stream(
    asked: tuple[NodeProcess, dict[str, Any]], name: str
) -> None:
    node, options = asked
    path, body = ASKED[name]
    if options["filled"]:
        body = filled(node, path, body)
    stream_id, undisturbed = whole(node, path, body)
    events = rest(node, stream_id)
    choices = len({one["index"] for event in events for one in event.choices()})
    ids = [event.id for event in events[:-1]]
    assert all(ids) and len(set(ids)) == len(ids)
    assert events[-1] == Event(DONE, "")
    if choices == 1:
        assert [data for data, _ in comparable(events)] == [data for data, _ in comparable(undisturbed)]
        # What came before the stream was written down has none.
        had = [event.id for event in undisturbed if event.id]
        assert had == ids[len(ids) - len(had) :]
    for number in range(0, len(events), 5 if options["filled"] else 1):
        behind = ids[number - 1] if number else ""
        found = rest(node, stream_id, behind)
        if choices == 1:
            assert comparable(found) == comparable(events[number:])
            continue
        for choice in range(choices):
            # How far the other choices are is in an id, too.
            texts = [[data for data, _ in comparable(part, choice)] for part in (found, events[number:])]
            assert texts[0] == texts[1]
        assert len(found) == len(events) - number


def test_a_stream_that_is_read_by_two_is_the_later_ones(node: NodeProcess) -> None:
    undisturbed = whole(node, *chat(LONG))[1]
    with reading(node, *chat(LONG)) as stream:
        first = some(stream, 5)
        second = rest(node, stream.stream_id, first[-1].id)
        left = list(stream.events)
    texts = [[one["delta"] for event in events for one in event.choices()] for events in (undisturbed, first + second)]
    assert texts[0] == texts[1]
    # It may have been through already.
    assert left[-1].data == DONE or left[-1].error() == "stream_taken"


def test_a_client_that_comes_back_again_and_again_reads_one_stream(node: NodeProcess) -> None:
    undisturbed = whole(node, *chat(LONG, temperature=0.7, seed=11))[1]
    with reading(node, *chat(LONG, temperature=0.7, seed=11)) as stream:
        read = some(stream, 3)
    while read[-1].data != DONE:
        with reading(node, f"/v1/streams/{stream.stream_id}", None, {"Last-Event-ID": read[-1].id}) as again:
            for _, event in zip(range(60), again.events, strict=False):
                read.append(event)
    assert [event.choices() for event in read] == [event.choices() for event in undisturbed]


def test_after_a_kill_and_a_restart_the_client_goes_on(start_node: StartNode) -> None:
    body = chat(LONG, temperature=1.0, max_tokens=200)
    # Some of what the client has is written down then, and some is not.
    with start_node("stream_log_lag_s=0.2") as node:
        node.deploy("builtin:demo", "demo")
        with reading(node, *body) as stream:
            read = some(stream, 100)
            node.process.kill()
            node.process.wait()
    with start_node() as node:
        read += rest(node, stream.stream_id, read[-1].id)
        again = rest(node, stream.stream_id)
    assert read[-1].data == DONE
    assert [event.data for event in read] == [event.data for event in again], "the seed that was drawn stays the same"
    assert [int(event.id) for event in again[:-1]] == list(range(1, len(again)))


@pytest.mark.parametrize(
    ("event_id", "status"),
    [
        ("1,2", 400), ("", 200), ("x", 400), ("-1", 400), ("1+1", 400), ("1+2", 400), ("1;2", 400), ("9" * 3000, 400),
        ("1 ", 200), ("99999", 400), ("٣", 400),
    ],
)  # fmt: skip
def test_an_id_that_is_none_of_the_streams_is_refused(node: NodeProcess, event_id: str, status: int) -> None:
    stream_id, _ = whole(node, *chat("What is 2 + 3?"))
    headers = {"Last-Event-ID": event_id.encode().decode("latin-1")}
    reply = node.request("GET", f"/v1/streams/{stream_id}", headers=headers)
    assert reply.status == status
    if status == 400:
        assert reply.json()["error"]["param"] == "Last-Event-ID"


def test_a_stream_that_nobody_knows_is_not_found(node: NodeProcess) -> None:
    for stream_id in ("stream-" + "0" * 32, "x", "%2e%2e"):
        reply = node.request("GET", f"/v1/streams/{stream_id}")
        assert (reply.status, reply.json()["error"]["code"]) == (404, "stream_not_found")


def test_an_answer_that_is_no_stream_and_one_that_is_too_long_have_no_ids(node: NodeProcess) -> None:
    path, body = chat("What is 2 + 3?")
    assert "X-Stream-Id" not in node.request("POST", path, body).headers
    stream_id, events = whole(node, path, body | {"user": "u" * 300_000})
    assert stream_id == "" and not any(event.id for event in events)


def test_a_stream_of_a_model_that_has_been_replaced_is_refused(node: NodeProcess, calling: Path) -> None:
    node.deploy(calling, "replaced")
    stream_id, events = whole(node, *chat("What is 2 + 3?", model="replaced"))
    assert rest(node, stream_id) == events
    os.utime(calling / "model.safetensors", (1, 1))
    node.deploy(calling, "replaced")
    reply = node.request("GET", f"/v1/streams/{stream_id}")
    assert (reply.status, reply.json()["error"]["code"]) == (409, "conflict")
    node.call("DELETE", "/admin/models/replaced")
    reply = node.request("GET", f"/v1/streams/{stream_id}")
    assert (reply.status, reply.json()["error"]["code"]) == (404, "model_not_found")


def test_the_metrics_tell_of_streams_that_were_gone_on_with(node: NodeProcess) -> None:
    def value(name: str) -> float:
        lines = node.request("GET", "/metrics").body.decode().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    before, tokens = value("sllm:streams_resumed_total"), value('sllm:generation_tokens_total{model_name="demo"}')
    stream_id, events = whole(node, *chat())
    once = value('sllm:generation_tokens_total{model_name="demo"}') - tokens
    assert len(rest(node, stream_id)) == len(events)
    assert value("sllm:streams_resumed_total") == before + 1
    assert value('sllm:generation_tokens_total{model_name="demo"}') == tokens + once, "nothing is counted twice"
    assert value("sllm:stream_log_lag_seconds") >= 0
