"""Chat completions whose answers may be tool calls, in the shapes that OpenAI's clients read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from sllm_actor.domain import FinishReason, RequestId
from sllm_actor.frontend.answer import Wish
from sllm_actor.frontend.shapes import ChatShape, WholeChoice
from sllm_actor.frontend.tool_formats import ToolFormat
from sllm_actor.frontend.tool_parser import CallBegins, Content, Event, ToolParser
from sllm_actor.frontend.written import Entry

# As Mistral's template demands them; others take any.
ID_CHARACTERS = 9
_ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


class _Reader:
    """One choice's parser. Where calls may not be `parallel`, those behind the first are left out."""

    def __init__(
        self, form: ToolFormat, names: Collection[str], call_id: Callable[[int], str], *, parallel: bool
    ) -> None:
        self._call_id = call_id
        self.parser = ToolParser(form, names)
        self._parallel = parallel
        self._told = 0
        self._leaves_out = False

    def delta(self, events: Sequence[Event]) -> dict[str, Any]:
        """Give the part of a message that these events bring."""
        delta: dict[str, Any] = {}
        for event in events:
            if isinstance(event, Content):
                delta["content"] = delta.get("content", "") + event.text
                continue
            calls = delta.setdefault("tool_calls", [])
            if isinstance(event, CallBegins):
                self._leaves_out = bool(self._told) and not self._parallel
                if not self._leaves_out:
                    calls.append(_new_call(self._told, self._call_id(self._told), event.name))
                    self._told += 1
            elif not self._leaves_out:
                if not calls or calls[-1]["index"] != self._told - 1:
                    calls.append({"index": self._told - 1, "function": {"arguments": ""}})
                calls[-1]["function"]["arguments"] += event.text
        if not delta.get("tool_calls", True):
            del delta["tool_calls"]
        return delta

    def finish(self, reason: str) -> str:
        return "tool_calls" if self._told and reason == FinishReason.STOP else reason


def call_id(stream_id: str, choice: int, call: int) -> str:
    """Name a call: as none of another stream is named, and the same whenever this one is told again."""
    number = int.from_bytes(hashlib.sha256(f"{stream_id} {choice} {call}".encode()).digest())
    return "".join(_ALPHABET[number // len(_ALPHABET) ** place % len(_ALPHABET)] for place in range(ID_CHARACTERS))


def _new_call(index: int, call_id: str, name: str) -> dict[str, Any]:
    return {"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}


class ToolShape(ChatShape):
    """Chat completions on the wire, with calls told apart from content."""

    def __init__(
        self,
        wish: Wish,
        created_wall_s: float,
        answer_id: RequestId,
        stream_id: str,
        form: ToolFormat,
        names: Collection[str],
        *,
        n: int,
        parallel: bool,
    ) -> None:
        super().__init__(wish, created_wall_s, answer_id)
        self._readers = [
            _Reader(form, names, partial(call_id, stream_id, choice), parallel=parallel) for choice in range(n)
        ]

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        return self._chunk(index, {"role": "assistant", "content": None}, None)

    def chunk(self, index: int, text: str, entries: Sequence[Entry]) -> dict[str, Any] | None:
        reader = self._readers[index]
        delta = reader.delta(reader.parser.push(text))
        return self._chunk(index, delta, None, self._logprobs(entries)) if delta or entries else None

    def last_chunk(self, index: int, finish: str) -> dict[str, Any]:
        reader = self._readers[index]
        delta = reader.delta(reader.parser.flush())
        return self._chunk(index, delta, reader.finish(finish))

    def whole(self, choices: Sequence[WholeChoice], usage: dict[str, object]) -> dict[str, Any]:
        shown = super().whole(choices, usage)
        for choice, entry in zip(choices, shown["choices"], strict=True):
            reader = self._readers[choice.number]
            delta = reader.delta(reader.parser.push(choice.text) + reader.parser.flush())
            entry["message"]["content"] = delta.get("content")
            if "tool_calls" in delta:
                calls = [{key: value for key, value in call.items() if key != "index"} for call in delta["tool_calls"]]
                entry["message"]["tool_calls"] = calls
            elif entry["message"]["content"] is None:
                entry["message"]["content"] = ""
            entry["finish_reason"] = reader.finish(choice.finish)
        return shown
