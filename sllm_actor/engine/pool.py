"""Idle engine processes, kept warm so that a start never waits for a fork."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from sllm_actor.engine.client import Engine
from sllm_actor.errors import SllmError
from sllm_actor.runtime.clock import Clock
from sllm_actor.runtime.tasks import TaskScope

log = logging.getLogger(__name__)


class Engines(Protocol):
    """Gives engine processes that wait for a model; whoever takes one owns it from then on."""

    async def take(self) -> Engine:
        """Give one.

        Raises:
            EngineStartFailed, BackendInvalid: there is none.
        """


class EnginePool:
    """Owns the idle engines; whoever takes one owns it from then on. Belongs to one event loop."""

    def __init__(self, fork: Callable[[], Awaitable[Engine]], idle: int, refill_delay_s: float, clock: Clock) -> None:
        self._fork = fork
        self._idle = idle
        self._refill_delay_s = refill_delay_s
        self._clock = clock
        self._tasks = TaskScope("engines")
        self._engines: list[Engine] = []
        self._refilling = False

    async def start(self) -> None:
        """Fork the first idle engines and wait until they are warm."""
        await self._fill()

    @property
    def idle_engines(self) -> int:
        return sum(not engine.died.done() for engine in self._engines)

    async def take(self) -> Engine:
        """Give a warm engine, or fork one where none is left. A new one replaces it a little later.

        Raises:
            EngineStartFailed: no process can be forked.
        """
        self._engines = [engine for engine in self._engines if not engine.died.done()]
        if not self._refilling:
            self._tasks.spawn(self._refill(), "refill")
            self._refilling = True
        return self._engines.pop(0) if self._engines else await self._fork()

    async def _refill(self) -> None:
        # Forking takes a core for a moment, and whoever took the engine is starting a model on it just now.
        try:
            await self._clock.sleep(self._refill_delay_s)
            await self._fill()
        except SllmError as error:
            log.error("no idle engine could be forked: %s", error)
        finally:
            self._refilling = False

    async def _fill(self) -> None:
        while self.idle_engines < self._idle:
            engine = await self._fork()
            self._engines.append(engine)
            await engine.ready()

    async def close(self, timeout_s: float) -> None:
        """Let the idle engines leave."""
        await self._tasks.close()
        engines, self._engines = self._engines, []
        await asyncio.gather(*(engine.leave(timeout_s) for engine in engines))
