"""What clients may send, field by field, and how a refusal names the field.

OpenAI's API reference (chat completions, completions) is the source of the names and defaults.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec
from msgspec import Meta

from sllm_actor.domain import TierChoice
from sllm_actor.errors import InvalidRequest, UnsupportedField

MAX_STOPS = 4
MAX_ECHO_CHARACTERS = 128
T = TypeVar("T")

Name = Annotated[str, Meta(min_length=1, max_length=256)]
StopText = Annotated[str, Meta(min_length=1, max_length=256)]
TokenCount = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def template_role(self) -> str:
        """Give the role as chat templates know it: OpenAI's newer name for a system message is known to none."""
        return "system" if self.role == "developer" else self.role

    def text(self) -> str:
        """Give the content as one string, whichever way it was written."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool = False


class _Common(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: Name
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: TokenCount | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=MAX_STOPS)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] = 1
    user: str | None = None
    ignore_eos: bool = False
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0

    def stops(self) -> list[str]:
        """Give the stop strings as a list."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop


class ChatRequest(_Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=4096)]
    max_completion_tokens: TokenCount | None = None

    def limit(self) -> int | None:
        """Give the asked bound on the answer; the newer of the two names wins."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    prompt: str | Annotated[list[Annotated[int, Meta(ge=0, lt=2**31)]], Meta(min_length=1)]

    def limit(self) -> int | None:
        """Give the asked bound on the answer; 16 where none is, as OpenAI has it."""
        return self.max_tokens or 16


class DeployRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    source: str
    keep_alive: str | Annotated[float, Meta(ge=0)] | None = None
    replace: bool = False


class TierRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    tier: TierChoice = TierChoice.ALL


class MigrationRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    to: str


_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
_AT = re.compile(r" - at `\$\.?([^`]*)`")


def parse(body: bytes, kind: type[T]) -> T:
    """Read a JSON body as `kind`. A field that is null counts as absent.

    Raises:
        UnsupportedField: a field that is not known here; `param` names it.
        InvalidRequest: not JSON, no object, or a field of a wrong type or out of bounds; `param` names it.
    """
    try:
        decoded: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    if not isinstance(decoded, dict):
        raise InvalidRequest("the body is not a JSON object")
    present = {name: value for name, value in decoded.items() if value is not None}
    known = {field.encode_name for field in msgspec.structs.fields(cast(type[msgspec.Struct], kind))}
    # Asked before msgspec is: a client chooses these names, and may make them look like its messages.
    unknown = next((name for name in present if name not in known), None)
    if unknown is not None:
        param = unknown[:MAX_ECHO_CHARACTERS]
        raise UnsupportedField(f"{param}: this field is not supported", param=param)
    try:
        request = msgspec.convert(present, kind)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from error
    if getattr(request, "n", 1) != 1:
        raise UnsupportedField("n: this version gives one choice per request", param="n")
    return request


def _refusal(text: str) -> InvalidRequest:
    at = _AT.search(text)
    where = at.group(1) if at else ""
    unknown = _UNKNOWN.search(text)
    if unknown:
        param = f"{where}.{unknown.group(1)}" if where else unknown.group(1)
        return UnsupportedField(f"{param}: this field is not supported", param=param)
    missing = re.search(r"missing required field `([^`]*)`", text)
    if missing:
        param = f"{where}.{missing.group(1)}" if where else missing.group(1)
        return InvalidRequest(f"{param}: this field is required", param=param)
    reason = _AT.sub("", text)
    return InvalidRequest(f"{where}: {reason}" if where else reason, param=where or None)
