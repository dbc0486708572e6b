"""The gateway's end of the text processes: one that reads prompts, one that writes answers.

Two, so that a slow template or a huge prompt holds up no running answer.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from sllm_actor.domain.tokens import pack_uint32, unpack_uint32
from sllm_actor.errors import ActorDied, DeadlineExceeded, ProtocolViolation, QueueFull, TokenizerInvalid, from_code
from sllm_actor.messages.text import (
    FROM_TEXT,
    TO_TEXT,
    ChatTurn,
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
from sllm_actor.runtime.channel import Channel
from sllm_actor.runtime.forking import Child, ForkServer
from sllm_actor.runtime.frames import Codec

log = logging.getLogger(__name__)

MAX_PENDING = 4096
# How many tokens of the prompt's end the first token is decoded behind: some tokenizers write a word
# differently at the beginning of a text.
CONTEXT_TOKENS = 5


class _TextClient:
    """One text process; started when it is needed, and again after it was lost."""

    def __init__(self, forks: ForkServer, timeout_s: float, max_frame_bytes: int) -> None:
        self._forks = forks
        self._timeout_s = timeout_s
        self._max_frame_bytes = max_frame_bytes
        self._calls = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._child: Child | None = None
        self._channel: Channel | None = None
        self._starting = asyncio.Lock()

    async def start(self) -> Channel:
        async with self._starting:
            if self._channel is None or self._channel.closed:
                ours, theirs = socket.socketpair()
                try:
                    with theirs:
                        self._child = await self._forks.fork("text", [theirs.fileno()])
                    codec = Codec(TO_TEXT, FROM_TEXT, self._max_frame_bytes)
                    self._channel = await Channel.open(ours, codec, self._take, self._closed)
                except BaseException:
                    ours.close()
                    raise
            return self._channel

    async def ask(self, make: Any) -> Any:
        """Send `make(call)` and wait for its answer; once more if the process was lost to another's question.

        Raises:
            DeadlineExceeded: it took too long; the process is replaced.
            QueueFull: too many questions wait already.
        """
        for attempt in (1, 2):
            try:
                return await self._ask_once(make)
            except ActorDied:
                if attempt == 2:
                    raise
        raise AssertionError("unreachable")

    async def _ask_once(self, make: Any) -> Any:
        if len(self._pending) >= MAX_PENDING:
            raise QueueFull("too many texts wait to be tokenized", retry_after_s=1.0)
        channel = await self.start()
        call = next(self._calls)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[call] = answer
        try:
            async with asyncio.timeout(self._timeout_s):
                await channel.send(make(call))
                return await answer
        except TimeoutError:
            log.error("a text process did not answer within %g s and is replaced", self._timeout_s)
            self._drop()
            raise DeadlineExceeded(f"templating and tokenizing took longer than {self._timeout_s:g} s") from None
        finally:
            del self._pending[call]

    def _take(self, message: Any) -> None:
        answer = self._pending.get(message.call)
        if answer is None or answer.done():
            return
        if isinstance(message, TextFailed):
            answer.set_exception(from_code(message.code, message.text, message.param or None))
        else:
            answer.set_result(message)

    def _drop(self) -> None:
        if self._child is not None:
            self._child.kill()
        if self._channel is not None:
            self._channel.close()

    def _closed(self, violation: ProtocolViolation | None) -> None:
        for answer in self._pending.values():
            if not answer.done():
                answer.set_exception(ActorDied("the text process has left"))
                answer.exception()

    async def close(self) -> None:
        self._drop()
        if self._child is not None:
            await asyncio.shield(self._child.exited)


class TextService:
    """Tokenizes prompts and writes answers. Belongs to one event loop."""

    def __init__(self, forks: ForkServer, *, timeout_s: float, max_frame_bytes: int) -> None:
        self._reader = _TextClient(forks, timeout_s, max_frame_bytes)
        self._writer = _TextClient(forks, timeout_s, max_frame_bytes)
        # Brings back the files of a path that were lost; tells whether trying again may help.
        self.restore: Callable[[str], Awaitable[bool]] | None = None

    async def start(self) -> None:
        """Start both processes, so that no request waits for a fork."""
        await self._reader.start()
        await self._writer.start()

    async def load(self, path: str) -> TokenizerLoaded:
        """Load a folder's tokenizer in both processes.

        Raises:
            TokenizerInvalid: there is none that can be used.
        """
        loaded: TokenizerLoaded = await self._reader.ask(lambda call: LoadTokenizer(call=call, path=path))
        await self._writer.ask(lambda call: LoadTokenizer(call=call, path=path))
        return loaded

    async def render(self, path: str, turns: Sequence[ChatTurn], tools: str = "") -> Encoded:
        """Apply the chat template and tokenize; `tools` is a JSON list of OpenAI's tools.

        Raises:
            InvalidRequest: the template refuses the turns.
        """
        encoded: Encoded = await self._ask(
            self._reader, path, lambda call: RenderChat(call=call, path=path, turns=tuple(turns), tools=tools)
        )
        return encoded

    async def encode(self, path: str, text: str) -> Sequence[int]:
        """Tokenize a bare prompt."""
        encoded: Encoded = await self._ask(self._reader, path, lambda call: EncodeText(call=call, path=path, text=text))
        return unpack_uint32(encoded.token_ids)

    async def describe(self, path: str, token_ids: Sequence[int]) -> Sequence[bytes]:
        """Give the bytes of each token; several may make one character."""
        packed = pack_uint32(token_ids)
        described: TokensDescribed = await self._ask(
            self._writer, path, lambda call: DescribeTokens(call=call, path=path, token_ids=packed)
        )
        return described.pieces

    async def _ask(self, client: _TextClient, path: str, make: Any) -> Any:
        """Ask; once more where a path's files had been lost, and are there again."""
        try:
            return await client.ask(make)
        except TokenizerInvalid:
            if self.restore is None or not await self.restore(path):
                raise
            return await client.ask(make)

    def detokenizer(self, path: str, prompt: Sequence[int], marker: int | None = None) -> Detokenizer:
        """Begin to write the answer to `prompt`; of all special tokens, `marker` alone is written out."""
        ask = partial(self._ask, self._writer, path)
        return Detokenizer(ask, path, list(prompt[-CONTEXT_TOKENS:]), marker)

    async def close(self) -> None:
        """End both processes."""
        await self._reader.close()
        await self._writer.close()


class Detokenizer:
    """Turns the tokens of one answer into text, piece by piece; a torn character waits for its rest.

    The text process keeps nothing of it, so losing that process loses no answer.
    """

    def __init__(self, ask: Callable[[Any], Awaitable[Any]], path: str, context: list[int], marker: int | None) -> None:
        self._ask = ask
        self._marker = marker
        self._path = path
        self._window = context
        self._read = len(context)

    async def push(self, token_ids: Sequence[int], *, final: bool = False) -> str:
        """Give the text that these tokens add; `final` flushes what is torn."""
        self._window += token_ids
        if len(self._window) == self._read:
            return ""
        window = pack_uint32(self._window)
        decoded: Detokenized = await self._ask(
            lambda call: Detokenize(
                call=call, path=self._path, token_ids=window, read=self._read, final=final, marker=self._marker
            )
        )
        if decoded.complete:
            self._window = self._window[self._read :]
            self._read = len(self._window)
        return decoded.text
