"""The engine of one start: taken at once, or, where the bytes are long in coming, when they are nearly there.

A warm engine that builds a skeleton while it waits for a download is of no use to others who could start meanwhile.
"""

from __future__ import annotations

import asyncio

from sllm_actor.domain import Span
from sllm_actor.domain.tokens import pack_uint32
from sllm_actor.engine.client import Engine
from sllm_actor.engine.pool import Engines
from sllm_actor.loader.fetch import MAX_READS
from sllm_actor.loader.mapping import HostFile
from sllm_actor.messages.engine import PooledFile, PrepareModel
from sllm_actor.policy.nearing import is_near
from sllm_actor.runtime.clock import Clock
from sllm_actor.runtime.tasks import TaskScope

# What taking an engine, or forking one, and building a skeleton needs, generously.
AHEAD_S = 3.0


class EngineInTime:
    """Takes the engine and tells it what to build, and where the weights lie as soon as that is known.

    Whoever made it ends with `give` or `give_up`, once.
    """

    def __init__(self, engines: Engines, prepare: PrepareModel, clock: Clock, chunk_bytes: int) -> None:
        self._engines = engines
        self._prepare = prepare
        self._clock = clock
        self._chunk_bytes = chunk_bytes
        self._engine: Engine | None = None
        self._files: tuple[HostFile, ...] | None = None
        self._scope = TaskScope("engine in time")
        self._taking: asyncio.Task[None] | None = None
        self._placed_s = 0.0
        self.taken = Span(name="engine", begin_s=0.0, end_s=0.0)

    async def take(self) -> None:
        """Take it now.

        Raises:
            EngineStartFailed: no process can be forked.
        """
        begin_s = self._clock.monotonic_s()
        self._engine = await self._engines.take()
        self._engine.prepare(self._prepare)
        self.taken = Span(name="engine", begin_s=begin_s, end_s=self._clock.monotonic_s())
        self._place()

    def placed(self, files: tuple[HostFile, ...]) -> None:
        """Be told where the weights will lie."""
        self._files = files
        self._placed_s = self._clock.monotonic_s()
        self._place()

    def arrived(self, arrived_bytes: int, total_bytes: int, bytes_per_s: float) -> None:
        """Be told how much of a download has come, and take the engine if it is time; nothing comes before `placed`."""
        if self._engine is not None or self._taking is not None or self._files is None:
            return
        elapsed_s = self._clock.monotonic_s() - self._placed_s
        under_way_bytes = MAX_READS * self._chunk_bytes
        left_bytes = total_bytes - arrived_bytes
        if is_near(
            left_bytes,
            arrived_bytes,
            elapsed_s,
            under_way_bytes=under_way_bytes,
            bytes_per_s=bytes_per_s,
            ahead_s=AHEAD_S,
        ):
            self._taking = self._scope.spawn(self.take(), "take", on_failure=lambda _: None)

    async def give(self) -> Engine:
        """Give the engine, taken by now.

        Raises:
            EngineStartFailed, EngineDied: there is none.
        """
        if self._taking is not None:
            await self._taking
        elif self._engine is None:
            await self.take()
        assert self._engine is not None
        return self._engine

    async def give_up(self, stop_timeout_s: float) -> None:
        """End it: a model that failed half-way is worth nothing, and its process goes at once."""
        if self._engine is not None:
            self._engine.kill()
        await self._scope.close()
        if self._engine is not None:
            self._engine.kill()
            await self._engine.leave(stop_timeout_s)

    def _place(self) -> None:
        if self._engine is not None and self._files is not None:
            self._engine.place(self._chunk_bytes, [pooled(file) for file in self._files])


def pooled(file: HostFile) -> PooledFile:
    """Describe a file in host memory to an engine."""
    lies = file.in_place
    if lies is None:
        return PooledFile(name=file.name, size_bytes=file.size_bytes, chunks=pack_uint32(file.chunks))
    return PooledFile(
        name=file.name, size_bytes=file.size_bytes, path=lies.path, mtime_ns=lies.mtime_ns, inode=lies.inode
    )
