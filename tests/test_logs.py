"""Logs and spans of requests: who, when, how many, how long; never what was asked or answered."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from sllm_actor.cli.logs import JsonLines
from sllm_actor.domain import ModelName, RequestId, Span, Timeline
from sllm_actor.errors import ConfigInvalid
from sllm_actor.frontend.telemetry import Telemetry, open_telemetry
from sllm_actor.frontend.visit import VISIT, Visit
from sllm_actor.runtime import ActorRef, SystemClock
from sllm_actor.testing.node_process import NodeProcess, running_node

pytestmark = pytest.mark.usefixtures("warm_starts")

CHAT = "/v1/chat/completions"
MARKER = "4711 + 815"
TRACE = bytes.fromhex("4bf92f3577b34da6a3ce929d0e0e4736" + "00f067aa0ba902b7" + "01")


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[NodeProcess, Path]]:
    """A node that logs everything it can as JSON."""
    folder = tmp_path_factory.mktemp("logged")
    path = folder / "log"
    knobs = (*SMALL, "log_format=json")
    with path.open("w") as log, running_node(folder / "data", *knobs, log=log, log_level="debug") as node:
        node.deploy("builtin:demo", "demo")
        yield node, path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ask(**options: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": f"What is {MARKER}?"}], **options}


def test_each_request_has_one_line_with_its_numbers_and_nothing_of_its_text(
    logged: tuple[NodeProcess, Path],
) -> None:
    node, path = logged
    answer = node.request("POST", CHAT, ask(user=f"user {MARKER}"), {"X-Request-Id": "whole"}).json()
    assert list(node.stream(CHAT, ask(), {"X-Request-Id": "streamed"}))
    assert node.request("POST", CHAT, ask(temperature=MARKER), {"X-Request-Id": "wrong"}).status == 400
    assert node.request("GET", f"/nowhere?{MARKER.replace(' ', '')}", headers={"X-Request-Id": "none"}).status == 404
    assert node.request("POST", CHAT, f'{{"model": "{MARKER}'.encode(), {"X-Request-Id": "torn"}).status == 400
    wanted = {"whole", "streamed", "wrong", "none", "torn"}
    while wanted - (seen := {line["request_id"]: line for line in lines(path) if "status" in line}).keys():
        pass
    whole = seen["whole"]
    assert (whole["status"], whole["route"], whole["model"], whole["finish"]) == (200, CHAT, "demo", "stop")
    assert whole["generated_tokens"] == answer["usage"]["completion_tokens"]
    assert whole["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert 0 < whole["first_token_s"] <= whole["took_s"]
    assert (seen["wrong"]["status"], seen["wrong"]["code"]) == (400, "invalid_request")
    assert (seen["none"]["route"], seen["none"]["status"]) == ("none", 404)
    assert len([line for line in lines(path) if line.get("request_id") == "whole" and "status" in line]) == 1
    text = path.read_text()
    said = answer["choices"][0]["message"]["content"]
    for secret in (MARKER, MARKER.replace(" ", ""), said):
        assert secret not in text


def test_a_record_is_one_line_of_json_whatever_is_in_it() -> None:
    record = logging.LogRecord("n", logging.ERROR, "", 0, 'a "quote"\nand %s', ("\u2028more",), None)
    VISIT.set(Visit(RequestId("r-1"), "GET", "/", SystemClock()))
    line = JsonLines().format(record)
    assert "\n" not in line
    assert {"level": "error", "message": 'a "quote"\nand \u2028more', "request_id": "r-1"}.items() <= json.loads(
        line
    ).items()


def test_a_log_format_that_is_none_is_refused() -> None:
    from sllm_actor import Config

    with pytest.raises(ConfigInvalid, match="log_format"):
        Config(log_format="xml")


def telemetry() -> tuple[Telemetry, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    nobody: Any = None
    return Telemetry(provider.get_tracer("test"), provider.shutdown, nobody, SystemClock(), 1.0), exporter


def visited(code: str = "") -> tuple[Visit, Timeline]:
    visit = Visit(RequestId("r-1"), "POST", CHAT, SystemClock())
    begin_s = visit.begin_s
    visit.model, visit.status, visit.code, visit.finish = "demo", 200, code, "stop"
    visit.prompt_tokens, visit.generated_tokens = 5, 7
    visit.first_token_s, visit.last_token_s, visit.end_s = begin_s + 2, begin_s + 3, begin_s + 4
    spans = (
        Span(name="placement", begin_s=begin_s, end_s=begin_s + 0.5),
        Span(name="load", begin_s=begin_s + 0.5, end_s=begin_s + 1, size_bytes=99, tier="ssd"),
    )
    timeline = Timeline(
        request_id=visit.request_id, model=ModelName("demo"), cold=True, arrived_s=begin_s, spans=spans,
        first_token_s=begin_s + 2, end_s=begin_s + 4, prompt_tokens=5, generated_tokens=7, outcome="finished",
    )  # fmt: skip
    return visit, timeline


def test_the_timeline_becomes_child_spans_under_the_clients_trace() -> None:
    made, exporter = telemetry()
    made.make(*visited(), TRACE)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    whole = spans[f"POST {CHAT}"]
    assert whole.parent is not None
    assert (whole.parent.span_id, whole.context.trace_id) == (0x00F067AA0BA902B7, 0x4BF92F3577B34DA6A3CE929D0E0E4736)
    assert spans.keys() == {whole.name, "placement", "load", "decode"}
    for part in ("placement", "load", "decode"):
        parent = spans[part].parent
        assert parent is not None
        assert parent.span_id == whole.context.span_id
    load = spans["load"]
    assert load.start_time is not None and load.end_time is not None
    assert load.end_time - load.start_time == pytest.approx(0.5e9, abs=1e4)
    assert load.attributes == {"sllm.tier": "ssd", "sllm.size_bytes": 99}
    assert whole.attributes is not None
    assert whole.attributes["gen_ai.usage.output_tokens"] == 7
    assert whole.status.status_code is StatusCode.UNSET


def test_a_request_without_a_trace_begins_one_and_an_error_is_marked() -> None:
    made, exporter = telemetry()
    made.make(*visited("deadline_exceeded"), None)
    whole = exporter.get_finished_spans()[-1]
    assert whole.parent is None
    assert (whole.status.status_code, whole.status.description) == (StatusCode.ERROR, "deadline_exceeded")


def test_without_an_endpoint_or_without_the_packages_there_are_no_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    nobody: ActorRef = None  # type: ignore[assignment]
    assert open_telemetry("", "n", nobody, SystemClock(), 1.0) is None
    importing = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("opentelemetry.exporter"):
            raise ImportError(name)
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigInvalid, match=r"pip install 'sllm_actor\[otel\]'"):
        open_telemetry("http://127.0.0.1:1/v1/traces", "n", nobody, SystemClock(), 1.0)
