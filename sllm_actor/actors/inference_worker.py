"""Owns one engine process and with it one instance of a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec

from sllm_actor.actors.running import Running
from sllm_actor.actors.slots import Slots
from sllm_actor.actors.waiting_room import WaitingRoom
from sllm_actor.engine.client import Engine, Item
from sllm_actor.errors import Draining
from sllm_actor.messages.embedding import Embed
from sllm_actor.messages.generation import Generate
from sllm_actor.messages.instances import AdapterHeld, Answered, HoldAdapter, InstanceDied, InstanceExpired, Retire
from sllm_actor.runtime import Actor, ActorRef, Clock, handles

FIRST_REQUEST_S = 10.0


class InferenceWorker(Actor):
    """Runs generations and embeddings on its engine, a bounded number at once, and tells its manager how busy it is."""

    def __init__(
        self,
        engine: Engine,
        instance_id: str,
        manager: ActorRef,
        clock: Clock,
        *,
        keep_alive_s: float,
        max_requests: int,
        room: WaitingRoom,
        stop_timeout_s: float,
    ) -> None:
        self._engine = engine
        self._instance_id = instance_id
        self._manager = manager
        self._clock = clock
        self._keep_alive_s = keep_alive_s
        self._slots = Slots(max_requests)
        self._room = room
        self._stop_timeout_s = stop_timeout_s
        self._running = Running(instance_id)
        self._idle = asyncio.Event()
        self._idle.set()
        self._retiring = False
        self._expiry: asyncio.Task[None] | None = None

    async def started(self) -> None:
        self.context.tasks.spawn(self._await_death(), "death")
        # The request that it was started for is on its way, however short the keep-alive.
        self._expire_later(max(self._keep_alive_s, FIRST_REQUEST_S))

    @handles(Generate)
    async def generate(self, request: Generate) -> AsyncGenerator[AdapterHeld | Item, None]:
        async with aclosing(self._run(request)) as items:
            async for item in items:
                yield item

    @handles(Embed)
    async def embed(self, request: Embed) -> AsyncGenerator[AdapterHeld | Item, None]:
        async with aclosing(self._run(request)) as items:
            async for item in items:
                yield item

    async def _run(self, request: Generate | Embed) -> AsyncGenerator[AdapterHeld | Item, None]:
        if self._retiring or self._engine.died.done():
            raise Draining(f"instance {self._instance_id} is being stopped", retry_after_s=1.0)
        self._running.begin(request, self._clock.monotonic_s())
        self._tell_activity()
        try:
            if not self._slots.take_now():
                with self._room.place(request.model):
                    await self._slots.take(request.priority)
            try:
                async with aclosing(self._compute(request)) as items:
                    async for item in items:
                        self._running.take(request.request_id, item, self._clock.monotonic_s())
                        yield item
            finally:
                self._slots.give()
        finally:
            if request.keep_alive_s is not None:
                self._keep_alive_s = request.keep_alive_s
            self._tell_activity(self._running.end(request.request_id))

    async def _compute(self, request: Generate | Embed) -> AsyncGenerator[AdapterHeld | Item, None]:
        if not isinstance(request, Generate) or not request.base:
            async with aclosing(self._engine.generate(request)) as items:
                async for item in items:
                    yield item
            return
        # What the engine has of the adapter is held as long as this stream is open.
        wish = HoldAdapter(instance_id=self._instance_id, adapter=request.model)
        async with aclosing(self._manager.stream(wish)) as holding:
            held: AdapterHeld = await anext(holding)
            yield held
            async with aclosing(self._engine.generate(_with_adapter(request, held.key))) as items:
                async for item in items:
                    yield item

    @handles(Retire, concurrent=True)
    async def retire(self, _: Retire) -> None:
        self._retiring = True
        await self._idle.wait()
        await self._engine.leave(self._stop_timeout_s)

    def _tell_activity(self, answered: Answered | None = None) -> None:
        activity = self._running.activity(self._clock.monotonic_s(), self._keep_alive_s, answered)
        self._manager.tell(activity)
        if activity.active:
            self._idle.clear()
            if self._expiry is not None:
                self._expiry.cancel()
        else:
            self._idle.set()
            self._expire_later(self._keep_alive_s)

    def _expire_later(self, idle_s: float) -> None:
        if not self._retiring and idle_s != float("inf"):
            self._expiry = self.context.tasks.spawn(self._expire(idle_s), "keep-alive")

    async def _expire(self, idle_s: float) -> None:
        await self._clock.sleep(idle_s)
        self._manager.tell(InstanceExpired(instance_id=self._instance_id))

    async def _await_death(self) -> None:
        reason = await asyncio.shield(self._engine.died)
        self._manager.tell(InstanceDied(instance_id=self._instance_id, reason=reason))

    async def stopped(self) -> None:
        self._engine.kill()


def _with_adapter(request: Any, key: str) -> Any:
    return msgspec.structs.replace(request, adapter=key)
