"""Owns one engine process and with it one instance of a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, nullcontext
from typing import Any

import msgspec

from sllm_actor.actors.handing_over import HandingOver, Live
from sllm_actor.actors.prepared import MigrationLimits, PreparedRequest, PreparedRequests
from sllm_actor.actors.running import Running
from sllm_actor.actors.slots import Slots
from sllm_actor.actors.waiting_room import WaitingRoom
from sllm_actor.domain import RequestId
from sllm_actor.engine.client import Engine
from sllm_actor.engine.streams import AnswerStream, Item, Parking
from sllm_actor.errors import Draining, Preempted, RequestNotFound
from sllm_actor.messages.embedding import Embed
from sllm_actor.messages.generation import Generate
from sllm_actor.messages.instances import (
    AdapterHeld,
    Answered,
    EndAnswers,
    HoldAdapter,
    InstanceDied,
    InstanceExpired,
    NoSlot,
    Retire,
)
from sllm_actor.messages.migration import (
    ExtendPrepared,
    HandedOver,
    HoldSlots,
    ListLive,
    LiveRequest,
    MigrateOut,
    Prepare,
    Prepared,
    TurnAway,
)
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
        migration: MigrationLimits,
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
        self._live: dict[RequestId, Live] = {}
        self._migration = migration
        self._prepared = PreparedRequests(
            engine, self._slots, clock, self._known_to_engine, migration, self._visit, self._leave
        )
        self._idle = asyncio.Event()
        self._idle.set()
        self._retiring = False
        self._preempted = False
        # When it expires if nobody asks, and who waits for that.
        self._expires_s = 0.0
        self._expiry: asyncio.Task[None] | None = None

    async def started(self) -> None:
        self.context.tasks.spawn(self._await_death(), "death")
        # The request that it was started for is on its way, however short the keep-alive.
        self._expire_later(max(self._keep_alive_s, FIRST_REQUEST_S))

    # Each token of an answer goes through all generators of its request here, so these are few.

    @handles(Generate, stream=True)
    def generate(self, request: Generate) -> AsyncGenerator[AdapterHeld | NoSlot | Item, None]:
        return self._run(request, Live(request))

    @handles(Embed, stream=True)
    def embed(self, request: Embed) -> AsyncGenerator[AdapterHeld | NoSlot | Item, None]:
        return self._run(request, None)

    async def _run(
        self, request: Generate | Embed, live: Live | None
    ) -> AsyncGenerator[AdapterHeld | NoSlot | Item, None]:
        """Compute a request when it has a slot; one that was prepared brings its own."""
        prepared = self._prepared.take(request.migration_id) if isinstance(request, Generate) else None
        if live is not None:
            self._live[request.request_id] = live
        try:
            if self._engine.died.done() or (self._retiring and prepared is None):
                raise self._draining()
            self._running.begin(request, self._clock.monotonic_s())
            self._tell_activity()
            try:
                if prepared is None and not self._slots.take_now():
                    yield NoSlot()
                    with self._room.place(request.model), live.waiting() if live else nullcontext():
                        await self._slots.take(request.priority)
                try:
                    async with aclosing(self._compute(request, live, prepared)) as items:
                        async for item in items:
                            self._running.take(request.request_id, item, self._clock.monotonic_s())
                            yield item
                finally:
                    if prepared is None:
                        self._slots.give()
            finally:
                if request.keep_alive_s is not None:
                    self._keep_alive_s = request.keep_alive_s
                self._tell_activity(self._running.end(request.request_id))
        finally:
            if prepared is not None:
                prepared.end()
            if live is not None:
                self._left(live)

    def _left(self, live: Live) -> None:
        live.stream.leave()
        if self._live[live.request.request_id] is live:  # Its id may have come again.
            del self._live[live.request.request_id]

    def _compute(
        self, request: Generate | Embed, live: Live | None, prepared: PreparedRequest | None
    ) -> AsyncGenerator[AdapterHeld | Item, None]:
        if self._preempted:
            raise _preempted(self._instance_id)
        stream, parking = (live.stream if live else None), (prepared.parking if prepared else None)
        if isinstance(request, Generate) and request.base:
            return self._compute_adapted(request, stream, parking)
        return self._engine.generate(request, stream, parking)

    async def _compute_adapted(
        self, request: Generate, stream: AnswerStream | None, parking: Parking | None
    ) -> AsyncGenerator[AdapterHeld | Item, None]:
        async with self._known_to_engine(request) as (known, held):
            if held is not None:
                yield held
            async with aclosing(self._engine.generate(known, stream, parking)) as items:
                async for item in items:
                    yield item

    @asynccontextmanager
    async def _known_to_engine(self, request: Any) -> AsyncIterator[tuple[Any, AdapterHeld | None]]:
        """Give a request as its engine knows it: what that has of an adapter is held as long as this is open."""
        if not isinstance(request, Generate) or not request.base:
            yield request, None
            return
        wish = HoldAdapter(instance_id=self._instance_id, adapter=request.model)
        async with aclosing(self._manager.stream(wish)) as holding:
            held: AdapterHeld = await anext(holding)
            yield _with_adapter(request, held.key), held

    def _visit(self, migration_id: str, request: Generate) -> None:
        """Count a request that is to come among those that run, under its migration's id."""
        self._running.begin(_under(request, migration_id), self._clock.monotonic_s())
        self._tell_activity()

    def _leave(self, migration_id: str) -> None:
        self._running.end(RequestId(migration_id))
        self._tell_activity()

    @handles(Prepare)
    async def prepare(self, message: Prepare) -> AsyncGenerator[Prepared, None]:
        if self._retiring or self._engine.died.done():
            raise Draining(f"instance {self._instance_id} is being stopped", retry_after_s=1.0)
        async with aclosing(self._prepared.prepare(message, self.context.tasks)) as steps:
            async for step in steps:
                yield step

    @handles(ExtendPrepared)
    async def extend_prepared(self, message: ExtendPrepared) -> None:
        self._prepared.extend(message, self.context.tasks)

    @handles(ListLive)
    async def list_live(self, _: ListLive) -> tuple[LiveRequest, ...]:
        return tuple(live.shown() for live in self._live.values() if not live.stream.ended)

    @handles(MigrateOut, concurrent=True)
    async def migrate_out(self, message: MigrateOut) -> HandedOver:
        live = self._live.get(message.request_id)
        if live is None:
            raise RequestNotFound(f"no request {message.request_id} generates here", param="request_id")
        target = self.context.system.ref(message.worker, message.address or None)
        return await HandingOver(live, message, target, self._migration, self._clock).run()

    @handles(HoldSlots)
    async def hold_slots(self, _: HoldSlots) -> AsyncIterator[bool]:
        with self._slots.held():
            yield True
            await asyncio.Event().wait()  # Until whoever asked closes the stream.

    @handles(TurnAway)
    async def turn_away(self, _: TurnAway) -> None:
        self._slots.turn_away(self._draining)

    @handles(Retire, concurrent=True)
    async def retire(self, message: Retire) -> None:
        self._retiring = True
        if message.was_idle:
            self._slots.turn_away(self._draining)
        await self._idle.wait()
        await self._engine.leave(self._stop_timeout_s)

    @handles(EndAnswers)
    async def end_answers(self, _: EndAnswers) -> None:
        self._retiring = self._preempted = True
        self._slots.turn_away(lambda: _preempted(self._instance_id))
        for live in self._live.values():
            live.stream.put(_preempted(self._instance_id))
        self._prepared.give_up()

    def _draining(self) -> Draining:
        return Draining(f"instance {self._instance_id} is being stopped", retry_after_s=1.0)

    def _tell_activity(self, answered: Answered | None = None) -> None:
        activity = self._running.activity(self._clock.monotonic_s(), self._keep_alive_s, answered)
        self._manager.tell(activity)
        if activity.active:
            self._idle.clear()
        else:
            self._idle.set()
            self._expire_later(self._keep_alive_s)

    def _expire_later(self, idle_s: float) -> None:
        """Expire once nobody has asked for so long. What is put off is waited for by the task that waits already."""
        expires_s = self._clock.monotonic_s() + idle_s
        if self._expiry is not None and (expires_s < self._expires_s or idle_s == float("inf")):
            self._expiry.cancel()
            self._expiry = None
        self._expires_s = expires_s
        if self._expiry is None and not self._retiring and idle_s != float("inf"):
            self._expiry = self.context.tasks.spawn(self._expire(), "keep-alive")

    async def _expire(self) -> None:
        while True:
            await self._clock.sleep(self._expires_s - self._clock.monotonic_s())
            if self._clock.monotonic_s() >= self._expires_s:
                break
        self._expiry = None
        if self._idle.is_set():
            self._manager.tell(InstanceExpired(instance_id=self._instance_id))

    async def _await_death(self) -> None:
        reason = await asyncio.shield(self._engine.died)
        self._manager.tell(InstanceDied(instance_id=self._instance_id, reason=reason))

    async def stopped(self) -> None:
        self._engine.kill()


def _preempted(instance_id: str) -> Preempted:
    return Preempted(f"instance {instance_id} makes room for a more urgent request", retry_after_s=1.0)


def _with_adapter(request: Any, key: str) -> Any:
    return msgspec.structs.replace(request, adapter=key)


def _under(request: Any, request_id: str) -> Any:
    return msgspec.structs.replace(request, request_id=RequestId(request_id))
