"""Tool calls in answers: found however the text is cut, told as they come, and content where they are none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_answers import compiled, decode, draw_answer

from sllm_actor.frontend.tool_formats import FORMATS, GRANITE, HERMES, LLAMA, MISTRAL, ToolFormat, structural_tag
from sllm_actor.frontend.tool_parser import Arguments, CallBegins, Content, Event, ToolParser
from sllm_actor.messages.grammar import GrammarForm

NAMES = ["add", "now"]
CALL = '{"name": "add", "arguments": {"a": [1, "}]"], "b": {"c": "\\"x"}}}'
ARGUMENTS = '{"a": [1, "}]"], "b": {"c": "\\"x"}}'
LLAMA_CALL = CALL.replace('"arguments"', '"parameters"')


def read(form: ToolFormat, pieces: Sequence[str]) -> tuple[str, list[tuple[str, str]]]:
    """Give the content and the calls of an answer."""
    parser = ToolParser(form, NAMES)
    content, calls = "", list[tuple[str, str]]()
    events: list[Event] = [event for piece in pieces for event in parser.push(piece)] + parser.flush()
    for event in events:
        if isinstance(event, Content):
            content += event.text
        elif isinstance(event, CallBegins):
            calls.append((event.name, ""))
        else:
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    assert parser.calls == len(calls)
    return content, calls


ANSWERS: list[tuple[ToolFormat, str, str, list[tuple[str, str]]]] = [
    (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", [("add", ARGUMENTS)]),
    (HERMES, f"Let me see.\n<tool_call>{CALL}</tool_call>", "Let me see.", [("add", ARGUMENTS)]),
    (HERMES, f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "", [("add", ARGUMENTS)] * 2),
    (HERMES, f"<tool_call>{CALL}</tool_call> Done.", " Done.", [("add", ARGUMENTS)]),
    (HERMES, f"<tool_call>\n{CALL}", "", [("add", ARGUMENTS)]),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "", [("add", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "now"}</tool_call>', "", [("now", "{}")]),
    (HERMES, '<tool_call>{"name": "x", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("x", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "now", "arguments": {a: nonsense}}</tool_call>', "", [("now", "{a: nonsense}")]),
    (HERMES, '<tool_call>{"name": "now", "arguments": {"a": 1', "", [("now", '{"a": 1')]),
    (HERMES, '<tool_call>{"name": 5, "arguments": {}}', '<tool_call>{"name": 5, "arguments": {}}', []),
    (HERMES, "a < b and <tool", "a < b and <tool", []),
    (HERMES, "<tool_call>no call</tool_call>", "<tool_call>no call</tool_call>", []),
    (HERMES, '<tool_call>{"nam', '<tool_call>{"nam', []),
    (HERMES, CALL, CALL, []),
    (HERMES, "", "", []),
    (MISTRAL, f"[TOOL_CALLS][{CALL}, {CALL}]", "", [("add", ARGUMENTS)] * 2),
    (MISTRAL, f"[TOOL_CALLS] [{CALL}]", "", [("add", ARGUMENTS)]),
    (MISTRAL, "[1, 2] and [TOOL_CALL", "[1, 2] and [TOOL_CALL", []),
    (GRANITE, f"<|tool_call|>[{CALL}]", "", [("add", ARGUMENTS)]),
    (LLAMA, LLAMA_CALL, "", [("add", ARGUMENTS)]),
    (LLAMA, f" {LLAMA_CALL}; {LLAMA_CALL}", "", [("add", ARGUMENTS)] * 2),
    (LLAMA, '{"name": "Ada", "parameters": {}}', '{"name": "Ada", "parameters": {}}', []),
    (LLAMA, '{"age": 36}', '{"age": 36}', []),
    (LLAMA, f"No. {LLAMA_CALL}", f"No. {LLAMA_CALL}", []),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), ANSWERS)
def test_calls_and_content_are_told_apart_however_the_text_is_cut(
    form: ToolFormat, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    assert read(form, [text]) == (content, calls)
    assert read(form, list(text)) == (content, calls)


@given(st.sampled_from(list(FORMATS.values())), st.text(alphabet='<>{}[]",:;tool_caTOL/nme |\\\n') | st.text())
def test_whatever_comes_is_told_the_same_in_one_piece_and_in_many(form: ToolFormat, text: str) -> None:
    assert read(form, [text]) == read(form, list(text))


def test_arguments_are_told_as_they_come() -> None:
    parser = ToolParser(HERMES, NAMES)
    assert parser.push('<tool_call>{"name": "add", ') == []
    assert parser.push('"arguments": {"a"') == [CallBegins("add"), Arguments('{"a"')]
    assert parser.push(": 1") == [Arguments(": 1")]
    assert parser.push("}}") == [Arguments("}")]
    assert parser.push("</tool_call>") == parser.flush() == []


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("form", list(FORMATS.values()), ids=list(FORMATS))
def test_what_the_grammar_of_a_format_allows_is_read_as_calls(form: ToolFormat, parallel: bool) -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    tools = [("add", schema), ("now", {"type": "object"})]
    grammar = compiled(structural_tag(form, tools, None, parallel=parallel), GrammarForm.STRUCTURAL_TAG)
    for seed in range(4):
        content, calls = read(form, [decode(draw_answer(grammar, seed))])
        assert content == ""
        assert calls and (parallel or len(calls) == 1)
        for name, arguments in calls:
            value = json.loads(arguments)
            assert isinstance(value["a"], int) if name == "add" else name == "now"
