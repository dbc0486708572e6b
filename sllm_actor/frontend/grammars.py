"""The gateway's end of the grammar process: one question at a time, each bounded, and a memory of the last answers."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import socket
from collections import OrderedDict
from typing import Any, NamedTuple

from sllm_actor.domain import Model
from sllm_actor.errors import ActorDied, FrameTooLong, InvalidRequest, ProtocolViolation, QueueFull, from_code
from sllm_actor.messages.grammar import (
    FROM_GRAMMAR,
    TO_GRAMMAR,
    CompileGrammar,
    GrammarCompiled,
    GrammarForm,
    GrammarRefused,
)
from sllm_actor.runtime.channel import Channel
from sllm_actor.runtime.forking import Child, ForkServer
from sllm_actor.runtime.frames import Codec

log = logging.getLogger(__name__)

MAX_WAITING = 256
# What is remembered of a refusal, beside its text.
REFUSAL_BYTES = 1024


class _TooMuch(Exception):
    """A refusal that is not remembered: on a machine that is less busy it may go well."""


class _Known(NamedTuple):
    """A grammar, or why there is none."""

    grammar: str
    refusal: InvalidRequest | None


class GrammarService:
    """Compiles what answers must look like. Belongs to one event loop.

    One question at a time, so that a process that is killed or dies leaves no doubt whose grammar was too much.
    """

    def __init__(self, forks: ForkServer, *, timeout_s: float, cache_bytes: int, max_frame_bytes: int) -> None:
        self._forks = forks
        self._timeout_s = timeout_s
        self._cache_bytes = cache_bytes
        self._max_frame_bytes = max_frame_bytes
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._known_bytes = 0
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._calls = itertools.count(1)
        self._child: Child | None = None
        self._channel: Channel | None = None
        self._answer: asyncio.Future[Any] | None = None

    async def compile(self, model: Model, form: GrammarForm, source: str, param: str) -> str:
        """Compile a source for a model; `param` is the field that it came in.

        Raises:
            InvalidRequest: it can't be compiled, or takes too much time or memory.
            QueueFull: too many wait already.
        """
        if not model.eos_token_ids:
            raise InvalidRequest(f"{model.name} has no end token, so its answers can't be held to a form", param=param)
        key = _key(model, form, source)
        known = self._known.get(key)
        try:
            if known is None:
                known = await self._compile_in_turn(key, model, form, source)
            elif known.refusal is None:
                self._known.move_to_end(key)
            if known.refusal is not None:
                raise known.refusal
        except InvalidRequest as refusal:
            raise InvalidRequest(f"{param}: {refusal.message}", param=param) from None
        return known.grammar

    async def _compile_in_turn(self, key: bytes, model: Model, form: GrammarForm, source: str) -> _Known:
        if self._waiting >= MAX_WAITING:
            raise QueueFull("too many grammars wait to be compiled", retry_after_s=1.0)
        self._waiting += 1
        try:
            async with self._turn:
                if key not in self._known:
                    self._remember(key, await self._compiled(model, form, source))
                return self._known[key]
        finally:
            self._waiting -= 1

    async def _compiled(self, model: Model, form: GrammarForm, source: str) -> _Known:
        question = CompileGrammar(
            call=next(self._calls),
            path=model.texts,
            vocabulary_tokens=model.vocabulary_tokens,
            stop_token_ids=model.eos_token_ids,
            form=form,
            source=source,
        )
        try:
            return _Known(await self._ask(question), None)
        except _TooMuch as fault:
            raise InvalidRequest(str(fault)) from fault
        except InvalidRequest as refusal:
            return _Known("", refusal)

    def _remember(self, key: bytes, known: _Known) -> None:
        self._known[key] = known
        self._known_bytes += _size(known)
        while self._known_bytes > self._cache_bytes and len(self._known) > 1:
            _, oldest = self._known.popitem(last=False)
            self._known_bytes -= _size(oldest)

    async def _ask(self, question: CompileGrammar) -> str:
        """Have it compiled; once more if the process was lost, which may not have been this question's fault."""
        for attempt in (1, 2):
            try:
                return await self._ask_once(question)
            except ActorDied:
                await self.close()
                if attempt == 2:
                    log.warning("the grammar process did not survive a grammar, and is replaced")
        raise _TooMuch("it takes too much memory or nests too deep")

    async def _ask_once(self, question: CompileGrammar) -> str:
        channel = await self._start()
        self._answer = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._timeout_s):
                await channel.send(question)
                answer = await self._answer
        except FrameTooLong as error:
            raise _TooMuch(f"it is too long to be compiled: {error.message}") from None
        except TimeoutError:
            log.warning("a grammar was not compiled within %g s; its process is replaced", self._timeout_s)
            await self.close()
            raise _TooMuch(f"it can't be compiled within {self._timeout_s:g} s") from None
        except asyncio.CancelledError:
            # Nobody waits for this answer; the next one's must not be taken for it.
            await self.close()
            raise
        finally:
            self._answer = None
        if isinstance(answer, GrammarRefused):
            raise from_code(answer.code, answer.text)
        assert isinstance(answer, GrammarCompiled)
        return answer.grammar

    async def _start(self) -> Channel:
        if self._channel is None or self._channel.closed:
            ours, theirs = socket.socketpair()
            try:
                with theirs:
                    self._child = await self._forks.fork("grammar", [theirs.fileno()])
                codec = Codec(TO_GRAMMAR, FROM_GRAMMAR, self._max_frame_bytes)
                self._channel = await Channel.open(ours, codec, self._take, self._closed)
            except BaseException:
                ours.close()
                raise
        return self._channel

    def _take(self, message: Any) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(message)

    def _closed(self, violation: ProtocolViolation | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ActorDied("the grammar process has left"))

    async def close(self) -> None:
        """End the process; the next question starts another."""
        channel, self._channel = self._channel, None
        child, self._child = self._child, None
        if child is not None:
            child.kill()
        if channel is not None:
            channel.close()
        if child is not None:
            await asyncio.shield(child.exited)


def _key(model: Model, form: GrammarForm, source: str) -> bytes:
    whole = hashlib.blake2b(digest_size=32)
    for part in (model.texts, model.fingerprint, str(model.vocabulary_tokens), str(model.eos_token_ids), form, source):
        whole.update(part.encode())
        whole.update(b"\0")
    return whole.digest()


def _size(known: _Known) -> int:
    return len(known.grammar) + REFUSAL_BYTES
