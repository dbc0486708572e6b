"""The engine process of a model with `backend = "vllm"`: our protocol on the one side, vLLM's AsyncLLM on the other.

A request that goes on with an answer is a new one for vLLM: prompt and tokens so far are its prompt.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sllm_actor.checkpoint.folder import read_config
from sllm_actor.domain import EngineLimits, FinishReason, RequestId, Span, TokenLogprobs
from sllm_actor.domain.tokens import unpack_uint32
from sllm_actor.engine import vllm_calls
from sllm_actor.engine.vllm_options import LoaderConfig, PooledWeights, VllmOptions
from sllm_actor.errors import (
    BackendInvalid,
    EngineStartFailed,
    GenerationFailed,
    ProtocolViolation,
    SllmError,
    UnsupportedArchitecture,
)
from sllm_actor.messages.embedding import Embed
from sllm_actor.messages.engine import (
    FROM_ENGINE,
    TO_ENGINE,
    AdapterRefused,
    AttachWeights,
    CancelGeneration,
    CheckAdapter,
    CheckModel,
    EngineFailed,
    EngineHello,
    EngineReady,
    ExtendParked,
    GenerationError,
    LoadAdapter,
    MapWeights,
    ModelChecked,
    Park,
    Parked,
    Prefilled,
    PrepareModel,
    ShutDown,
)
from sllm_actor.messages.generation import Finished, Generate, PromptLogprobs, Tokens
from sllm_actor.runtime.channel import Channel
from sllm_actor.runtime.clock import Clock
from sllm_actor.runtime.frames import Codec
from sllm_actor.runtime.tasks import TaskScope

log = logging.getLogger(__name__)

# In one message, each with up to twenty likeliest tokens.
MAX_SCORED = 256


class _Answer:
    """One request, what vLLM has told of it, and how much of that has been passed on."""

    def __init__(self, message: Generate, ends: Sequence[int], context_tokens: int) -> None:
        self.request_id = message.request_id
        self.sampling = message.sampling
        self.prompt = list(unpack_uint32(message.prompt))
        self.before = list(unpack_uint32(message.generated))
        self.ends = frozenset(ends)
        self._context_tokens = context_tokens
        self._drawn = 0
        self._cached_tokens = 0
        self._scored: list[Any] = []
        self._begun = False

    @property
    def scores_prompt(self) -> bool:
        return self.sampling.prompt_logprobs and not self.before

    def ended_before(self) -> FinishReason | None:
        """Tell whether the answer so far is whole already."""
        if self.before and self.before[-1] in self.ends:
            return FinishReason.STOP
        known = len(self.prompt) + len(self.before)
        if known >= self._context_tokens or (len(self.before) >= self.sampling.max_tokens and not self.scores_prompt):
            return FinishReason.LENGTH
        return None

    def news(self, output: Any, begin_s: float, now_s: float) -> list[object]:
        """Say what an output of vLLM's brings: tokens, but for one that ends the answer, and the end."""
        self._scored += output.prompt_logprobs or ()
        self._cached_tokens = self._cached_tokens or output.num_cached_tokens or 0
        (part,) = output.outputs
        said = list[object]()
        if not self._begun:
            self._begun = True
            said.append(Prefilled(request_id=self.request_id, span=Span(name="prefill", begin_s=begin_s, end_s=now_s)))
            said += self._prompt_logprobs()
        told, finish = list(part.token_ids), _finish_of(part.finish_reason)
        index = len(self.before) + self._drawn
        self._drawn += len(told)
        if told and finish is FinishReason.STOP:
            del told[-1]
        # A prompt is scored without an answer; vLLM draws one token all the same.
        if self.sampling.max_tokens == 0:
            told, self._drawn = [], 0
        if told:
            logprobs = self._logprobs(told, part.logprobs)
            said.append(Tokens(request_id=self.request_id, index=index, token_ids=tuple(told), logprobs=logprobs))
        if finish is not None:
            said.append(self.finished(FinishReason.LENGTH if self.sampling.max_tokens == 0 else finish))
        return said

    def _logprobs(self, told: Sequence[int], logprobs: Sequence[Any] | None) -> tuple[TokenLogprobs, ...]:
        top = self.sampling.top_logprobs
        if top is None or logprobs is None:
            return ()
        return tuple(vllm_calls.logprobs_of(one, token, top) for one, token in zip(logprobs, told, strict=False))

    def _prompt_logprobs(self) -> list[object]:
        if not self.scores_prompt:
            return []
        top = self.sampling.top_logprobs or 0
        scored = [
            vllm_calls.logprobs_of(one, token, top)
            for one, token in zip(self._scored[1:], self.prompt[1:], strict=True)
        ]
        return [
            PromptLogprobs(
                request_id=self.request_id, index=begin + 1, logprobs=tuple(scored[begin : begin + MAX_SCORED])
            )
            for begin in range(0, max(len(scored), 1), MAX_SCORED)
        ]

    def finished(self, reason: FinishReason) -> Finished:
        return Finished(
            request_id=self.request_id,
            reason=reason,
            prompt_tokens=len(self.prompt),
            generated_tokens=len(self.before) + self._drawn,
            cached_tokens=min(self._cached_tokens, len(self.prompt)),
        )


