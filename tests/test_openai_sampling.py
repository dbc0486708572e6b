"""What a client can ask of sampling, through a real node: choices, log-probabilities, penalties, stops, ends."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sllm_actor.testing.node_process import NodeProcess

CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"
WRONG: dict[str, Any] = {
    "n": 0, "top_k": -2, "min_p": 2, "repetition_penalty": 0, "presence_penalty": 3, "frequency_penalty": "x",
    "logit_bias": {"x": 1}, "logprobs": 5, "top_logprobs": 21, "stop_token_ids": "x", "min_tokens": -1, "ignore_eos": 1,
    "seed": "x", "stop": ["a", "b", "c", "d", "e"], "stream_options": {"include_usage": True}, "store": True,
    "metadata": "x", "user": 5, "suffix": "x", "echo": True, "best_of": 2,
}  # fmt: skip


def complete(node: NodeProcess, **options: Any) -> dict[str, Any]:
    answered: dict[str, Any] = node.call("POST", PLAIN, {"model": "demo", "prompt": "7", "temperature": 0} | options)
    return answered


def text_of(node: NodeProcess, **options: Any) -> str:
    text: str = complete(node, **options)["choices"][0]["text"]
    return text


def refusal(node: NodeProcess, **options: Any) -> tuple[int, str, str]:
    reply = node.request("POST", PLAIN, {"model": "demo", "prompt": "7"} | options)
    error = reply.json()["error"]
    return reply.status, error["param"], error["message"]


@pytest.fixture(scope="module")
def seen(node: NodeProcess) -> dict[str, Any]:
    script = Path(__file__).with_name("openai_sampling_client.py")
    command = [sys.executable, str(script), node.url, "demo", json.dumps(WRONG)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    answered: dict[str, Any] = json.loads(ran.stdout)
    return answered


def test_choices_are_drawn_each_by_itself_and_the_same_again(seen: dict[str, Any]) -> None:
    assert len(seen["three"]) == 3
    assert len(set(seen["three"])) > 1
    assert seen["three"] == seen["again"]
    assert seen["three"][0] == seen["alone"], "the first choice is the answer of a request for one"


def test_choices_come_in_one_stream_and_the_prompt_is_counted_once(seen: dict[str, Any]) -> None:
    streamed = seen["three_streamed"]
    assert [streamed["texts"][str(index)] for index in range(3)] == seen["three"]
    assert set(streamed["finishes"]) == {"0", "1", "2"}
    assert streamed["usages"][-1] == seen["three_usage"]
    assert set(map(str, streamed["usages"][:-1])) == {"None"}
    assert seen["three_usage"]["prompt_tokens"] == 1
    for index, text in enumerate(seen["three"]):
        assert "".join(streamed["logprobs"].get(str(index), [])) == text


def test_a_chats_log_probabilities_are_those_of_its_tokens(seen: dict[str, Any]) -> None:
    tokens = seen["chat_logprobs"]
    assert "".join(token["token"] for token in tokens) == seen["chat"] == "47 + 35 = 82"
    for token in tokens:
        assert bytes(token["bytes"]).decode() == token["token"]
        assert len(token["top_logprobs"]) == 3
        likeliest = [other["logprob"] for other in token["top_logprobs"]]
        assert likeliest == sorted(likeliest, reverse=True)
        assert sum(map(math.exp, likeliest)) <= 1.0001
        assert (token["token"], token["logprob"]) in [
            (other["token"], other["logprob"]) for other in token["top_logprobs"]
        ]


def test_a_streamed_chat_has_the_same_and_its_usage_as_it_grows(seen: dict[str, Any]) -> None:
    streamed = seen["chat_streamed"]
    for index in ("0", "1"):
        assert streamed["texts"][index] == seen["chat"]
        assert streamed["roles"][index] == "assistant"
        assert streamed["finishes"][index] == "stop"
        # Computed in another batch, or with keys of another request: the last bits may differ.
        for token, wanted in zip(streamed["logprobs"][index], seen["chat_logprobs"], strict=True):
            assert token["token"] == wanted["token"]
            assert token["logprob"] == pytest.approx(wanted["logprob"], abs=1e-4)
            likeliest = [other["logprob"] for other in token["top_logprobs"]]
            assert likeliest == pytest.approx([other["logprob"] for other in wanted["top_logprobs"]], abs=1e-3)
    totals = [usage["completion_tokens"] for usage in streamed["usages"]]
    assert totals == sorted(totals)
    assert totals[0] < totals[-1]
    assert {usage["prompt_tokens"] for usage in streamed["usages"]} == {streamed["usages"][-1]["prompt_tokens"]}


def test_a_completions_log_probabilities_are_columns(seen: dict[str, Any]) -> None:
    choice = seen["columns"]
    columns = choice["logprobs"]
    assert "".join(columns["tokens"]) == choice["text"]
    assert len(columns["tokens"]) == 6
    for token, logprob, top, offset in zip(*(columns[name] for name in (
        "tokens", "token_logprobs", "top_logprobs", "text_offset"
    )), strict=True):  # fmt: skip
        assert top[token] == logprob == max(top.values())
        assert len(top) == 2
        assert choice["text"][offset:].startswith(token)


def test_prompts_are_echoed_each_before_its_choices(seen: dict[str, Any]) -> None:
    first, second, third, fourth = seen["echoed"]
    assert first == second
    assert third == fourth
    assert first.startswith("1, 2, 3")
    assert third.startswith("5, 6")
    assert seen["echo_streamed"]["0"].startswith("1, 2")
    assert len(seen["echo_streamed"]["0"]) > len("1, 2")


def test_an_echoed_prompt_has_log_probabilities_too(node: NodeProcess) -> None:
    answered = complete(node, prompt="1, 2, 3", max_tokens=2, min_tokens=2, echo=True, logprobs=2)
    choice = answered["choices"][0]
    columns = choice["logprobs"]
    assert "".join(columns["tokens"]) == choice["text"]
    assert len(columns["tokens"]) == answered["usage"]["total_tokens"]
    assert (columns["token_logprobs"][0], columns["top_logprobs"][0]) == (None, None), "nothing is before it"
    assert all(value < 0 for value in columns["token_logprobs"][1:])
    for token, offset in zip(columns["tokens"], columns["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    alone = complete(node, prompt="1, 2, 3", max_tokens=2, min_tokens=2, logprobs=2)["choices"][0]["logprobs"]
    assert columns["token_logprobs"][-2:] == pytest.approx(alone["token_logprobs"], abs=1e-4)


def test_a_prompt_is_scored_alone_and_in_a_stream_as_with_an_answer(node: NodeProcess) -> None:
    asked: dict[str, Any] = {"prompt": "1, 2, 3", "echo": True, "logprobs": 1, "ignore_eos": True}
    whole = complete(node, **asked, max_tokens=1)["choices"][0]["logprobs"]["token_logprobs"]
    alone = complete(node, **asked, max_tokens=0)
    assert alone["choices"][0]["text"] == "1, 2, 3"
    assert alone["choices"][0]["logprobs"]["token_logprobs"] == whole[:-1]
    assert alone["usage"]["completion_tokens"] == 0
    body = {"model": "demo", "temperature": 0, **asked, "max_tokens": 1}
    chunks = [event["choices"][0] for event in node.stream(PLAIN, body)]
    assert "".join(chunk["text"] for chunk in chunks).startswith("1, 2, 3")
    streamed = [value for chunk in chunks if chunk["logprobs"] for value in chunk["logprobs"]["token_logprobs"]]
    assert streamed == whole
    assert complete(node, prompt=[5], echo=True, logprobs=0, max_tokens=0)["choices"][0]["logprobs"][
        "token_logprobs"
    ] == [None]


def test_a_stop_over_token_borders_cuts_text_and_log_probabilities(seen: dict[str, Any]) -> None:
    for stop, (text, finish, tokens, streamed) in seen["stops"].items():
        whole = ", ".join(map(str, range(3, 21)))
        assert text == whole[: whole.index(stop)], stop
        assert finish == "stop"
        assert (streamed["texts"]["0"], streamed["finishes"]["0"]) == (text, "stop")
        assert [token["token"] for token in streamed["logprobs"].get("0", [])] == tokens
        said = "".join(tokens)
        assert said.startswith(text)
        assert len(said) - len(text) < max(map(len, tokens), default=1), "no token begins behind the stop"


def test_each_bad_value_is_a_400_that_names_the_field(seen: dict[str, Any]) -> None:
    assert seen["refused"] == {field: field for field in WRONG}


def test_penalties_and_bias_change_what_is_drawn(node: NodeProcess) -> None:
    usual = text_of(node, max_tokens=8, ignore_eos=True)
    for change in (
        {"repetition_penalty": 50},
        {"presence_penalty": 2, "frequency_penalty": 2, "repetition_penalty": 50},
        {"logit_bias": {"71": 100}},
    ):
        assert text_of(node, max_tokens=8, ignore_eos=True, **change) != usual
    assert text_of(node, max_tokens=8, ignore_eos=True, top_k=1, temperature=2) == usual
    assert text_of(node, max_tokens=8, ignore_eos=True, min_p=1, temperature=2) == usual


def test_half_a_character_has_its_bytes(node: NodeProcess) -> None:
    token = next(
        token
        for token in range(6, 262)
        if complete(node, max_tokens=1, logit_bias={str(token): 100}, logprobs=0)["choices"][0]["logprobs"]["tokens"]
        == ["bytes:\\xf0"]
    )
    body = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "temperature": 0}
    answered = node.call("POST", CHAT, body | {"logit_bias": {str(token): 100}, "logprobs": True})
    tokens = answered["choices"][0]["logprobs"]["content"]
    assert [(shown["token"], shown["bytes"]) for shown in tokens] == [("\\xf0", [0xF0])] * 3


def test_a_token_can_end_an_answer_and_no_end_comes_too_soon(node: NodeProcess) -> None:
    asked: dict[str, Any] = {"max_tokens": 9, "logit_bias": {"70": 100}, "ignore_eos": True}
    forced = complete(node, **asked)
    assert (forced["choices"][0]["finish_reason"], forced["usage"]["completion_tokens"]) == ("length", 9)
    ended = complete(node, **asked, stop_token_ids=[71, 70])
    assert (ended["choices"][0]["text"], ended["choices"][0]["finish_reason"]) == ("", "stop")
    assert ended["usage"]["completion_tokens"] == 1
    later = complete(node, **asked, stop_token_ids=[71, 70], min_tokens=3)
    assert later["choices"][0]["finish_reason"] == "stop"
    assert later["usage"]["completion_tokens"] == 4
    assert later["choices"][0]["text"]


def test_what_does_not_fit_the_model_is_a_400_that_names_the_field(node: NodeProcess) -> None:
    for field, value in (
        ("logit_bias", {"512": 1}),
        ("stop_token_ids", [512]),
        ("prompt", [512]),
        ("prompt", ["x", [512]]),
    ):
        status, param, message = refusal(node, **{field: value})
        assert (status, param) == (400, field)
        assert "512" in message
    assert refusal(node, max_tokens=3, min_tokens=4)[:2] == (400, "min_tokens")
    assert refusal(node, max_tokens=0)[:2] == (400, "max_tokens")


def test_a_choice_that_fails_fails_the_request_and_cancels_the_others(node: NodeProcess) -> None:
    """The last choice's id is taken by another request, so that this choice alone is refused."""
    twin = {"X-Request-Id": "many-2"}
    events = node.stream(PLAIN, {"model": "demo", "prompt": "7", "max_tokens": 1000, "ignore_eos": True}, twin)
    next(events)
    body = {"model": "demo", "prompt": "7", "max_tokens": 900, "ignore_eos": True, "n": 3}
    reply = node.request("POST", PLAIN, body, {"X-Request-Id": "many"})
    events.close()
    assert reply.status == 400
    assert "many-2" in reply.json()["error"]["message"]
    for choice in ("many", "many-1"):
        assert node.call("GET", f"/admin/requests/{choice}")["outcome"] == "cancelled"


def test_a_client_that_leaves_cancels_every_choice(node: NodeProcess) -> None:
    body = {"model": "demo", "prompt": "7", "max_tokens": 1000, "ignore_eos": True, "n": 3}
    events = node.stream(PLAIN, body, {"X-Request-Id": "leaver-of-three"})
    next(events)
    events.close()
    outcomes = []
    for choice in ("leaver-of-three", "leaver-of-three-1", "leaver-of-three-2"):
        for _ in range(10_000):
            outcome = node.call("GET", f"/admin/requests/{choice}")["outcome"]
            if outcome != "running":
                break
        outcomes.append(outcome)
    assert outcomes == ["cancelled"] * 3
