"""`tools` and `tool_choice`: what a client offers a model to call, and whether it must. Pure.

OpenAI's API reference (function calling) is the source of the names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from sllm_actor.errors import InvalidRequest
from sllm_actor.frontend.response_format import MAX_SOURCE_BYTES, Source, check_schema
from sllm_actor.frontend.tool_formats import FORMATS, structural_tag
from sllm_actor.messages.grammar import GrammarForm

MAX_TOOLS = 128
MAX_CALLS = 128
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}\Z")]


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["function"]
    function: Function


class FunctionChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: FunctionName


class NamedTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["function"]
    function: FunctionChoice


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class AssistantFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: FunctionName
    arguments: str


class AssistantCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call in the conversation so far."""

    id: Annotated[str, Meta(min_length=1, max_length=256)]
    type: Literal["function"]
    function: AssistantFunction


def check_tools(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> None:
    """Compare the tools with each other and with the choice.

    Raises:
        InvalidRequest: two of one name, or a choice of one that there is not.
    """
    names = [tool.function.name for tool in tools or ()]
    if len(set(names)) < len(names):
        raise InvalidRequest("tools: two of them have the same name", param="tools")
    if choice not in (None, "none") and not tools:
        raise InvalidRequest("tool_choice: there are no tools to choose from", param="tool_choice")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise InvalidRequest(f"tool_choice: there is no tool {choice.function.name}", param="tool_choice")


def written_tools(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> str:
    """Write the tools for the chat template; empty where none may be called.

    Raises:
        InvalidRequest: they are too long, or a schema in them nests too deep.
    """
    if not tools or choice == "none":
        return ""
    for at, tool in enumerate(tools):
        check_schema(tool.function.parameters or {}, strict=False, param=f"tools[{at}].function.parameters")
    listed = [
        {
            "type": "function",
            "function": {
                "name": tool.function.name,
                "description": tool.function.description or "",
                "parameters": tool.function.parameters or NO_PARAMETERS,
            },
        }
        for tool in tools
    ]
    text = msgspec.json.encode(listed)
    if len(text) > MAX_SOURCE_BYTES:
        raise InvalidRequest(f"tools: they have {len(text)} bytes, at most {MAX_SOURCE_BYTES} are taken", param="tools")
    return text.decode()


def source_of_calls(
    tools: Sequence[Tool] | None, choice: ToolChoice | None, tool_format: str, marker: int | None, *, parallel: bool
) -> Source | None:
    """Say what grammar holds an answer to calls; None where it may be anything.

    Raises:
        InvalidRequest: a tool is to be held strictly, and its schema has a keyword that no grammar holds.
    """
    if not tools or not (choice == "required" or isinstance(choice, NamedTool)):
        return None
    callable_tools: list[tuple[str, dict[str, Any]]] = []
    for at, tool in enumerate(tools):
        if isinstance(choice, NamedTool) and tool.function.name != choice.function.name:
            continue
        schema = tool.function.parameters or NO_PARAMETERS
        check_schema(schema, strict=bool(tool.function.strict), param=f"tools[{at}].function.parameters")
        callable_tools.append((tool.function.name, schema))
    text = structural_tag(FORMATS[tool_format], callable_tools, marker, parallel=parallel)
    return Source(GrammarForm.STRUCTURAL_TAG, text, "tools")
