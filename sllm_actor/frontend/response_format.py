"""`response_format`: what a client says of an answer's form, and what of it a grammar can hold. Pure.

OpenAI's API reference (structured outputs) is the source of the names; JSON Schema 2020-12 of the keywords.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from sllm_actor.errors import InvalidRequest
from sllm_actor.messages.grammar import GrammarForm

MAX_SOURCE_BYTES = 1024 * 1024
MAX_DEPTH = 128
ANY_OBJECT = b'{"type":"object"}'

# Keywords that say nothing of the answer.
_SILENT = {
    "$schema", "$id", "$comment", "$anchor", "title", "description", "default", "examples", "deprecated", "readOnly",
    "writeOnly",
}  # fmt: skip
# Keywords that the grammar holds. Of others (`not`, `if`, `multipleOf`, `uniqueItems` …) it would take no notice.
_HELD = {
    "$ref", "$defs", "definitions", "type", "enum", "const", "anyOf", "properties", "required", "additionalProperties",
    "items", "prefixItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "minimum", "maximum",
    "exclusiveMinimum", "exclusiveMaximum", "minProperties", "maxProperties",
}  # fmt: skip
_MAPS = ("properties", "$defs", "definitions")
_LISTS = ("anyOf", "prefixItems")
_SINGLE = ("items", "additionalProperties")
# What xgrammar reads of a pattern as something else than ECMA-262 does.
_UNHELD_IN_PATTERNS = ("(?", "\\b", "\\B", "\\p", "\\P", "\\k")
# Characters that JSON writes as escapes: as a letter of a pattern they would come as they are. In a class they don't.
_ESCAPED_IN_JSON = re.compile(r'"|\\[\\nrtfv0xuc]')
_CLASS = re.compile(r"\[(?:\\.|[^\]\\])*\]")


class Plain(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """Text, as without a format."""


class JsonObject(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class NamedSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema: dict[str, Any] = {}
    description: str | None = None
    strict: bool | None = None


class JsonSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    """JSON that a schema describes."""

    json_schema: NamedSchema


ResponseFormat = Plain | JsonObject | JsonSchema


class Source(NamedTuple):
    """A grammar to be compiled, and the field that it came in."""

    form: GrammarForm
    text: str
    param: str


def source_of(wanted: ResponseFormat | None) -> Source | None:
    """Say what grammar holds an answer to this format; None where any text will do.

    Raises:
        InvalidRequest: the schema is too long or too deep; or it is to be held strictly, and has a keyword that no
            grammar holds.
    """
    if wanted is None or isinstance(wanted, Plain):
        return None
    if isinstance(wanted, JsonObject):
        return Source(GrammarForm.JSON_SCHEMA, ANY_OBJECT.decode(), "response_format")
    named, param = wanted.json_schema, "response_format.json_schema.schema"
    return Source(GrammarForm.JSON_SCHEMA, check_schema(named.schema, strict=bool(named.strict), param=param), param)


def check_schema(schema: dict[str, Any], *, strict: bool, param: str) -> str:
    """Write a schema as JSON, once it is known to be within bounds and, where it is `strict`, one that can be held.

    Raises:
        InvalidRequest: it is not; the message names the place in it.
    """
    if _depth(schema) > MAX_DEPTH:
        raise InvalidRequest(f"{param}: it nests deeper than {MAX_DEPTH}", param=param)
    text = msgspec.json.encode(schema)
    if len(text) > MAX_SOURCE_BYTES:
        raise InvalidRequest(f"{param}: it has {len(text)} bytes, at most {MAX_SOURCE_BYTES} are taken", param=param)
    for where, keyword, wrong in _unheld(schema, "$"):
        if wrong:
            raise InvalidRequest(f"{param}: {keyword} at {where[:200]} can't be held", param=param)
        if strict:
            raise InvalidRequest(
                f"{param}: {keyword} at {where[:200]} can't be held strictly; leave it out, or set strict to false",
                param=param,
            )
    return text.decode()


def _depth(value: Any) -> int:
    """Measure how deep a JSON value nests, without nesting itself; counted no further than needed."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        depth += 1
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
    return depth


def _unheld(schema: Any, where: str) -> Iterator[tuple[str, str, bool]]:
    """Give the place and name of each keyword that no grammar holds; true where the JSON itself would be spoilt."""
    if not isinstance(schema, dict):
        return
    for keyword, value in schema.items():
        if keyword not in _HELD and keyword not in _SILENT:
            yield where, keyword[:64], False
        elif keyword == "pattern" and isinstance(value, str):
            if _ESCAPED_IN_JSON.search(_CLASS.sub("", value)):
                yield where, f"the pattern {value[:64]}, with characters that JSON escapes,", True
            if any(sign in value for sign in _UNHELD_IN_PATTERNS):
                yield where, f"the pattern {value[:64]}", False
        elif keyword in ("minLength", "maxLength") and "pattern" in schema:
            yield where, f"{keyword} beside a pattern", False
        elif keyword in _MAPS and isinstance(value, dict):
            for name, part in value.items():
                yield from _unheld(part, f"{where}.{keyword}.{name}")
        elif keyword in _LISTS and isinstance(value, list):
            for at, part in enumerate(value):
                yield from _unheld(part, f"{where}.{keyword}[{at}]")
        elif keyword in _SINGLE:
            yield from _unheld(value, f"{where}.{keyword}")
