"""What clients may send, field by field, and how a refusal names the field.

OpenAI's API reference (chat completions, completions, embeddings) is the source of the names, bounds and defaults.
What OpenAI does not have (`top_k`, `min_p`, `repetition_penalty`, `stop_token_ids`, `min_tokens`, `ignore_eos`,
`continuous_usage_stats`, `priority`) has the names of vLLM; `keep_alive` has Ollama's.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec
from msgspec import Meta

from sllm_actor.domain import Backend, TierChoice
from sllm_actor.errors import InvalidRequest, UnsupportedField
from sllm_actor.frontend.response_format import ResponseFormat
from sllm_actor.frontend.tools import MAX_CALLS, MAX_TOOLS, AssistantCall, Tool, ToolChoice, check_tools
from sllm_actor.messages.text import ChatTurn, PastCall
from sllm_actor.units import parse_duration_s

MAX_STOPS = 4
MAX_STOP_TOKENS = 128
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
# Of one request: its prompts, and for each as many as `n` says.
MAX_CHOICES = 128
MAX_ECHO_CHARACTERS = 128
# Of one request for vectors, as OpenAI has it: texts, and tokens of all of them.
MAX_TEXTS = 2048
MAX_INSTANCES = 1000
MAX_KEEP_ALIVE_S = 31_536_000
MAX_TEXT_TOKENS = 300_000
# How long before a node is taken away that may be said.
NOTICE_S = (1.0, 3600.0)
T = TypeVar("T")

Name = Annotated[str, Meta(min_length=1, max_length=256)]
StopText = Annotated[str, Meta(min_length=1, max_length=256)]
TokenCount = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
TokenIdText = Annotated[str, Meta(pattern=r"^[0-9]{1,10}\Z")]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
# Seconds, or a duration as text; -1 and `forever` are for ever.
KeepAlive = Annotated[str, Meta(min_length=1, max_length=32)] | Annotated[float, Meta(ge=-1, le=MAX_KEEP_ALIVE_S)]


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: Annotated[list[AssistantCall], Meta(max_length=MAX_CALLS)] | None = None
    tool_call_id: Annotated[str, Meta(max_length=256)] | None = None
    # What OpenAI's own answers have, sent back to us.
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    def template_role(self) -> str:
        """Give the role as chat templates know it: OpenAI's newer name for a system message is known to none."""
        return "system" if self.role == "developer" else self.role

    def check(self, where: str) -> None:
        """Refuse what msgspec can't see.

        Raises:
            InvalidRequest: a field that this role needs, or does not have; `where` says whose.
        """
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise InvalidRequest(f"{where}.content: this field is required", param=f"{where}.content")
        if self.tool_calls is not None and self.role != "assistant":
            raise InvalidRequest(f"{where}.tool_calls: only an assistant calls tools", param=f"{where}.tool_calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise InvalidRequest(
                f"{where}.tool_call_id: a message of the role tool has one, and no other", param=f"{where}.tool_call_id"
            )

    def turn(self) -> ChatTurn:
        """Give the message as chat templates know it."""
        calls = [
            PastCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
            for call in self.tool_calls or ()
        ]
        return ChatTurn(
            role=self.template_role(),
            content=self.text(),
            name=self.name or "",
            tool_calls=tuple(calls),
            tool_call_id=self.tool_call_id or "",
        )

    def text(self) -> str:
        """Give the content as one string, whichever way it was written."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class _Common(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: Name
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: TokenCount | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[dict[TokenIdText, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_BIASES)] | None
    ) = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKENS)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    ignore_eos: bool = False
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    user: str | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0
    keep_alive: KeepAlive | None = None

    def wants_prompt_logprobs(self) -> bool:
        """Tell whether the prompt's tokens are to have log-probabilities, too."""
        return False

    def stops(self) -> list[str]:
        """Give the stop strings as a list."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def check(self) -> None:
        """Compare the fields with each other.

        Raises:
            InvalidRequest: two of them do not go together; `param` names one.
        """
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options: only a stream has them", param="stream_options")


class ChatRequest(_Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=4096)]
    max_completion_tokens: TokenCount | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Meta(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    logprobs: bool = False
    top_logprobs: TopLogprobs | None = None
    metadata: (
        Annotated[dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)]
        | None
    ) = None
    store: bool = False

    def wanted_logprobs(self) -> int | None:
        """Give how many of the likeliest tokens are asked for beside the drawn one; None where nothing is."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs: only where logprobs is true", param="top_logprobs")
        check_tools(self.tools, self.tool_choice)
        for at, message in enumerate(self.messages):
            message.check(f"messages[{at}]")
        if self.store:
            raise UnsupportedField("store: answers are not stored here", param="store")

    def limit(self) -> int | None:
        """Give the asked bound on the answer; the newer of the two names wins."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    prompt: str | Annotated[list[str | TokenId | Annotated[list[TokenId], Meta(min_length=1)]], Meta(min_length=1)]
    logprobs: TopLogprobs | None = None
    # With `echo` it may be 0: the prompt alone.
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    echo: bool = False
    response_format: ResponseFormat | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None

    def prompts(self) -> list[str | list[int]]:
        """Give the prompts, each as text or as token ids."""
        return _listed(self.prompt)

    def wanted_logprobs(self) -> int | None:
        """Give how many of the likeliest tokens are asked for beside the drawn one; None where nothing is."""
        return self.logprobs

    def check(self) -> None:
        super().check()
        _check_one_kind("prompt", self.prompt)
        if self.best_of not in (None, self.n):
            raise UnsupportedField("best_of: this version gives the n choices that it generates", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens: 0 is for a prompt that is echoed", param="max_tokens")
        prompts = len(self.prompts())
        if prompts * self.n > MAX_CHOICES:
            param = "n" if self.n > 1 else "prompt"
            raise InvalidRequest(
                f"{param}: {prompts} prompts with {self.n} choices each are more than {MAX_CHOICES}", param=param
            )

    def limit(self) -> int | None:
        """Give the asked bound on the answer; 16 where none is, as OpenAI has it."""
        return 16 if self.max_tokens is None else self.max_tokens

    def wants_prompt_logprobs(self) -> bool:
        return self.echo and self.logprobs is not None


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: Name
    input: (
        Annotated[str, Meta(min_length=1)]
        | Annotated[
            list[Annotated[str, Meta(min_length=1)] | TokenId | Annotated[list[TokenId], Meta(min_length=1)]],
            Meta(min_length=1),
        ]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    user: str | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0
    keep_alive: KeepAlive | None = None

    def texts(self) -> list[str | list[int]]:
        """Give the texts, each as it is or as token ids."""
        return _listed(self.input)

    def check(self) -> None:
        """Refuse what msgspec can't see.

        Raises:
            InvalidRequest: the input mixes kinds, or has too many texts.
        """
        _check_one_kind("input", self.input)
        if (texts := len(self.texts())) > MAX_TEXTS:
            raise InvalidRequest(f"input: {texts} texts are more than {MAX_TEXTS}", param="input")


def keep_alive_s(given: str | float | None) -> float | None:
    """Read a `keep_alive`: seconds, infinite for `forever` and what is negative; None where none is given.

    Raises:
        InvalidRequest: it is no duration, or one of more than a year.
    """
    if given is None:
        return None
    if isinstance(given, str):
        if given in ("forever", "-1"):
            return float("inf")
        try:
            given = parse_duration_s(given)
        except ValueError as error:
            raise InvalidRequest(f"keep_alive: {error}, or forever", param="keep_alive") from error
        if given > MAX_KEEP_ALIVE_S:
            raise InvalidRequest("keep_alive: more than a year is forever", param="keep_alive")
    return float("inf") if given < 0 else given


def _listed(given: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """Give texts as a list, each as it is or as token ids."""
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        return [[token for token in given if isinstance(token, int)]]
    return [text for text in given if not isinstance(text, int)]


def _check_one_kind(field: str, given: str | list[str | int | list[int]]) -> None:
    """Refuse a list that has both token ids and texts."""
    if isinstance(given, str):
        return
    kinds = [isinstance(item, int) for item in given]
    if True in kinds and False in kinds:
        odd = f"{field}[{kinds.index(not kinds[0])}]"
        raise InvalidRequest(f"{odd}: a list has either token ids or {field}s, not both", param=odd)


class DeployRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    source: str
    keep_alive: str | Annotated[float, Meta(ge=0)] | None = None
    replace: bool = False
    base: str = ""
    min_instances: Annotated[int, Meta(ge=0, le=MAX_INSTANCES)] = 0
    max_instances: Annotated[int, Meta(ge=1, le=MAX_INSTANCES)] | None = None
    target_concurrency: Annotated[int, Meta(ge=0, le=1024)] = 0
    backend: Backend = Backend.SLLM


class TierRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    tier: TierChoice = TierChoice.ALL


class MigrationRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    to: str = ""


_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
_AT = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`")


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
    known = _field_names(cast(Hashable, kind))
    # Asked before msgspec is: a client chooses these names, and may make them look like its messages.
    unknown = next((name for name in present if name not in known), None)
    if unknown is not None:
        param = unknown[:MAX_ECHO_CHARACTERS]
        raise UnsupportedField(f"{param}: this field is not supported", param=param)
    try:
        request = msgspec.convert(present, kind)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from error
    if isinstance(request, _Common | EmbeddingRequest):
        request.check()
    return request


@cache
def _field_names(kind: Hashable) -> frozenset[str]:
    # Kept, because msgspec evaluates every annotation of the class to list its fields: milliseconds.
    return frozenset(field.encode_name for field in msgspec.structs.fields(cast(type[msgspec.Struct], kind)))


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
