"""A process that turns prompts into token ids and token ids into text.

Templates and tokenizers come with models, hold the interpreter for long and may loop for ever; in a
process of their own they block no event loop and can be killed.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sllm_actor.domain.tokens import pack_uint32, unpack_uint32
from sllm_actor.errors import InvalidRequest, SllmError, TokenizerInvalid
from sllm_actor.frontend.token_bytes import TokenBytes
from sllm_actor.frontend.tool_templates import as_dictionary, check_template, marker_of
from sllm_actor.messages.text import (
    DescribeTokens,
    Detokenize,
    Detokenized,
    Encoded,
    EncodeText,
    LoadTokenizer,
    RenderChat,
    TextFailed,
    TokenizerLoaded,
    TokensDescribed,
)
from sllm_actor.runtime.blocking import BlockingChannel

MAX_TOKENIZERS = 64
TORN = "\ufffd"


class TextProcess:
    """Owns the tokenizers of this process, the most recently used of them."""

    def __init__(self, channel: BlockingChannel) -> None:
        self._channel = channel
        self._tokenizers: OrderedDict[str, PreTrainedTokenizerBase] = OrderedDict()
        self._described: dict[str, TokenBytes] = {}

    def run(self) -> int:
        """Answer questions until left alone; the result is the exit status."""
        try:
            while True:
                question = self._channel.receive(wait=True)
                assert question is not None, "a receive that waits gives a message or raises"
                try:
                    answer = self._answer(question)
                except SllmError as error:
                    answer = TextFailed(
                        call=question.call, code=error.code, text=error.message, param=error.param or ""
                    )
                self._channel.send(answer)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return 0

    def _answer(self, question: Any) -> object:
        if isinstance(question, LoadTokenizer):
            # Asked for when a model is deployed: its files may be others than those of the last time.
            self._forget(question.path)
        tokenizer = self._tokenizer(question.path)
        if isinstance(question, Detokenize):
            return _detokenize(tokenizer, question)
        if isinstance(question, DescribeTokens):
            token_bytes = self._token_bytes(question.path, tokenizer)
            pieces = tuple(token_bytes.of(token_id) for token_id in unpack_uint32(question.token_ids))
            return TokensDescribed(call=question.call, pieces=pieces)
        if isinstance(question, EncodeText):
            return Encoded(call=question.call, token_ids=pack_uint32(tokenizer.encode(question.text)))
        if isinstance(question, RenderChat):
            return _render(tokenizer, question)
        assert isinstance(question, LoadTokenizer)
        return TokenizerLoaded(call=question.call, vocabulary_tokens=len(tokenizer), chat=_has_chat(tokenizer))

    def _tokenizer(self, path: str) -> PreTrainedTokenizerBase:
        if path not in self._tokenizers:
            self._tokenizers[path] = _load(path)
            while len(self._tokenizers) > MAX_TOKENIZERS:
                self._forget(next(iter(self._tokenizers)))
        self._tokenizers.move_to_end(path)
        return self._tokenizers[path]

    def _token_bytes(self, path: str, tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
        if path not in self._described:
            self._described[path] = TokenBytes(tokenizer)
        return self._described[path]

    def _forget(self, path: str) -> None:
        self._tokenizers.pop(path, None)
        self._described.pop(path, None)


def _load(path: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # Whatever a tokenizer's files make the library raise, they are at fault.
        raise TokenizerInvalid(f"{path} has no tokenizer that can be used: {error}") from error
    return tokenizer


def _has_chat(tokenizer: PreTrainedTokenizerBase) -> bool:
    if not tokenizer.chat_template:
        return False
    try:
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # The template is a program that came with the model.
        raise TokenizerInvalid(f"the chat template does not render: {error}") from error
    return True


def _render(tokenizer: PreTrainedTokenizerBase, question: RenderChat) -> Encoded:
    form = check_template(tokenizer, question)
    tools = json.loads(question.tools) if question.tools else None
    turns = [as_dictionary(turn) for turn in question.turns]
    try:
        text = tokenizer.apply_chat_template(turns, tools=tools, add_generation_prompt=True, tokenize=False)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise InvalidRequest(f"the model's chat template refuses these messages: {error}") from error
    # The template has written the special tokens out; the tokenizer must not add them once more.
    token_ids = pack_uint32(tokenizer.encode(text, add_special_tokens=False))
    if form is None:
        return Encoded(call=question.call, token_ids=token_ids)
    return Encoded(call=question.call, token_ids=token_ids, tool_format=form.name, marker=marker_of(tokenizer, form))


def _detokenize(tokenizer: PreTrainedTokenizerBase, question: Detokenize) -> Detokenized:
    token_ids = list(unpack_uint32(question.token_ids))
    before = _decode(tokenizer, token_ids[: question.read], question.marker)
    whole = _decode(tokenizer, token_ids, question.marker)
    if whole.endswith(TORN) and not question.final:
        return Detokenized(call=question.call, text="", complete=False)
    return Detokenized(call=question.call, text=whole[len(before) :], complete=True)


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], marker: int | None) -> str:
    if marker is not None and marker in token_ids:
        at = token_ids.index(marker)
        written = tokenizer.convert_ids_to_tokens(marker)
        assert isinstance(written, str)
        return _decode(tokenizer, token_ids[:at], None) + written + _decode(tokenizer, token_ids[at + 1 :], marker)
    text = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
