"""The node's handle on one engine process: prepare, attach, generate, cancel, shut down. Free of torch."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from typing import Any, Protocol, cast

import msgspec

from sllm_actor.domain import EngineLimits, RequestId
from sllm_actor.engine.streams import AnswerStream, Item, Parking, Said
from sllm_actor.errors import (
    ActorDied,
    EngineDied,
    EngineStartFailed,
    Preempted,
    ProtocolViolation,
    SllmError,
    from_code,
)
from sllm_actor.messages.embedding import Embed
from sllm_actor.messages.engine import (
    FROM_ENGINE,
    TO_ENGINE,
    AdapterDropped,
    AdapterLoaded,
    AdapterRefused,
    AttachWeights,
    CancelGeneration,
    CheckAdapter,
    CheckModel,
    DropAdapter,
    EngineFailed,
    EngineHello,
    EngineReady,
    GenerationError,
    LoadAdapter,
    MapWeights,
    ModelChecked,
    Park,
    Parked,
    PooledFile,
    PrepareModel,
    ShutDown,
)
from sllm_actor.messages.generation import Finished, Generate, Migrated, Tokens
from sllm_actor.runtime.channel import Channel
from sllm_actor.runtime.forking import ForkServer
from sllm_actor.runtime.frames import Codec


class Process(Protocol):
    """A child process: forked, or a program of its own."""

    @property
    def pid(self) -> int:
        """Its process id."""

    @property
    def exited(self) -> asyncio.Future[int]:
        """Resolves to its exit status, negative for a signal."""

    def kill(self) -> None:
        """End it at once; does nothing once it has ended."""


class Engine:
    """Owns one engine process and its channel. Belongs to one event loop.

    `died` resolves, with the reason, when the process has left: asked or unasked.
    """

    def __init__(self, child: Process) -> None:
        loop = asyncio.get_running_loop()
        self.pid = child.pid
        self.died: asyncio.Future[str] = loop.create_future()
        self._child = child
        self._channel: Channel | None = None
        self._hello: asyncio.Future[Any] = loop.create_future()
        self._answer: asyncio.Future[Any] | None = None
        # Of adapters that are being loaded or dropped, by key.
        self._adapting: dict[str, asyncio.Future[Any]] = {}
        self._failure: SllmError | None = None
        # What it says of each request. The ids are the engine's own, so that a client's id that comes again never meets
        # tokens of its first use.
        self._streams: dict[RequestId, AnswerStream] = {}
        self._numbers = itertools.count(1)
        child.exited.add_done_callback(lambda _: self._settle())

    @classmethod
    async def fork(cls, forks: ForkServer, pool_fd: int, max_frame_bytes: int) -> Engine:
        """Fork an engine that waits for a model, with the host pool's descriptor in hand."""
        return await cls.open(lambda fds: forks.fork("engine", fds), pool_fd, max_frame_bytes)

    @classmethod
    async def open(
        cls, start: Callable[[Sequence[int]], Awaitable[Process]], pool_fd: int, max_frame_bytes: int
    ) -> Engine:
        """Have a process started with its socket and the host pool as descriptors, and take it for an engine."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                child = await start([theirs.fileno(), pool_fd])
        except BaseException:
            ours.close()
            raise
        engine = cls(child)
        codec = Codec(TO_ENGINE, FROM_ENGINE, max_frame_bytes)
        try:
            engine._channel = await Channel.open(ours, codec, engine._take, engine._closed)
        except BaseException:
            ours.close()
            engine.kill()
            raise
        engine._settle()
        return engine

    async def ready(self) -> None:
        """Wait until the process has said that it is warm."""
        await self._settled(self._hello)

    def prepare(self, message: PrepareModel) -> None:
        """Let it build the model; failures show in `check` or `attach`."""
        self._send(message)

    async def check(self) -> None:
        """Wait until the prepared model has been compared with its checkpoint's headers.

        Raises:
            CheckpointInvalid, UnsupportedArchitecture: they do not fit, or can't be served.
        """
        await self._ask(CheckModel(), ModelChecked)

    async def check_adapter(self, path: str) -> None:
        """Wait until the adapter of a folder has been compared with the prepared model.

        Raises:
            CheckpointInvalid: it can't be served, or not with this base.
        """
        await self._ask(CheckAdapter(path=path), ModelChecked)

    async def load_adapter(self, key: str, path: str, chunk_bytes: int, files: Sequence[PooledFile]) -> None:
        """Let it use an adapter, whose bytes are there, for requests that name `key`. One change of a key at a time.

        Raises:
            CheckpointInvalid: it can't be used, and nothing of it is mapped.
            EngineDied: the process has left.
        """
        message = LoadAdapter(key=key, path=path, chunk_bytes=chunk_bytes, files=tuple(files))
        answer = await self._change(key, message)
        if isinstance(answer, AdapterRefused):
            raise from_code(answer.code, answer.text)

    async def drop_adapter(self, key: str) -> None:
        """Wait until nothing of an adapter is mapped any more.

        Raises:
            EngineDied: the process has left.
        """
        await self._change(key, DropAdapter(key=key))

    async def _change(self, key: str, message: object) -> Any:
        assert key not in self._adapting, "one change of an adapter at a time"
        answer = self._adapting[key] = asyncio.get_running_loop().create_future()
        try:
            self._send(message)
            return await self._settled(answer)
        finally:
            del self._adapting[key]

    def place(self, chunk_bytes: int, files: Sequence[PooledFile]) -> None:
        """Let it map the weights, whose bytes may still be on their way; failures show in `attach`."""
        self._send(MapWeights(chunk_bytes=chunk_bytes, files=tuple(files)))

    async def attach(self, limits: EngineLimits) -> EngineReady:
        """Let it use the weights that it has mapped, whose bytes are there, and wait until it can generate.

        As many requests as `limits.slots` run at once; the others wait in the engine.

        Raises:
            CheckpointInvalid, UnsupportedArchitecture: the model can't be made of these files.
            EngineDied: the process has left.
        """
        ready: EngineReady = await self._ask(AttachWeights(limits=limits), EngineReady)
        return ready

    async def generate(
        self, request: Generate | Embed, stream: AnswerStream | None = None, parking: Parking | None = None
    ) -> AsyncGenerator[Item, None]:
        """Run one request; closing the generator cancels it.

        Whoever gives a `stream` may hold it back, or end it with `Migrated` or `Preempted`, and then the request is
        cancelled here. It goes on with what a `parking` of this engine holds.

        Raises:
            EngineDied: the process has left.
            GenerationFailed: this request alone failed.
            Preempted: whoever gave the stream has ended it so.
        """
        stream = stream or AnswerStream()
        number, finished = self._open(stream), False
        try:
            self._send(_numbered(request, number, parking))
            while not finished:
                item = await stream.get()
                if isinstance(item, SllmError):
                    finished = not isinstance(item, Preempted)
                    raise item
                assert not isinstance(item, Parked), "that is said of what is parked alone"
                finished = isinstance(item, Finished)
                yield _as_asked(item, request)
                if isinstance(item, Migrated):
                    return
        finally:
            del self._streams[number]
            if not finished:
                # Where this can't be said, the process is on its way out and the request with it.
                with contextlib.suppress(SllmError):
                    self._send(CancelGeneration(request_id=number))

    @contextlib.contextmanager
    def park(self, request: Generate) -> Iterator[Parking]:
        """Have the engine hold a request's tokens, for as long as this is open, or until a request takes them over.

        Raises:
            EngineDied: the process has left.
        """
        stream = AnswerStream()
        parking = self._parking(self._open(stream), stream)
        try:
            self._send(
                Park(
                    request_id=parking.number,
                    prompt=request.prompt,
                    generated=request.generated,
                    resume=request.resume,
                    adapter=request.adapter,
                    priority=request.priority,
                )
            )
            yield parking
        finally:
            del self._streams[parking.number]
            parking.leave()

    def _parking(self, number: RequestId, stream: AnswerStream) -> Parking:
        return Parking(number, stream, self._send)

    def _open(self, stream: AnswerStream) -> RequestId:
        number = RequestId(str(next(self._numbers)))
        self._streams[number] = stream
        return number

    async def leave(self, timeout_s: float) -> None:
        """Ask it to leave, wait until it has, and kill it if it takes longer than `timeout_s`."""
        if not self.died.done():
            # One that can't be told has failed and leaves by itself, or is killed below.
            with contextlib.suppress(SllmError):
                self._send(ShutDown())
            try:
                async with asyncio.timeout(timeout_s):
                    await asyncio.shield(self.died)
            except TimeoutError:
                self.kill()
        await asyncio.shield(self.died)

    def kill(self) -> None:
        """End the process at once; `died` follows."""
        self._child.kill()

    def _send(self, message: object) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            assert self._channel is not None
            self._channel.send_now(message)
        except ActorDied as error:
            raise EngineDied(f"the engine process {self.pid} has left") from error

    async def _ask(self, message: object, expected: type) -> Any:
        self._answer = asyncio.get_running_loop().create_future()
        self._send(message)
        answer = await self._settled(self._answer)
        if not isinstance(answer, expected):
            raise EngineStartFailed(f"the engine answered {type(answer).__name__} to {type(message).__name__}")
        return answer

    async def _settled(self, future: asyncio.Future[Any]) -> Any:
        """Wait for an answer or for the end of the process, whichever is first."""
        await asyncio.wait([future, self.died], return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return future.result()
        raise self._failure or EngineDied(f"the engine process {self.pid} has left ({self.died.result()})")

    def _take(self, message: Any) -> None:
        if isinstance(message, Said):
            stream = self._streams.get(message.request_id)
            if stream is not None:
                stream.put(message)
        elif isinstance(message, GenerationError):
            stream = self._streams.get(message.request_id)
            if stream is not None:
                stream.put(from_code(message.code, message.text))
        elif isinstance(message, AdapterLoaded | AdapterRefused | AdapterDropped):
            changing = self._adapting.get(message.key)
            if changing is not None and not changing.done():
                changing.set_result(message)
        elif isinstance(message, EngineHello):
            if not self._hello.done():
                self._hello.set_result(message)
        elif isinstance(message, EngineFailed):
            self._failure = from_code(message.code, message.text)
            if self._answer is not None and not self._answer.done():
                self._answer.set_exception(self._failure)
                self._answer.exception()
            # These were its last words, and it waits until they are read.
            assert self._channel is not None
            self._channel.close()
        elif self._answer is not None and not self._answer.done():
            self._answer.set_result(message)

    def _closed(self, violation: ProtocolViolation | None) -> None:
        if violation is not None:
            self._failure = violation
            self.kill()
        self._settle()

    def _settle(self) -> None:
        """Once the process has ended and its last words are read, tell everyone who waits for it."""
        if not self._child.exited.done() or self._channel is None or not self._channel.ended or self.died.done():
            return
        status = self._child.exited.result()
        reason = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        self.died.set_result(reason)
        error = self._failure or EngineDied(f"the engine process {self.pid} has left ({reason})")
        for stream in self._streams.values():
            stream.release()
            stream.put(error)


def _numbered(request: Any, number: RequestId, parking: Parking | None) -> Any:
    if parking is None:
        return msgspec.structs.replace(request, request_id=number)
    parking.taken = True
    return msgspec.structs.replace(request, request_id=number, parked=parking.number)


def _as_asked(item: Any, request: Any) -> Any:
    if isinstance(item, Tokens):
        return msgspec.structs.replace(cast(Any, item), request_id=request.request_id, epoch=request.epoch)
    return msgspec.structs.replace(item, request_id=request.request_id)
