"""Requests that are to come from other instances: their keys and values are held in this one's engine until they do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple

from sllm_actor.actors.slots import Slots
from sllm_actor.domain.tokens import unpack_uint32
from sllm_actor.engine.client import Engine
from sllm_actor.engine.streams import Parking
from sllm_actor.errors import Draining, MigrationFailed, NoCapacity, SllmError
from sllm_actor.messages.generation import Generate
from sllm_actor.messages.migration import ExtendPrepared, Prepare, Prepared
from sllm_actor.runtime import Clock
from sllm_actor.runtime.tasks import TaskScope

# Gives a request as the engine knows it, and its adapter, where it has one, held for as long as this is open.
Held = Callable[[Generate], AbstractAsyncContextManager[tuple[Generate, object]]]


class MigrationLimits(NamedTuple):
    """The knobs of a migration; most names are those of `Config`."""

    max_rounds: int
    threshold_tokens: int
    round_timeout_s: float
    hand_over_timeout_s: float
    take_over_timeout_s: float


class PreparedRequest:
    """One of them, with the slot that it holds."""

    def __init__(self) -> None:
        self.reached: asyncio.Queue[int | SllmError] = asyncio.Queue()
        self.parking: Parking | None = None
        self.taken = False
        self.task: asyncio.Task[None]

    @property
    def handed_over(self) -> bool:
        """Whether it waits for its Router alone."""
        return self.parking is not None and self.parking.handed_over

    def end(self) -> None:
        """Give up the slot and what is held."""
        self.task.cancel()


class PreparedRequests:
    """Owns them, by the ids of their migrations. `begin` and `end` hear of each, as of any other request."""

    def __init__(
        self,
        engine: Engine,
        slots: Slots,
        clock: Clock,
        held: Held,
        limits: MigrationLimits,
        begin: Callable[[str, Generate], None],
        end: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._slots = slots
        self._clock = clock
        self._held = held
        self._limits = limits
        self._begin = begin
        self._end = end
        self._prepared: dict[str, PreparedRequest] = {}

    async def prepare(self, message: Prepare, scope: TaskScope) -> AsyncGenerator[Prepared, None]:
        """Hold a request's tokens, and tell whenever all is computed that can be; whoever leaves without having handed
        it over ends it.

        Raises:
            MigrationFailed: something is prepared under this id.
            NoCapacity: no slot is free.
            SllmError: whatever the engine, or the adapter's load, says.
        """
        if message.migration_id in self._prepared:
            raise MigrationFailed(f"{message.migration_id} is being prepared already")
        if not self._slots.take_now():
            raise NoCapacity("no slot is free for a request that would come from elsewhere", retry_after_s=1.0)
        one = self._prepared[message.migration_id] = PreparedRequest()
        self._begin(message.migration_id, message.request)
        one.task = scope.spawn(self._hold(message, one), f"prepared-{message.migration_id}", on_failure=lambda _: None)
        # And not in the task itself: one that is ended at once never runs.
        one.task.add_done_callback(lambda _: self._over(message.migration_id))
        try:
            while True:
                reached = await one.reached.get()
                if isinstance(reached, SllmError):
                    raise reached
                yield Prepared(known_tokens=reached)
        finally:
            if not one.handed_over:
                one.end()

    async def _hold(self, message: Prepare, one: PreparedRequest) -> None:
        try:
            async with self._held(message.request) as (request, _):
                with self._engine.park(request) as one.parking:
                    while True:
                        one.reached.put_nowait(await one.parking.reached())
        except SllmError as error:
            one.reached.put_nowait(error)

    def _over(self, migration_id: str) -> None:
        self._slots.give()
        if self._prepared.pop(migration_id, None) is not None:
            self._end(migration_id)

    def extend(self, message: ExtendPrepared, scope: TaskScope) -> None:
        """Hold more tokens of one that is prepared, or, behind the last of them, have it wait for its Router alone.

        Raises:
            MigrationFailed: nothing is prepared under this id.
        """
        one = self._prepared.get(message.migration_id)
        if one is None or one.parking is None or one.handed_over:
            raise MigrationFailed(f"nothing is prepared for {message.migration_id}")
        if message.last:
            one.parking.hand_over()
            scope.spawn(self._await_router(one), f"handed-over-{message.migration_id}")
        else:
            one.parking.extend(unpack_uint32(message.token_ids))

    async def _await_router(self, one: PreparedRequest) -> None:
        await self._clock.sleep(self._limits.take_over_timeout_s)
        if not one.taken:
            one.end()

    def give_up(self) -> None:
        """End all that is not handed over yet: it goes on where it is."""
        for one in list(self._prepared.values()):
            if not one.handed_over:
                one.reached.put_nowait(Draining("the instance is being stopped", retry_after_s=1.0))
                one.end()

    def take(self, migration_id: str) -> PreparedRequest | None:
        """Give a request what was prepared for it, slot and all; whoever takes it ends it."""
        one = self._prepared.get(migration_id)
        if one is None or one.parking is None or not one.handed_over:
            return None
        del self._prepared[migration_id]
        self._end(migration_id)
        one.taken = True
        return one
