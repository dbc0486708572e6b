"""Answers in the shapes that OpenAI's clients read: chat completions and completions, whole or in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sllm_actor.domain import RequestId
from sllm_actor.frontend.answer import Wish
from sllm_actor.frontend.written import Entry

# What OpenAI says where the logarithm is that of nothing; JSON has no infinity.
NO_PROBABILITY = -9999.0


class WholeChoice(NamedTuple):
    """One choice, finished."""

    number: int
    text: str
    finish: str
    entries: Sequence[Entry]


class ChatShape:
    """Chat completions on the wire."""

    def __init__(self, wish: Wish, created_wall_s: float, answer_id: RequestId) -> None:
        self._base = {
            "id": f"chatcmpl-{answer_id}",
            "created": int(created_wall_s),
            "model": wish.model.name,
        }
        self._with_logprobs = wish.sampling.top_logprobs is not None

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        return self._chunk(index, {"role": "assistant", "content": ""}, None)

    def chunk(self, index: int, text: str, entries: Sequence[Entry]) -> dict[str, Any] | None:
        return self._chunk(index, {"content": text}, None, self._logprobs(entries))

    def last_chunk(self, index: int, finish: str) -> dict[str, Any]:
        return self._chunk(index, {}, finish)

    def _chunk(self, index: int, delta: dict[str, Any], finish: str | None, logprobs: Any = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._base | {"object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, usage: dict[str, object]) -> dict[str, Any]:
        return self._base | {"object": "chat.completion.chunk", "choices": [], "usage": usage}

    def whole(self, choices: Sequence[WholeChoice], usage: dict[str, object]) -> dict[str, Any]:
        shown = [
            {
                "index": choice.number,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice.entries),
                "finish_reason": choice.finish,
            }
            for choice in choices
        ]
        return self._base | {"object": "chat.completion", "choices": shown, "usage": usage}

    def _logprobs(self, entries: Sequence[Entry]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        content = [
            _chat_token(entry.piece, entry.logprob)
            | {"top_logprobs": [_chat_token(piece, logprob) for piece, logprob in entry.top]}
            for entry in entries
        ]
        return {"content": content, "refusal": None}


class CompletionShape:
    """Completions on the wire. `echoes` has the prompt's text for each choice, empty where it is not asked for."""

    def __init__(self, wish: Wish, created_wall_s: float, answer_id: RequestId, echoes: Sequence[str]) -> None:
        self._base = {
            "id": f"cmpl-{answer_id}",
            "object": "text_completion",
            "created": int(created_wall_s),
            "model": wish.model.name,
        }
        self._with_logprobs = wish.sampling.top_logprobs is not None
        self._echoes = echoes
        # How many characters the tokens have begun that were sent so far.
        self._offsets = [0] * len(echoes)

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        return self._chunk(index, self._echoes[index], None) if self._echoes[index] else None

    def chunk(self, index: int, text: str, entries: Sequence[Entry]) -> dict[str, Any]:
        return self._chunk(index, text, None, self._logprobs(index, entries))

    def last_chunk(self, index: int, finish: str) -> dict[str, Any]:
        return self._chunk(index, "", finish)

    def _chunk(self, index: int, text: str, finish: str | None, logprobs: Any = None) -> dict[str, Any]:
        return self._base | {"choices": [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}]}

    def usage_chunk(self, usage: dict[str, object]) -> dict[str, Any]:
        return self._base | {"choices": [], "usage": usage}

    def whole(self, choices: Sequence[WholeChoice], usage: dict[str, object]) -> dict[str, Any]:
        shown = [
            {
                "index": choice.number,
                "text": self._echoes[choice.number] + choice.text,
                "logprobs": self._logprobs(choice.number, choice.entries),
                "finish_reason": choice.finish,
            }
            for choice in choices
        ]
        return self._base | {"choices": shown, "usage": usage}

    def _logprobs(self, index: int, entries: Sequence[Entry]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        offsets = []
        for entry in entries:
            offsets.append(self._offsets[index])
            self._offsets[index] += _characters_begun(entry.piece)
        return {
            "tokens": [_plain_token(entry.piece) for entry in entries],
            "token_logprobs": [_finite(entry.logprob) for entry in entries],
            "top_logprobs": [_plain_top(entry) for entry in entries],
            "text_offset": offsets,
        }


Shape = ChatShape | CompletionShape


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, NO_PROBABILITY)


def _chat_token(piece: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": _text_or_bytes(piece, ""), "logprob": _finite(logprob), "bytes": list(piece)}


def _plain_token(piece: bytes) -> str:
    return _text_or_bytes(piece, "bytes:")


def _plain_top(entry: Entry) -> dict[str, float | None] | None:
    """Name the likeliest tokens, and the drawn one if it is none of them; of two of one text the likelier counts."""
    if entry.logprob is None:
        return None
    top: dict[str, float | None] = {}
    for piece, logprob in (*entry.top, (entry.piece, entry.logprob)):
        top.setdefault(_plain_token(piece), _finite(logprob))
    return top


def _text_or_bytes(piece: bytes, mark: str) -> str:
    """Write a token's text, or as OpenAI does its bytes where it is no whole number of characters."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return mark + "".join(f"\\x{byte:02x}" for byte in piece)


def _characters_begun(piece: bytes) -> int:
    return sum(byte & 0xC0 != 0x80 for byte in piece)
