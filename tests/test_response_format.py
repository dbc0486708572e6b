"""`response_format` as clients use it, and the bounds on what they may send."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import pytest_asyncio
from random_answers import DEMO, END, VOCABULARY_TOKENS, grammars

from sllm_actor.domain import Model, ModelName
from sllm_actor.errors import InvalidRequest, QueueFull
from sllm_actor.frontend import grammars as grammars_module
from sllm_actor.frontend.grammars import GrammarService
from sllm_actor.frontend.response_format import MAX_DEPTH, MAX_SOURCE_BYTES
from sllm_actor.messages.grammar import GrammarForm
from sllm_actor.node.limits import GRAMMAR_BYTES, GRAMMAR_MEMORY_BYTES, MAX_FRAME_BYTES
from sllm_actor.runtime.forking import ForkServer
from sllm_actor.testing.node_process import NodeProcess
from sllm_actor.units import MIB

pytestmark = pytest.mark.usefixtures("warm_starts")

REPOSITORY = Path(__file__).parent.parent
CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["odd", "even"]}},
    "required": ["sum", "kind"],
    "additionalProperties": False,
}
MODEL = Model(
    name=ModelName("demo"), path=DEMO, fingerprint="1", architecture="", dtype="F32", size_bytes=1, host_bytes=1,
    context_tokens=64, vocabulary_tokens=VOCABULARY_TOKENS, eos_token_ids=(END,), default_temperature=0.0,
    default_top_p=1.0, chat=True, keep_alive_s=1.0, registered_wall_s=0.0,
)  # fmt: skip


def ask(schema: Any = SCHEMA, **options: Any) -> dict[str, Any]:
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    messages = [{"role": "user", "content": "What is 47 + 35?"}]
    return {"model": "demo", "messages": messages, "response_format": wanted, **options}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


# Takes seconds and gigabytes to compile.
EXPLODES = {"enum": [f"{at:020d}" for at in range(30_000)]}


def client(node: NodeProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{node.url}/v1", api_key="unused", max_retries=0)


def test_an_answer_has_the_form_of_its_schema(node: NodeProcess) -> None:
    for seed in range(4):
        answer = client(node).chat.completions.create(**ask(temperature=2.0, seed=seed))
        jsonschema.validate(json.loads(answer.choices[0].message.content or ""), SCHEMA)
        assert answer.choices[0].finish_reason == "stop"


def test_a_streamed_answer_is_the_same(node: NodeProcess) -> None:
    whole = client(node).chat.completions.create(**ask(temperature=2.0, seed=5))
    pieces = client(node).chat.completions.create(**ask(temperature=2.0, seed=5, stream=True))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == whole.choices[0].message.content


def test_every_choice_has_the_form(node: NodeProcess) -> None:
    answer = client(node).chat.completions.create(**ask(temperature=2.0, seed=6, n=2))
    texts = [choice.message.content or "" for choice in answer.choices]
    assert len(texts) == 2
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_any_json_object_can_be_asked_for(node: NodeProcess) -> None:
    wanted = {"type": "json_object"}
    answer = client(node).chat.completions.create(
        **ask(response_format=wanted, temperature=0.7, seed=1, max_tokens=300)
    )
    choice = answer.choices[0]
    assert (choice.message.content or "").startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content or ""), dict)


def test_text_can_be_asked_for_as_well(node: NodeProcess) -> None:
    answer = client(node).chat.completions.create(**ask(response_format={"type": "text"}))
    assert answer.choices[0].message.content == "47 + 35 = 82"


def test_a_completion_has_the_form_too_behind_what_is_echoed(node: NodeProcess) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    asked: dict[str, Any] = {"model": "demo", "prompt": ["1, 2", "7"], "max_tokens": 64, "temperature": 1.0, "seed": 3}
    answered = node.call("POST", "/v1/completions", asked | {"response_format": wanted, "echo": True})
    for choice, prompt in zip(answered["choices"], asked["prompt"], strict=True):
        assert choice["text"].startswith(prompt)
        jsonschema.validate(json.loads(choice["text"].removeprefix(prompt)), SCHEMA)
    free = node.call("POST", "/v1/completions", asked | {"response_format": {"type": "text"}})
    assert not free["choices"][0]["text"].startswith("{")
    refused = node.request("POST", "/v1/completions", asked | {"response_format": wanted, "ignore_eos": True})
    assert (refused.status, refused.json()["error"]["param"]) == (400, "ignore_eos")


def test_the_length_limit_cuts_a_form(node: NodeProcess) -> None:
    answer = client(node).chat.completions.create(**ask(max_tokens=4))
    assert answer.choices[0].finish_reason == "length"


def test_a_stop_string_ends_a_form_too(node: NodeProcess) -> None:
    answer = client(node).chat.completions.create(**ask(stop='"kind"'))
    assert (answer.choices[0].message.content or "").startswith("{")
    assert '"kind"' not in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("options", "param", "reason"),
    [
        ({"schema": {"type": "banana"}}, "response_format.json_schema.schema", "Unsupported type"),
        ({"schema": {"not": {}}}, "response_format.json_schema.schema", "not at $ can't be held strictly"),
        ({"schema": {"pattern": 'a"'}}, "response_format.json_schema.schema", "that JSON escapes, at $ can't be held"),
        ({"schema": {"pattern": "(?=a)"}}, "response_format.json_schema.schema", "can't be held strictly"),
        ({"schema": {"$ref": "#/no"}}, "response_format.json_schema.schema", "Cannot find"),
        ({"schema": {"enum": ["x" * MAX_SOURCE_BYTES]}}, "response_format.json_schema.schema", "at most 1048576"),
        ({"schema": nested(MAX_DEPTH)}, "response_format.json_schema.schema", "deeper than"),
        ({"schema": 5}, "response_format.json_schema.schema", "object"),
        ({"response_format": {"type": "json"}}, "response_format.type", "json"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        ({"response_format": {"type": "text", "x": 1}}, "response_format.x", "not supported"),
        ({"ignore_eos": True}, "ignore_eos", "ends where the form does"),
        ({"min_tokens": 5}, "min_tokens", "ends where the form does"),
    ],
)
def test_a_format_that_can_not_be_held_is_refused_by_name(
    node: NodeProcess, options: dict[str, Any], param: str, reason: str
) -> None:
    reply = node.request("POST", CHAT, ask(**options))
    assert reply.status == 400
    error = reply.json()["error"]
    assert error["param"] == param
    assert reason in error["message"]


def test_what_can_not_be_held_is_let_be_where_it_is_not_strict(node: NodeProcess) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer", "multipleOf": 7}}}
    answer = client(node).chat.completions.create(**ask(response_format=wanted, max_tokens=20, seed=1))
    assert (answer.choices[0].message.content or "-").lstrip("-").isdigit()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def forks() -> AsyncIterator[ForkServer]:
    """A fork server whose grammar processes may take little memory."""
    server = ForkServer(
        "sllm_actor.node.children",
        {
            GRAMMAR_BYTES: str(8 * MIB),
            GRAMMAR_MEMORY_BYTES: str(64 * MIB),
            MAX_FRAME_BYTES: str(16 * MIB),
            "SLLM_NO_NATIVE": "1",
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path]),
        },
    )
    await server.start()
    yield server
    await server.stop()


def service(forks: ForkServer, timeout_s: float = 60.0, cache_bytes: int = MIB) -> GrammarService:
    return GrammarService(forks, timeout_s=timeout_s, cache_bytes=cache_bytes, max_frame_bytes=16 * MIB)


async def compile_schema(compiling: GrammarService, schema: object, model: Model = MODEL) -> str:
    return await compiling.compile(model, GrammarForm.JSON_SCHEMA, json.dumps(schema), "response_format")


@pytest.mark.asyncio(loop_scope="module")
async def test_a_grammar_that_was_compiled_elsewhere_is_one_for_the_engine(forks: ForkServer) -> None:
    compiling = service(forks)
    grammar = await compile_schema(compiling, SCHEMA)
    assert not grammars().constrain(grammar).ended
    await compiling.close()
    assert await compile_schema(compiling, SCHEMA) == grammar, "it is remembered: no process was needed"
    await compiling.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_schema_that_explodes_is_ended_and_the_next_one_is_compiled(forks: ForkServer) -> None:
    compiling = service(forks, timeout_s=0.1)
    with pytest.raises(InvalidRequest, match=r"can't be compiled within 0\.1 s") as caught:
        await compile_schema(compiling, EXPLODES)
    assert caught.value.param == "response_format"
    patient = service(forks)
    assert await compile_schema(patient, SCHEMA)
    await patient.close()
    await compiling.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_schema_that_takes_too_much_memory_is_refused(forks: ForkServer) -> None:
    compiling = service(forks)
    with pytest.raises(InvalidRequest, match="too much memory"):
        await compile_schema(compiling, {"type": "string", "maxLength": 1_000_000})
    with pytest.raises(InvalidRequest, match="too long"):
        await compile_schema(compiling, {"const": "x" * 20 * MIB})
    assert await compile_schema(compiling, SCHEMA)
    await compiling.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_process_that_is_killed_is_replaced(forks: ForkServer) -> None:
    compiling = service(forks)
    await compile_schema(compiling, SCHEMA)
    assert compiling._child is not None
    os.kill(compiling._child.pid, signal.SIGKILL)
    assert await compile_schema(compiling, {"type": "integer"})
    await compiling.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_only_so_many_wait_and_one_who_leaves_is_not_waited_for(
    forks: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars_module, "MAX_WAITING", 1)
    compiling = service(forks)
    slow = asyncio.ensure_future(compile_schema(compiling, EXPLODES))
    while compiling._answer is None:
        await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await compile_schema(compiling, SCHEMA)
    slow.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slow
    assert await compile_schema(compiling, SCHEMA)
    await compiling.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_remembered_has_a_bound(forks: ForkServer) -> None:
    compiling = service(forks, cache_bytes=4096)
    for at in range(12):
        await compile_schema(compiling, {"const": at})
    assert len(compiling._known) < 12
    await compiling.close()


async def test_a_model_without_an_end_can_not_be_held_to_a_form() -> None:
    compiling = service(ForkServer("never.started", {}))
    endless = Model(**{name: getattr(MODEL, name) for name in Model.__struct_fields__} | {"eos_token_ids": ()})
    with pytest.raises(InvalidRequest, match="no end token"):
        await compile_schema(compiling, SCHEMA, endless)
