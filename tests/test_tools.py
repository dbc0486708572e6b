"""Tool calls as clients use them: offered, demanded, streamed, answered; and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from random_answers import DEMO, tokenizer
from transformers import AutoTokenizer

from sllm_actor.errors import InvalidRequest
from sllm_actor.frontend.tool_formats import GRANITE, HERMES, LLAMA, MISTRAL, format_of
from sllm_actor.frontend.tool_templates import as_dictionary, check_template, marker_of
from sllm_actor.messages.text import ChatTurn, PastCall, RenderChat
from sllm_actor.testing.node_process import NodeProcess

CHAT = "/v1/chat/completions"
DATA = Path(__file__).parents[2] / "shared" / "data"
ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}, "unit": {"enum": ["m", "km"]}},
    "required": ["a", "unit"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": ADD, "strict": True}},
    {"type": "function", "function": {"name": "now"}},
]
TEMPLATE = """{% if tools %}{{ tools | tojson }}
Call them as <MARK>{"name": …, "arguments": …}{% endif %}
{% for message in messages %}<|user|>{{ message.role }}: {{ message.content }}
{% for call in message.tool_calls or [] %}{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def ask(model: str, **options: Any) -> dict[str, Any]:
    messages: Any = [{"role": "user", "content": "What is 47 + 35?"}]
    return {
        "model": model,
        "messages": messages,
        "tools": TOOLS,
        "temperature": 2.0,
        "seed": 3,
        "max_tokens": 150,
        **options,
    }


@pytest.fixture(scope="module")
def deployed(node: NodeProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """The shared node with the demo model once more, with templates that have tools."""
    for name, mark in (("hermes", "<tool_call>"), ("mistral", "[TOOL_CALLS]"), ("odd", "a word")):
        folder = tmp_path_factory.mktemp(name) / "model"
        shutil.copytree(DEMO, folder)
        (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<MARK>", mark))
        node.deploy(str(folder), name)
    yield node
    for name in ("hermes", "mistral", "odd"):
        node.call("DELETE", f"/admin/models/{name}")


def client(node: NodeProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{node.url}/v1", api_key="unused", max_retries=0)


@pytest.mark.parametrize("model", ["hermes", "mistral"])
def test_a_call_that_is_required_is_made_and_fits_its_schema(deployed: NodeProcess, model: str) -> None:
    answer = client(deployed).chat.completions.create(
        **ask(model, tool_choice="required", parallel_tool_calls=False, n=2)
    )
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls or []
        assert call.type == "function" and call.id
        arguments = json.loads(call.function.arguments)
        if call.function.name == "add":
            jsonschema.validate(arguments, ADD)
        else:
            assert (call.function.name, arguments) == ("now", {})


def test_a_tool_that_is_named_is_the_one_that_is_called(deployed: NodeProcess) -> None:
    named = {"type": "function", "function": {"name": "add"}}
    for seed in range(3):
        answer = client(deployed).chat.completions.create(
            **ask("hermes", tool_choice=named, parallel_tool_calls=False, seed=seed)
        )
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.function.name == "add"
        jsonschema.validate(json.loads(call.function.arguments), ADD)


def test_a_streamed_call_is_the_same_piece_by_piece(deployed: NodeProcess) -> None:
    options = ask("hermes", tool_choice={"type": "function", "function": {"name": "add"}}, parallel_tool_calls=False)
    (whole,) = client(deployed).chat.completions.create(**options).choices[0].message.tool_calls or []
    chunks = list(client(deployed).chat.completions.create(**options, stream=True))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert {delta.index for delta in deltas} == {0}
    assert [delta.id for delta in deltas if delta.id] == [deltas[0].id]
    assert [delta.function.name for delta in deltas if delta.function and delta.function.name] == ["add"]
    pieces = [delta.function.arguments or "" for delta in deltas if delta.function]
    assert "".join(pieces) == whole.function.arguments
    assert len(pieces) > 3, "they come as they are written"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_call_and_its_result_go_on_in_the_conversation(deployed: NodeProcess) -> None:
    first = client(deployed).chat.completions.create(**ask("hermes", tool_choice="required", parallel_tool_calls=False))
    message = first.choices[0].message
    (call,) = message.tool_calls or []
    messages = [
        {"role": "user", "content": "What is 47 + 35?"},
        message,
        {"role": "tool", "tool_call_id": call.id, "content": "82"},
    ]
    answer = client(deployed).chat.completions.create(**ask("hermes", messages=messages, max_tokens=5))
    without = client(deployed).chat.completions.create(**ask("hermes", max_tokens=5))
    assert answer.usage and without.usage
    assert answer.usage.prompt_tokens > without.usage.prompt_tokens + len("82")


def test_where_no_call_is_made_the_answer_is_content(deployed: NodeProcess) -> None:
    answer = client(deployed).chat.completions.create(**ask("hermes", max_tokens=12, temperature=0))
    assert answer.choices[0].message.tool_calls is None
    assert isinstance(answer.choices[0].message.content, str)
    plain = client(deployed).chat.completions.create(**ask("demo", tool_choice="none", temperature=0))
    assert plain.choices[0].message.content == "47 + 35 = 82"


def test_the_length_limit_cuts_a_call(deployed: NodeProcess) -> None:
    answer = client(deployed).chat.completions.create(**ask("hermes", tool_choice="required", max_tokens=3))
    assert answer.choices[0].finish_reason == "length"


NAMED = {"type": "function", "function": {"name": "absent"}}
PAST = [{"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("model", "options", "param", "reason"),
    [
        ("demo", {}, "tools", "chat template has none"),
        ("odd", {}, "tools", "not known here"),
        ("hermes", {"tools": []}, "tools", "length >= 1"),
        ("hermes", {"tools": TOOLS * 2}, "tools", "same name"),
        ("hermes", {"tools": None, "tool_choice": "auto"}, "tool_choice", "no tools"),
        ("hermes", {"tool_choice": "perhaps"}, "tool_choice", "perhaps"),
        ("hermes", {"tool_choice": NAMED}, "tool_choice", "absent"),
        ("hermes", {"response_format": {"type": "json_object"}}, "response_format", "no other form"),
        ("hermes", {"tool_choice": "required", "ignore_eos": True}, "ignore_eos", "ends where"),
        ("demo", {"tools": None, "messages": [{"role": "user"}]}, "messages[0].content", "required"),
        (
            "demo",
            {"tools": None, "messages": [{"role": "tool", "content": "x"}]},
            "messages[0].tool_call_id",
            "has one",
        ),
        (
            "demo",
            {"tools": None, "messages": [{"role": "user", "content": "x", "tool_calls": PAST}]},
            "messages[0].tool_calls",
            "assistant",
        ),
        ("demo", {"tools": None, "messages": [{"role": "assistant", "tool_calls": PAST}]}, "messages", "no tool calls"),
    ],
)
def test_what_can_not_be_offered_or_demanded_is_refused_by_name(
    deployed: NodeProcess, model: str, options: dict[str, Any], param: str, reason: str
) -> None:
    reply = deployed.request("POST", CHAT, ask(model, **options))
    error = reply.json()["error"]
    assert reply.status == 400
    assert error["param"] == param
    assert reason in error["message"]


def test_a_schema_that_can_not_be_compiled_is_refused_where_a_call_is_required(deployed: NodeProcess) -> None:
    for schema, param in (({"type": "banana"}, "tools"), ({"not": {}}, "tools[0].function.parameters")):
        tools = [{"type": "function", "function": {"name": "x", "parameters": schema, "strict": True}}]
        reply = deployed.request("POST", CHAT, ask("hermes", tools=tools, tool_choice="required"))
        assert reply.status == 400
        assert reply.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("template", "known"),
    [
        ("… <tool_call> …", HERMES),
        ("… [TOOL_CALLS] …", MISTRAL),
        ("… <|tool_call|> …", GRANITE),
        ('<|start_header_id|> … {"name": …, "parameters": …}', LLAMA),
        ("<tool_call><function=", None),
        ("[TOOL_CALLS]name[ARGS]", None),
        ("nothing", None),
    ],
)
def test_a_format_is_known_by_what_the_template_says(template: str, known: object) -> None:
    assert format_of(template) is known


def render(loaded: Any, *turns: ChatTurn, tools: str = "") -> tuple[object, str]:
    question = RenderChat(call=1, path="", turns=turns, tools=tools)
    form = check_template(loaded, question)
    shown = loaded.apply_chat_template(
        [as_dictionary(turn) for turn in turns], tools=json.loads(tools) if tools else None, tokenize=False
    )
    return form, shown


USER = ChatTurn(role="user", content="hi")
CALLING = ChatTurn(
    role="assistant", content="", tool_calls=(PastCall(id="1", name="now", arguments='{"zone": "UTC"}'),)
)
RESULT = ChatTurn(role="tool", content="12:00", tool_call_id="1")


@pytest.mark.skipif(not DATA.is_dir(), reason="there are no templates beside the repository")
def test_real_templates_have_tools_or_say_that_they_have_none() -> None:
    for name in ("chatml", "llama-3-instruct", "mistral-instruct", "qwen2.5-instruct"):
        loaded = AutoTokenizer.from_pretrained(DEMO, local_files_only=True)
        loaded.chat_template = (DATA / "chat_templates" / f"{name}.jinja").read_text()
        if name == "qwen2.5-instruct":
            form, shown = render(loaded, USER, CALLING, RESULT, tools=json.dumps(TOOLS))
            assert form is HERMES
            assert '{"name": "now", "arguments": {"zone": "UTC"}}' in shown
            assert "<tool_response>\n12:00" in shown
        else:
            with pytest.raises(InvalidRequest, match="has none"):
                render(loaded, USER, tools=json.dumps(TOOLS))
            with pytest.raises(InvalidRequest, match="no tool calls"):
                render(loaded, USER, CALLING)
    granite = AutoTokenizer.from_pretrained(
        DATA / "tokenizers" / "granite-3.1-1b-a400m-instruct", local_files_only=True
    )
    form, shown = render(granite, USER, tools=json.dumps(TOOLS))
    assert form is GRANITE
    assert '"name": "add"' in shown
    assert granite.convert_ids_to_tokens(marker_of(granite, GRANITE)) == "<|tool_call|>"
    assert marker_of(tokenizer(), HERMES) is None
