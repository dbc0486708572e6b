"""Tools and a model's chat template: whether it has any, and how it wants a conversation that has used some."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from sllm_actor.errors import InvalidRequest
from sllm_actor.frontend.tool_formats import FORMATS, ToolFormat, format_of
from sllm_actor.messages.text import ChatTurn, RenderChat


def check_template(tokenizer: PreTrainedTokenizerBase, question: RenderChat) -> ToolFormat | None:
    """Say how the model writes calls, where it is offered tools.

    Raises:
        InvalidRequest: the template has no place for tools, calls or their results, or writes them in an unknown way.
    """
    template = _template(tokenizer, bool(question.tools))
    if any(turn.tool_calls for turn in question.turns) and "tool_calls" not in template:
        raise InvalidRequest("messages: the model's chat template has no tool calls", param="messages")
    if any(turn.role == "tool" for turn in question.turns) and "tool" not in template:
        raise InvalidRequest("messages: the model's chat template has no results of tools", param="messages")
    if not question.tools:
        return None
    if "tools" not in template:
        raise InvalidRequest("tools: the model's chat template has none", param="tools")
    form = format_of(template)
    if form is None:
        known = ", ".join(sorted(FORMATS))
        raise InvalidRequest(
            f"tools: the model calls them in a format that is not known here; known are {known}", param="tools"
        )
    return form


def _template(tokenizer: PreTrainedTokenizerBase, with_tools: bool) -> str:
    try:
        template: str = tokenizer.get_chat_template(tools=[{}] if with_tools else None)
    except ValueError as error:
        raise InvalidRequest(f"the model has no chat template that can be used: {error}") from error
    return template


def marker_of(tokenizer: PreTrainedTokenizerBase, form: ToolFormat) -> int | None:
    """Give the special token that calls begin with; None where that is text like other text."""
    if not form.begin:
        return None
    token = tokenizer.convert_tokens_to_ids(form.begin)
    added = tokenizer.added_tokens_decoder.get(token)
    return token if added is not None and added.special and added.content == form.begin else None


def as_dictionary(turn: ChatTurn) -> dict[str, Any]:
    """Give a turn as templates take it."""
    shown: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.name:
        shown["name"] = turn.name
    if turn.tool_call_id:
        shown["tool_call_id"] = turn.tool_call_id
    if turn.tool_calls:
        shown["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call.arguments)},
            }
            for call in turn.tool_calls
        ]
    return shown


def _arguments(text: str) -> Any:
    """Templates write the arguments as JSON; what is none stays as the model wrote it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
