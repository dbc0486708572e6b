"""Request bodies: each field's type and bounds, and refusals that name the field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_actor import errors
from sllm_actor.errors import InvalidRequest, SllmError, UnsupportedField
from sllm_actor.frontend import http_errors
from sllm_actor.frontend.schema import (
    ChatRequest,
    CompletionRequest,
    DeployRequest,
    MigrationRequest,
    parse,
)

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hello"}
MINIMAL: dict[Any, dict[str, Any]] = {ChatRequest: CHAT, CompletionRequest: COMPLETION}
DEPLOY: dict[str, Any] = {"name": "m", "source": "/models/m"}

COMMON_WRONG: list[tuple[str, Any]] = [
    ("model", 5), ("model", ""), ("model", "x" * 257), ("model", ["m"]),
    ("stream", 1), ("stream", "true"), ("stream_options", True), ("stream_options", []),
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", "5"), ("max_tokens", 2**31),
    ("max_tokens", True), ("max_tokens", 10**40),
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", "1"), ("temperature", True), ("temperature", [1]),
    ("temperature", 10**300),
    ("top_p", 0), ("top_p", 1.1), ("top_p", -1), ("top_p", {}),
    ("seed", 1.5), ("seed", "1"), ("seed", 2**63), ("seed", -(2**63) - 1), ("seed", 2**64), ("seed", True),
    ("stop", ""), ("stop", 5), ("stop", ["a"] * 5), ("stop", "x" * 257), ("stop", {"a": 1}),
    ("n", 0), ("n", -1), ("n", 129), ("n", "1"), ("n", True),
    ("top_k", -2), ("top_k", 1.5), ("top_k", "5"), ("top_k", 2**31), ("min_p", -0.1), ("min_p", 1.1), ("min_p", "x"),
    ("repetition_penalty", 0), ("repetition_penalty", -1), ("repetition_penalty", 101), ("repetition_penalty", "1"),
    ("presence_penalty", 2.1), ("presence_penalty", -2.1), ("presence_penalty", "1"),
    ("frequency_penalty", 2.1), ("frequency_penalty", -2.1), ("frequency_penalty", [1]),
    ("logit_bias", []), ("logit_bias", 5), ("logit_bias", {"x": 1}), ("logit_bias", {"": 1}), ("logit_bias", {"-1": 1}),
    ("logit_bias", {"1" * 11: 1}), ("logit_bias", {"1\n": 1}), ("logit_bias", {str(k): 1 for k in range(1025)}),
    ("stop_token_ids", 5), ("stop_token_ids", [0] * 129), ("stop_token_ids", "x"),
    ("min_tokens", -1), ("min_tokens", 1.5), ("min_tokens", 2**31),
    ("stream_options", {}), ("stream_options", {"include_usage": True}),
    ("priority", 2**31), ("priority", -(2**31) - 1), ("priority", "high"), ("priority", 0.5), ("priority", True),
    ("user", 5), ("ignore_eos", 1), ("ignore_eos", "yes"),
]  # fmt: skip
WRONG: list[tuple[type[Any], str, Any]] = [
    *((kind, field, value) for kind in MINIMAL for field, value in COMMON_WRONG),
    (ChatRequest, "messages", []), (ChatRequest, "messages", "hello"), (ChatRequest, "messages", {}),
    (ChatRequest, "messages", 5),
    (ChatRequest, "max_completion_tokens", 0), (ChatRequest, "max_completion_tokens", "5"),
    (CompletionRequest, "prompt", 5), (CompletionRequest, "prompt", []), (CompletionRequest, "prompt", {}),
    (CompletionRequest, "prompt", True), (CompletionRequest, "prompt", ["x"] * 129),
    (ChatRequest, "logprobs", 1), (ChatRequest, "logprobs", "true"), (ChatRequest, "top_logprobs", 21),
    (ChatRequest, "top_logprobs", -1), (ChatRequest, "top_logprobs", True), (ChatRequest, "top_logprobs", 3),
    (ChatRequest, "metadata", []), (ChatRequest, "metadata", {str(k): "x" for k in range(17)}),
    (ChatRequest, "metadata", {"x" * 65: "x"}), (ChatRequest, "store", 1), (ChatRequest, "store", True),
    (CompletionRequest, "logprobs", -1), (CompletionRequest, "logprobs", 21), (CompletionRequest, "logprobs", True),
    (CompletionRequest, "echo", 1), (CompletionRequest, "best_of", 0), (CompletionRequest, "best_of", 2),
]  # fmt: skip
NESTED_WRONG: list[tuple[type[Any], dict[str, Any], str]] = [
    (ChatRequest, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    (ChatRequest, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (ChatRequest, {"messages": [{"content": "x"}]}, "messages[0].role"),
    (ChatRequest, {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    (ChatRequest, {"messages": [*CHAT["messages"], {"role": "user", "content": 5}]}, "messages[1].content"),
    (ChatRequest, {"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "messages[0].tool_calls"),
    (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    (ChatRequest, {"messages": [None]}, "messages[0]"),
    (ChatRequest, {"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    (ChatRequest, {"stream_options": {"other": True}}, "stream_options.other"),
    (ChatRequest, {"stop": ["a", 5]}, "stop[1]"),
    (CompletionRequest, {"prompt": [1, "x"]}, "prompt[1]"),
    (CompletionRequest, {"prompt": ["x", 1]}, "prompt[1]"),
    (CompletionRequest, {"prompt": [[1], 2]}, "prompt[1]"),
    (CompletionRequest, {"prompt": [[]]}, "prompt[0]"),
    (CompletionRequest, {"prompt": ["x", [-1]]}, "prompt[1][0]"),
    (CompletionRequest, {"prompt": [True]}, "prompt[0]"),
    (CompletionRequest, {"prompt": ["x"] * 3, "n": 43}, "n"),
    (CompletionRequest, {"max_tokens": 0, "logprobs": 0}, "max_tokens"),
    (ChatRequest, {"logit_bias": {"1": 101}}, "logit_bias[...]"),
    (ChatRequest, {"logit_bias": {"1": "x"}}, "logit_bias[...]"),
    (ChatRequest, {"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    (ChatRequest, {"metadata": {"a": 5}}, "metadata[...]"),
    (
        ChatRequest,
        {"stream": True, "stream_options": {"continuous_usage_stats": 1}},
        "stream_options.continuous_usage_stats",
    ),
    (CompletionRequest, {"prompt": [-1]}, "prompt[0]"),
    (CompletionRequest, {"prompt": [2**31]}, "prompt[0]"),
]
UNSUPPORTED = [
    "suffix",
    "functions",
    "service_tier",
    "include_stop_str_in_output",
    "Model",
    "",
    "x" * 10_000,
    "a` - at `$.model",
    "a\nb",
]


def body(kind: type[Any], **changes: Any) -> bytes:
    return json.dumps(MINIMAL[kind] | changes).encode()


@pytest.mark.parametrize(("kind", "field", "value"), WRONG)
def test_a_field_of_a_wrong_type_or_out_of_bounds_is_refused_by_name(kind: type[Any], field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(body(kind, **{field: value}), kind)
    assert caught.value.param == field
    assert caught.value.message.startswith(f"{field}: ")
    assert http_errors.status_of(caught.value) == 400


@pytest.mark.parametrize(("kind", "changes", "param"), NESTED_WRONG)
def test_a_wrong_field_inside_another_is_named_by_its_path(
    kind: type[Any], changes: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(body(kind, **changes), kind)
    assert caught.value.param == param


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_a_missing_field_is_named_also_where_it_is_null(kind: type[Any]) -> None:
    for field in MINIMAL[kind]:
        without = {name: value for name, value in MINIMAL[kind].items() if name != field}
        for sent in (without, without | {field: None}):
            with pytest.raises(InvalidRequest) as caught:
                parse(json.dumps(sent).encode(), kind)
            assert caught.value.param == field
            assert "required" in caught.value.message


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_a_field_that_is_not_offered_is_refused_by_name(field: str) -> None:
    for kind in MINIMAL:
        with pytest.raises(UnsupportedField) as caught:
            parse(body(kind, **{field: 1}), kind)
        assert caught.value.param == field[:128]
        assert len(caught.value.message) < 200


def test_null_means_absent_for_known_and_unknown_fields() -> None:
    optional = ["stream", "stream_options", "max_tokens", "temperature", "top_p", "seed", "stop", "n", "user", "tools"]
    for kind in MINIMAL:
        assert parse(body(kind, **dict.fromkeys(optional)), kind) == parse(body(kind), kind)


def test_every_field_is_read() -> None:
    asked = parse(
        body(
            ChatRequest, stream=True, stream_options={"include_usage": True}, max_tokens=5, temperature=0, top_p=1,
            seed=-(2**63), stop=["a", "b"], n=1, user="u", ignore_eos=True,
        ),
        ChatRequest,
    )  # fmt: skip
    assert asked.stream
    assert asked.stream_options is not None
    assert asked.stream_options.include_usage
    assert (asked.max_tokens, asked.temperature, asked.top_p, asked.seed) == (5, 0.0, 1.0, -(2**63))
    assert asked.stops() == ["a", "b"]
    assert asked.ignore_eos
    assert parse(body(CompletionRequest, stop="x", prompt=[1, 2]), CompletionRequest).stops() == ["x"]
    for kind in MINIMAL:
        drawn = parse(
            body(
                kind, top_k=-1, min_p=0.5, repetition_penalty=1, presence_penalty=-2, frequency_penalty=2,
                logit_bias={"7": -100, "0008": 100}, stop_token_ids=[0, 2**31 - 1], min_tokens=3, n=128,
            ),
            kind,
        )  # fmt: skip
        assert (drawn.top_k, drawn.min_p, drawn.repetition_penalty, drawn.min_tokens, drawn.n) == (-1, 0.5, 1.0, 3, 128)
        assert (drawn.presence_penalty, drawn.frequency_penalty) == (-2.0, 2.0)
        assert (drawn.logit_bias, drawn.stop_token_ids) == ({"7": -100.0, "0008": 100.0}, [0, 2**31 - 1])


def test_logprobs_are_asked_for_as_each_of_the_two_has_it() -> None:
    for asked, wanted in (({}, None), ({"logprobs": False}, None), ({"logprobs": True}, 0)):
        assert parse(body(ChatRequest, **asked), ChatRequest).wanted_logprobs() == wanted
    assert parse(body(ChatRequest, logprobs=True, top_logprobs=20), ChatRequest).wanted_logprobs() == 20
    for number in (None, 0, 5, 20):
        assert parse(body(CompletionRequest, logprobs=number), CompletionRequest).wanted_logprobs() == number


def test_a_prompt_may_be_a_text_tokens_or_a_list_of_either() -> None:
    for prompt, prompts in (
        ("x", ["x"]),
        ([1, 2], [[1, 2]]),
        (["x", "y"], ["x", "y"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["x", [2]], ["x", [2]]),
    ):
        assert parse(body(CompletionRequest, prompt=prompt), CompletionRequest).prompts() == prompts


def test_what_changes_nothing_is_accepted() -> None:
    for changes in ({"store": False}, {"metadata": {"a": "b"}}, {"stream": True, "stream_options": {}}):
        parse(body(ChatRequest, **changes), ChatRequest)
    assert parse(body(CompletionRequest, n=3, best_of=3), CompletionRequest).n == 3


def test_a_message_is_one_text_however_it_is_written() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = parse(body(ChatRequest, messages=[{"role": "user", "content": parts}, *CHAT["messages"]]), ChatRequest)
    assert [message.text() for message in asked.messages] == ["ab", "hello"]


def test_the_newer_name_of_the_bound_wins_and_completions_have_openais_default() -> None:
    assert parse(body(ChatRequest, max_tokens=5, max_completion_tokens=7), ChatRequest).limit() == 7
    assert parse(body(ChatRequest, max_tokens=5), ChatRequest).limit() == 5
    assert parse(body(ChatRequest), ChatRequest).limit() is None
    assert parse(body(CompletionRequest), CompletionRequest).limit() == 16


@pytest.mark.parametrize(
    "raw",
    [
        b"", b" ", b"{", b"}", b"[]", b"null", b"5", b'"x"', b"NaN", b"{model: 1}", b"{'model': 1}",
        b'{"model": NaN}', b'{"model": Infinity}',
        b'{"model": 1e999}', b'{"model": "\xff"}', b'{"model": "\\ud800"}', b'{"model": "m"', b'{"model": "m"} x',
        b'\xef\xbb\xbf{"model": "m"}',
        b"[" * 100_000, b'{"a":' * 100_000, b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"n": ' + b"9" * 100_000 + b"}",
        b"\x00", b"\x80" * 100,
    ],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(raw: bytes) -> None:
    for kind in MINIMAL:
        with pytest.raises(InvalidRequest):
            parse(raw, kind)


def test_of_a_field_given_twice_the_last_one_counts() -> None:
    raw = b'{"model": "a", "prompt": "x", "model": "b"}'
    assert parse(raw, CompletionRequest).model == "b"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [*CHAT, *dict.fromkeys(field for field, _ in COMMON_WRONG), "prompt", "max_completion_tokens", "other"]


@given(
    st.sampled_from([ChatRequest, CompletionRequest]), st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4)
)
def test_any_json_is_a_request_or_a_refusal_that_names_a_field(kind: type[Any], changes: dict[str, Any]) -> None:
    refused: InvalidRequest | None = None
    try:
        asked = parse(json.dumps(MINIMAL[kind] | changes).encode(), kind)
        assert isinstance(asked.stops(), list)
    except InvalidRequest as error:
        refused = error
    if refused is not None and refused.param is None:
        assert "not JSON" in refused.message
    elif refused is not None and refused.param is not None:
        assert refused.param.split(".")[0].split("[")[0] in {*changes, *MINIMAL[kind]}


@given(st.binary(max_size=60))
def test_any_bytes_are_a_request_or_a_refusal(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(raw, ChatRequest)


def test_admin_bodies_are_checked_too() -> None:
    deployed = parse(json.dumps(DEPLOY | {"keep_alive": "5m", "replace": True}).encode(), DeployRequest)
    assert (deployed.name, deployed.source, deployed.keep_alive, deployed.replace) == ("m", "/models/m", "5m", True)
    assert parse(json.dumps(DEPLOY | {"keep_alive": 30}).encode(), DeployRequest).keep_alive == 30
    assert parse(b'{"to": "node-2"}', MigrationRequest).to == "node-2"
    for field, value in [
        ("keep_alive", -1),
        ("keep_alive", True),
        ("name", 5),
        ("source", []),
        ("replace", "yes"),
        ("extra", 1),
    ]:
        with pytest.raises(InvalidRequest) as caught:
            parse(json.dumps(DEPLOY | {field: value}).encode(), DeployRequest)
        assert caught.value.param == field
    with pytest.raises(InvalidRequest) as caught:
        parse(b'{"to": 5}', MigrationRequest)
    assert caught.value.param == "to"


def _classes(root: type[SllmError]) -> list[type[SllmError]]:
    return [root, *(found for child in root.__subclasses__() for found in _classes(child))]


@pytest.mark.parametrize("kind", _classes(SllmError))
def test_every_error_has_a_status_and_a_body_in_openais_shape(kind: type[SllmError]) -> None:
    error = kind("what happened", param="model")
    status = http_errors.status_of(error)
    assert 400 <= status <= 504
    wanted = {"message": "what happened", "param": "model", "code": kind.code}
    answered = http_errors.body_of(error)["error"]
    assert answered.items() >= wanted.items()
    assert set(answered) == {"message", "type", "param", "code"}
    assert (status in (400, 408)) == issubclass(kind, errors.InvalidInput)
    assert (status in (429, 503)) == issubclass(kind, errors.Overloaded | errors.MetadataUnavailable)


def test_retry_after_is_in_whole_seconds_and_only_where_it_helps() -> None:
    assert http_errors.headers_of(errors.QueueFull("x", retry_after_s=0.2)) == {"Retry-After": "1"}
    assert http_errors.headers_of(errors.QueueFull("x", retry_after_s=4.1)) == {"Retry-After": "5"}
    assert http_errors.headers_of(errors.ModelNotFound("x")) == {}