def _finish_of(reason: str | None) -> FinishReason | None:
    if reason is None:
        return None
    if reason not in ("stop", "length"):
        raise GenerationFailed(f"vLLM ended the answer: {reason}")
    return FinishReason(reason)


class VllmProcess:
    """Owns vLLM's engine of this process and the requests that run in it. Belongs to one event loop."""

    def __init__(self, pool_fd: int, options: VllmOptions, clock: Clock) -> None:
        # As any process of this user's can open it: vLLM loads in another one.
        self._pool = f"/proc/{os.getpid()}/fd/{pool_fd}"
        self._options = options
        self._clock = clock
        self._channel: Channel | None = None
        self._prepared: PrepareModel | None = None
        self._weights: LoaderConfig | None = None
        self._llm: Any = None
        self._tasks = TaskScope("vllm")
        self._running: dict[RequestId, asyncio.Task[None]] = {}
        self._parked: dict[RequestId, tuple[Park, list[int]]] = {}
        self._left: asyncio.Future[int] | None = None
        self._failed = False

    async def run(self, sock: socket.socket, max_frame_bytes: int) -> int:
        """Serve until told to leave or left alone; the result is the exit status."""
        self._left = asyncio.get_running_loop().create_future()
        codec = Codec(FROM_ENGINE, TO_ENGINE, max_frame_bytes)
        self._channel = await Channel.open(sock, codec, self._hear, self._closed)
        self._say(EngineHello())
        try:
            return await self._left
        finally:
            await self._tasks.close()
            if self._llm is not None:
                self._llm.shutdown()
            self._channel.close()

    def _closed(self, _: ProtocolViolation | None) -> None:
        self._leave(1 if self._failed else 0)

    def _leave(self, status: int) -> None:
        assert self._left is not None
        if not self._left.done():
            self._left.set_result(status)

    def _say(self, *said: object) -> None:
        assert self._channel is not None
        if not self._channel.closed:
            for message in said:
                self._channel.send_now(message)

    def _hear(self, message: Any) -> None:
        if self._failed:
            return
        try:
            self._take(message)
        except SllmError as error:
            self._fail(error)

    def _fail(self, error: SllmError) -> None:
        """Say why, and leave once that is read and the other end closed: see `BlockingChannel.wait_closed`."""
        self._failed = True
        self._say(EngineFailed(code=error.code, text=error.message))

    def _take(self, message: Any) -> None:
        if isinstance(message, Generate):
            self._begin(message)
        elif isinstance(message, CancelGeneration):
            self._cancel(message.request_id)
        elif isinstance(message, Park):
            self._parked[message.request_id] = message, [
                *unpack_uint32(message.prompt), *unpack_uint32(message.generated),
            ]  # fmt: skip
            self._hold(message.request_id)
        elif isinstance(message, ExtendParked):
            if message.request_id in self._parked:
                self._parked[message.request_id][1].extend(unpack_uint32(message.token_ids))
                self._hold(message.request_id)
        elif isinstance(message, Embed):
            self._refuse(message.request_id, GenerationFailed("with vLLM as its backend a model embeds no texts"))
        elif isinstance(message, LoadAdapter | CheckAdapter):
            self._refuse_adapter(message)
        elif isinstance(message, PrepareModel):
            self._prepared = message
        elif isinstance(message, CheckModel):
            self._check()
        elif isinstance(message, MapWeights):
            self._map(message)
        elif isinstance(message, AttachWeights):
            self._attach(message.limits)
        elif isinstance(message, ShutDown):
            self._leave(0)

    def _refuse_adapter(self, message: LoadAdapter | CheckAdapter) -> None:
        error = BackendInvalid("with vLLM as its backend a model has no adapters", param="base")
        if isinstance(message, CheckAdapter):
            raise error
        self._say(AdapterRefused(key=message.key, code=error.code, text=error.message))

    def _need_prepared(self) -> PrepareModel:
        if self._prepared is None:
            raise EngineStartFailed("no model was named yet")
        return self._prepared

    def _check(self) -> None:
        config, _ = read_config(Path(self._need_prepared().path))
        known = vllm_calls.supported_architectures()
        named = [name for name in config.get("architectures") or () if isinstance(name, str)]
        if not named or named[0] not in known:
            raise UnsupportedArchitecture(f"this vLLM does not serve {', '.join(named) or 'a model without a class'}")
        self._say(ModelChecked())

    def _map(self, message: MapWeights) -> None:
        files = [
            PooledWeights(
                name=file.name,
                size_bytes=file.size_bytes,
                chunks=list(unpack_uint32(file.chunks)),
                path=file.path,
                mtime_ns=file.mtime_ns,
                inode=file.inode,
            )
            for file in message.files
        ]
        self._weights = LoaderConfig(
            pool=self._pool, chunk_bytes=message.chunk_bytes, files=files, aliases=self._need_prepared().aliases
        )

    def _attach(self, limits: EngineLimits) -> None:
        prepared = self._need_prepared()
        if self._weights is None:
            raise EngineStartFailed("weights are to be used that were never mapped")
        self._tasks.spawn(self._open(prepared, self._weights, limits), "open", on_failure=self._not_opened)

    async def _open(self, prepared: PrepareModel, weights: LoaderConfig, limits: EngineLimits) -> None:
        begin_s = self._clock.monotonic_s()
        # Nothing else is to be done until it is there: it holds the loop up, as in vLLM's own server.
        self._llm = vllm_calls.open_engine(prepared, weights, limits, self._options)
        span = Span(name="vllm", begin_s=begin_s, end_s=self._clock.monotonic_s())
        self._say(EngineReady(spans=(span,), late_imports=()))

    def _not_opened(self, error: BaseException) -> None:
        log.error("vLLM's engine can't be started", exc_info=error)
        self._fail(error if isinstance(error, SllmError) else EngineStartFailed(f"vLLM: {str(error)[:1000]}"))

    def _begin(self, message: Generate) -> None:
        self._cancel(RequestId(message.parked))
        prepared, sampling = self._need_prepared(), message.sampling
        ends = [*sampling.stop_token_ids, *(() if sampling.ignore_eos else prepared.eos_token_ids)]
        answer = _Answer(message, ends, prepared.context_tokens)
        if message.grammar:
            reason = "with vLLM as its backend a model's answers have no form that is asked for: no response_format"
            self._refuse(message.request_id, BackendInvalid(reason, param="response_format"))
        elif (whole := answer.ended_before()) is not None:
            self._say(answer.finished(whole))
        else:
            self._spawn(message.request_id, self._answer(answer, ends, message.priority))

    async def _answer(self, answer: _Answer, ends: Sequence[int], priority: int) -> None:
        begin_s = self._clock.monotonic_s()
        parameters = vllm_calls.parameters_of(answer.sampling, len(answer.before), ends)
        tokens = [*answer.prompt, *answer.before]
        async for output in vllm_calls.answer(self._llm, answer.request_id, tokens, parameters, priority):
            self._say(*answer.news(output, begin_s, self._clock.monotonic_s()))

    def _hold(self, request_id: RequestId) -> None:
        park, tokens = self._parked[request_id]
        self._spawn(request_id, self._compute(request_id, list(tokens), park.priority))

    async def _compute(self, request_id: RequestId, tokens: list[int], priority: int) -> None:
        await vllm_calls.compute(self._llm, f"parked-{request_id}-{len(tokens)}", tokens, priority)
        self._say(Parked(request_id=request_id, known_tokens=len(tokens)))

    def _spawn(self, request_id: RequestId, work: Any) -> None:
        if self._llm is None:
            work.close()
            raise EngineStartFailed("a request came before the weights")
        task = self._tasks.spawn(work, request_id, on_failure=partial(self._request_failed, request_id))
        self._running[request_id] = task
        task.add_done_callback(partial(self._ended, request_id))

    def _ended(self, request_id: RequestId, task: asyncio.Task[None]) -> None:
        if self._running.get(request_id) is task:
            del self._running[request_id]

    def _request_failed(self, request_id: RequestId, error: BaseException) -> None:
        """Tell who asked; an engine that has died with it takes this process along."""
        self._parked.pop(request_id, None)
        told = error if isinstance(error, SllmError) else GenerationFailed(f"vLLM: {str(error)[:1000]}")
        self._refuse(request_id, told)
        if self._llm.errored:
            self._leave(1)

    def _refuse(self, request_id: RequestId, error: SllmError) -> None:
        self._say(GenerationError(request_id=request_id, code=error.code, text=error.message))

    def _cancel(self, request_id: RequestId) -> None:
        self._parked.pop(request_id, None)
        task = self._running.pop(request_id, None)
        if task is not None:
            task.cancel()
