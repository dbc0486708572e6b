"""How models write tool calls: the formats of the families whose chat templates have tools. Pure.

Sources: the chat templates of Qwen2.5 and Hermes, Llama 3.1, Mistral (v3) and Granite 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec


class ToolFormat(NamedTuple):
    """One way to write calls: `begin`, JSON objects with `name` and `arguments`, `end`.

    `listed` ones stand in brackets with commas between; others have `begin` and `end` around each. One without a
    `begin` is a whole answer that begins with a brace.
    """

    name: str
    begin: str
    end: str
    arguments: str
    listed: bool


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>", "arguments", listed=False)
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", "", "arguments", listed=True)
GRANITE = ToolFormat("granite", "<|tool_call|>", "", "arguments", listed=True)
LLAMA = ToolFormat("llama", "", "", "parameters", listed=False)
FORMATS = {known.name: known for known in (HERMES, MISTRAL, GRANITE, LLAMA)}


def format_of(template: str) -> ToolFormat | None:
    """Say how a model writes calls, by what its chat template tells it; None where that is not known here."""
    if "<function=" in template or "[ARGS]" in template:
        return None
    for known in (GRANITE, MISTRAL, HERMES):
        if known.begin in template:
            return known
    if "<|start_header_id|>" in template and '"parameters"' in template:
        return LLAMA
    return None


def structural_tag(
    form: ToolFormat, tools: Sequence[tuple[str, dict[str, Any]]], begin_token: int | None, *, parallel: bool
) -> str:
    """Write, as xgrammar's structural tag, an answer that is one call or, where they may be `parallel`, several.

    `tools` has each one's name and the schema of its arguments; `begin_token` is the special token that `begin` is.
    """
    calls = [
        {
            "type": "sequence",
            "elements": [
                {"type": "const_string", "value": f'{{"name": {_quoted(name)}, "{form.arguments}": '},
                {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": 1},
                {"type": "const_string", "value": "}"},
            ],
        }
        for name, schema in tools
    ]
    call: dict[str, Any] = calls[0] if len(calls) == 1 else {"type": "or", "elements": calls}
    begin = [_begin(form, begin_token)] if form.begin else []
    if form.listed:
        more = [{"type": "star", "content": _sequence([_text(", "), call])}] if parallel else []
        whole = _sequence([*begin, _text("["), call, *more, _text("]")])
    elif form.begin:
        one = _sequence([*begin, call, _text(form.end)])
        whole = {"type": "plus", "content": one} if parallel else one
    else:
        more = [{"type": "star", "content": _sequence([_text("; "), call])}] if parallel else []
        whole = _sequence([call, *more])
    return msgspec.json.encode({"type": "structural_tag", "format": whole}).decode()


def _begin(form: ToolFormat, token: int | None) -> dict[str, Any]:
    return _text(form.begin) if token is None else {"type": "token", "token": token}


def _text(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


def _sequence(elements: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "sequence", "elements": list(elements)}


def _quoted(name: str) -> str:
    return msgspec.json.encode(name).decode()
