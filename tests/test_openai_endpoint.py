"""The OpenAI endpoint as clients see it: a real node, real sockets, the official client in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request

from sllm_actor.frontend.gateway import trace_of
from sllm_actor.testing.node_process import NodeProcess
from sllm_actor.testing.questions import Kind, count, is_right, unseen

CHAT = "/v1/chat/completions"
NO_KEEP_ALIVES: tuple[Any, ...] = ("soon", "-5m", "9000000h", -2, 1e9, [], "")


def ask(content: str = "What is 47 + 35?", **options: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": content}], **options}


def error_of(node: NodeProcess, body: Any, path: str = CHAT, **headers: str) -> tuple[int, dict[str, Any]]:
    reply = node.request("POST", path, body, headers)
    return reply.status, reply.json()["error"]


def test_the_official_client_finds_what_it_expects(node: NodeProcess) -> None:
    script = Path(__file__).with_name("openai_client.py")
    ran = subprocess.run([sys.executable, script, node.url, "demo"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout)
    assert seen["chat"] == seen["streamed"] == "47 + 35 = 82"
    assert seen["chat_finish"] == seen["stream_finish"] == "stop"
    assert seen["stream_role"] == "assistant"
    assert seen["stream_pieces"] > 3, "the answer comes in pieces"
    # The second of two equal prompts need not be computed again.
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert seen["chat_usage"][name] == seen["stream_usage"][name]
    assert seen["chat_usage"]["total_tokens"] == (
        seen["chat_usage"]["prompt_tokens"] + seen["chat_usage"]["completion_tokens"]
    )
    assert (seen["completion_finish"], seen["completion_tokens"]) == ("length", 5)
    assert seen["completion_same"]
    assert "demo" in seen["models"]
    assert seen["retrieved"] == "demo"
    assert seen["absent"] == "model_not_found"
    assert seen["unsupported"] == "service_tier"


def test_unseen_sums_are_answered_right_when_many_are_asked_at_once(node: NodeProcess) -> None:
    questions = [*unseen(1, 10, Kind.ADD), *unseen(2, 10, Kind.SUBTRACT)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda question: node.chat("demo", question.prompt), questions))
    wrong = [pair for pair in zip(questions, answers, strict=True) if not is_right(*pair)]
    assert len(wrong) <= 1, wrong


def test_a_long_answer_arrives_whole_and_right(node: NodeProcess) -> None:
    question = count(87, 412)
    assert is_right(question, node.chat("demo", question.prompt))


def test_events_end_with_done_and_carry_the_request_id(node: NodeProcess) -> None:
    reply = node.request("POST", CHAT, ask(stream=True), {"X-Request-Id": "my-own-id.1"})
    assert reply.headers["X-Request-Id"] == "my-own-id.1"
    assert reply.headers["Content-Type"].startswith("text/event-stream")
    assert reply.body.endswith(b"\n\ndata: [DONE]\n\n")


def test_an_unusable_request_id_is_replaced(node: NodeProcess) -> None:
    reply = node.request("POST", CHAT, ask(max_tokens=1), {"X-Request-Id": "no spaces, please"})
    assert reply.status == 200
    assert reply.headers["X-Request-Id"].startswith("req-")


def test_max_tokens_ends_an_answer_with_length(node: NodeProcess) -> None:
    answer = node.call("POST", CHAT, ask("Count from 1 to 900.", max_completion_tokens=7))
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 7


def test_a_stop_string_ends_an_answer_and_is_not_shown(node: NodeProcess) -> None:
    for options in ({"stop": " 9"}, {"stop": ["never", ", 9"]}):
        answer = node.call("POST", CHAT, ask("Count from 3 to 20.", **options))
        text = answer["choices"][0]["message"]["content"]
        assert text.rstrip(",") == "3, 4, 5, 6, 7, 8"
        assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_seed_makes_a_sampled_answer_repeatable(node: NodeProcess) -> None:
    body = {"model": "demo", "prompt": "7", "temperature": 2, "max_tokens": 30}
    texts = [node.call("POST", "/v1/completions", body | {"seed": seed})["choices"][0]["text"] for seed in (5, 5, 6, 7)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_a_prompt_of_token_ids_is_the_same_as_its_text(node: NodeProcess) -> None:
    first = node.call("POST", "/v1/completions", {"model": "demo", "prompt": [5, 6, 7], "max_tokens": 3})
    assert first["usage"]["prompt_tokens"] == 3
    status, error = error_of(node, {"model": "demo", "prompt": [5, 10**6]}, "/v1/completions")
    assert (status, error["param"]) == (400, "prompt")


@pytest.mark.parametrize("role", ["system", "developer"])
def test_content_may_come_in_parts_and_with_a_system_message(node: NodeProcess, role: str) -> None:
    messages = [
        {"role": role, "content": "You are a helpful assistant."},
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "12 + 7?"}]},
    ]
    answer = node.call("POST", CHAT, {"model": "demo", "messages": messages})
    assert answer["choices"][0]["message"]["content"] == "12 + 7 = 19"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (ask(temperature="hot"), "temperature"),
        (ask(temperature=2.5), "temperature"),
        (ask(max_tokens=0), "max_tokens"),
        (ask(n=0), "n"),
        (ask(tools=[]), "tools"),
        (ask(store=True), "store"),
        ({"model": "demo"}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "model"),
        ({"model": "demo", "messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"model": "demo", "messages": []}, "messages"),
        (ask(stream_options={"surprise": True}), "stream_options.surprise"),
        *((ask(keep_alive=wrong), "keep_alive") for wrong in NO_KEEP_ALIVES),
    ],
)
def test_a_wrong_field_is_a_400_that_names_it(node: NodeProcess, body: dict[str, Any], param: str) -> None:
    status, error = error_of(node, body)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert param.split(".")[-1] in error["message"]


def test_a_request_says_how_long_its_model_stays_and_nothing_else_changes_that(node: NodeProcess) -> None:
    def expires_in_s() -> Any:
        found = [one for one in node.call("GET", "/admin/instances")["instances"] if one["model"] == "briefly"]
        return found[0]["expires_in_s"] if found else "gone"

    node.deploy("builtin:demo", "briefly", keep_alive="1m")
    assert node.chat("briefly", "What is 1 + 1?") == "1 + 1 = 2"
    assert 0 < expires_in_s() <= 60
    node.chat("briefly", "What is 1 + 1?", keep_alive="2h")
    assert 3600 < expires_in_s() <= 7200
    node.chat("briefly", "What is 1 + 1?", keep_alive=-1)
    node.call("POST", "/v1/embeddings", {"model": "briefly", "input": "a"})
    assert expires_in_s() == "forever"
    assert list(node.stream(CHAT, ask(keep_alive=0) | {"model": "briefly"}))
    while expires_in_s() != "gone":
        pass


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xfe", b'"x"', b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_a_400(node: NodeProcess, body: bytes) -> None:
    status, error = error_of(node, body)
    assert (status, error["type"]) == (400, "invalid_request_error")


def test_null_fields_count_as_absent(node: NodeProcess) -> None:
    assert node.chat("demo", "What is 1 + 1?", tools=None, stop=None, seed=None) == "1 + 1 = 2"


def test_an_unknown_model_is_a_404_with_openais_code(node: NodeProcess) -> None:
    for name in ("absent", "../etc/passwd", "a" * 200, "ß"):
        status, error = error_of(node, ask() | {"model": name})
        assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    reply = node.request("GET", "/v1/models/absent")
    assert (reply.status, reply.json()["error"]["code"]) == (404, "model_not_found")


def test_a_prompt_longer_than_the_context_is_a_400_with_both_numbers(node: NodeProcess) -> None:
    context = node.call("GET", "/v1/models/demo")["max_model_len"]
    status, error = error_of(node, ask("9" * (context + 10)))
    assert status == 400
    assert str(context) in error["message"]
    status, error = error_of(node, ask(max_tokens=context))
    assert (status, error["param"]) == (400, "max_tokens")
    assert str(context) in error["message"]


def test_a_body_over_the_bound_is_a_413(node: NodeProcess) -> None:
    status, error = error_of(node, ask("x" * (5 * 1024 * 1024)))
    assert (status, error["code"]) == (413, "body_too_large")


def test_another_content_type_is_refused(node: NodeProcess) -> None:
    status, error = error_of(node, ask(), **{"Content-Type": "text/plain"})
    assert status == 400
    assert "application/json" in error["message"]


def test_a_foreign_host_header_is_refused_on_a_node_without_a_key(node: NodeProcess) -> None:
    assert node.request("GET", "/v1/models", headers={"Host": "evil.example:80"}).status == 400
    assert node.request("GET", "/v1/models", headers={"Host": "localhost:1"}).status == 200
    assert node.request("GET", "/v1/models", headers={"Host": "[::1]:1"}).status == 200


def test_unknown_paths_and_methods_have_errors_of_the_same_shape(node: NodeProcess) -> None:
    for method, path, status in (("GET", "/v2/none", 404), ("GET", CHAT, 405)):
        reply = node.request(method, path)
        assert reply.status == status
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_health_ready_and_version_answer(node: NodeProcess) -> None:
    assert node.call("GET", "/health") == {"status": "ok"}
    assert node.call("GET", "/ready") == {"ready": True}
    assert node.call("GET", "/version")["version"]


def test_a_client_that_leaves_cancels_its_request(node: NodeProcess) -> None:
    events = node.stream(CHAT, ask("Count from 1 to 999."), {"X-Request-Id": "leaver"})
    next(events)
    events.close()
    for _ in range(10_000):
        timeline = node.call("GET", "/admin/requests/leaver")
        if timeline["outcome"] != "running":
            break
    assert timeline["outcome"] == "cancelled"
    assert timeline["generated_tokens"] < 2000
    assert node.call("GET", "/admin/instances")["instances"][0]["active"] == 0


def test_two_requests_of_one_id_at_once_are_refused(node: NodeProcess) -> None:
    events = node.stream(CHAT, ask("Count from 1 to 999."), {"X-Request-Id": "twin"})
    next(events)
    status, error = error_of(node, ask(), **{"X-Request-Id": "twin"})
    events.close()
    assert status == 400
    assert "twin" in error["message"]


def test_migrating_where_there_is_no_other_node_says_so(node: NodeProcess) -> None:
    events = node.stream(CHAT, ask("Count from 1 to 999."), {"X-Request-Id": "mover"})
    next(events)
    absent = node.request("POST", "/admin/requests/mover/migrate", {"to": "node-9"})
    here = node.request("POST", "/admin/requests/mover/migrate", {"to": "node-1"})
    unknown = node.request("POST", "/admin/requests/nobody/migrate", {"to": "node-1"})
    events.close()
    assert (absent.status, absent.json()["error"]["code"]) == (404, "node_not_found")
    assert (here.status, here.json()["error"]["code"]) == (409, "already_there")
    assert (unknown.status, unknown.json()["error"]["code"]) == (404, "request_not_found")


def test_the_runtime_shows_its_actors_and_how_late_the_loop_was(node: NodeProcess) -> None:
    shown = node.call("GET", "/admin/runtime")
    actors = {actor["name"]: actor for actor in shown["system"]["actors"]}
    assert {"scheduler", "model-manager", "router", "migration-coordinator"} <= actors.keys()
    assert actors["model-manager"]["handled"] > 0
    assert all(actor["restarts"] == 0 for actor in actors.values())
    assert shown["system"]["dead_letters"] >= 0
    assert shown["loop_lag"].keys() == {"worst_s", "faults"}
    pool = shown["loader"]["pool"]
    assert 0 < pool["free_bytes"] <= pool["size_bytes"]
    assert pool["facts"]["native"] is True
    assert shown["loader"]["paths"].keys() == {"page_cache", "ssd", "device"}


@pytest.mark.parametrize(
    ("header", "trace"),
    [
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", 25),
        ("", None),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7", None),
        ("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", None),
        ("00-" + "é" * 32 + "-00f067aa0ba902b7-01", None),
    ],
)
def test_a_trace_context_is_taken_over_where_it_is_one(header: str, trace: int | None) -> None:
    request = make_mocked_request("POST", "/v1/completions", headers={"traceparent": header})
    taken = trace_of(request)
    assert taken is None if trace is None else taken == bytes.fromhex(header[3:].replace("-", ""))
