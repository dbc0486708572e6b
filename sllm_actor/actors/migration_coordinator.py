"""Moves running requests between instances: finds who has one, and where it can go on, and has the one hand it over.

The migration itself is between the two workers and the request's Router. Whoever coordinates may die at any moment:
what is prepared ends with the source's stream, or is handed over already, and then the Router goes on with it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress

import msgspec

from sllm_actor.actors.migration_book import MigrationBook
from sllm_actor.actors.migration_counts import MigrationCounts
from sllm_actor.actors.nodes_desk import MANAGER
from sllm_actor.actors.starting import Starting
from sllm_actor.domain import ModelName, NodeId, RequestId
from sllm_actor.domain.migration import MigrationRecord
from sllm_actor.errors import (
    AlreadyThere,
    Conflict,
    DeliveryFailed,
    DestinationFailed,
    MigrationFailed,
    NodeNotFound,
    NodeUnreachable,
    RequestNotFound,
    SllmError,
)
from sllm_actor.messages.explanation import MovedAnswer
from sllm_actor.messages.generation import LocateRequest, RequestLocation
from sllm_actor.messages.instances import InstanceStarted, StartInstance, StopInstances
from sllm_actor.messages.migration import (
    HandedOver,
    HoldSlots,
    InstanceMoved,
    ListLive,
    LiveRequest,
    MigrateOut,
    MigrateRequest,
    MoveAway,
    MoveInstance,
    TurnAway,
)
from sllm_actor.policy.migration import Command, Event, State, step
from sllm_actor.runtime import Actor, ActorRef, handles

log = logging.getLogger(__name__)

ROUTER = "router"
MAX_DESTINATIONS = 3
# An instance that has new requests whenever the last ones have moved takes no more of them then.
MAX_SWEEPS = 3
SWEEP_EVERY_S = 0.1
# So often it is looked whether what waits for a place still generates.
LOOK_EVERY_S = 0.5
# So long nobody is given a slot that the moves away from a node make free.
HELD_S = 5.0


class MigrationCoordinator(Actor):
    """Owns the migrations that were asked of this node; `members` gives everybody's address as it is known here."""

    def __init__(
        self,
        own: NodeId,
        members: Callable[[], Mapping[NodeId, str]],
        starting: Starting,
        counts: MigrationCounts,
        book: MigrationBook,
        *,
        ask_timeout_s: float,
        migration_timeout_s: float,
        stop_timeout_s: float,
        max_migrations: int,
    ) -> None:
        self._own = own
        self._members = members
        self._starting = starting
        self._counts = counts
        self._book = book
        self._ask_timeout_s = ask_timeout_s
        self._migration_timeout_s = migration_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._room = asyncio.Semaphore(max_migrations)
        # The instances of this node that are on their way elsewhere.
        self._moving: set[str] = set()
        self._numbers = itertools.count(1)

    @handles(MigrateRequest, concurrent=True)
    async def migrate(self, message: MigrateRequest) -> HandedOver:
        at = await self._locate(message.request_id)
        known = {self._own, *self._members()}
        if message.to and message.to not in known:
            names = ", ".join(sorted(known))
            raise NodeNotFound(f"there is no node {message.to!r}; the cluster has {names}", param="to")
        if message.to == at.node:
            raise AlreadyThere(f"request {message.request_id} runs on {at.node} already", param="to")
        return await self._move(at, message.to)

    @handles(MoveAway, concurrent=True)
    async def move_away(self, message: MoveAway) -> int:
        """Move what an instance of this node generates; what can't be moved is left to end there."""
        moved, kept = 0, set[RequestId]()
        for _ in range(MAX_SWEEPS):
            live = [one for one in await self._generating(message.worker) if one.request_id not in kept]
            outcomes = await self._move_from(message, live)
            kept.update(one.request_id for one, has_moved in zip(live, outcomes, strict=True) if not has_moved)
            moved += sum(outcomes)
            if not any(outcomes):
                break
        return moved

    async def _move_from(self, message: MoveAway, live: Sequence[LiveRequest]) -> list[bool]:
        """Move some away, and have those follow that wait for a slot, if there is a place; tell which have moved."""
        at = [_location(one, self._own, message.worker, message.instance_id) for one in live]
        moves = [
            self.context.tasks.spawn(self._moves_away(one), f"move-{one.request_id}", on_failure=lambda _: None)
            for one in at
        ]
        try:
            if moves:
                async with self._no_slot_given(message.worker):
                    done, _ = await asyncio.wait(moves, timeout=HELD_S)
                    if any(move.result() for move in done):
                        await self._turn_away(message.worker)
            return list(await asyncio.gather(*moves))
        finally:
            for move in moves:
                move.cancel()

    async def _moves_away(self, at: RequestLocation) -> bool:
        try:
            await self._move(at, "")
        except SllmError as error:
            log.warning("%s is not moved from %s: %s", at.request_id, at.worker, error)
            return False
        return True

    @handles(MoveInstance, concurrent=True)
    async def move_instance(self, message: MoveInstance) -> InstanceMoved:
        """Let an instance go on elsewhere: first all its answers, and only then does it take no more of them."""
        if message.instance_id in self._moving:
            raise Conflict(f"instance {message.instance_id} is being moved already")
        self._moving.add(message.instance_id)
        try:
            wish = StartInstance(placement_id="", model=message.model)
            destination = await self._starting.use(self.context.system, message.to, wish)
            moved = dict[RequestId, MovedAnswer]()
            async with self._no_slot_given(message.worker):
                for _ in range(MAX_SWEEPS):
                    if not await self._sweep(message, destination, moved):
                        break
                await self._stop_while_sweeping(message, destination, moved)
        finally:
            self._moving.discard(message.instance_id)
        return InstanceMoved(answers=tuple(moved.values()))

    @asynccontextmanager
    async def _no_slot_given(self, worker: str) -> AsyncIterator[None]:
        """Have nothing begin to generate there in this block: it would only have to move, too."""
        async with aclosing(self.context.system.ref(worker).stream(HoldSlots())) as held:
            await anext(held)
            yield

    async def _stop_while_sweeping(
        self, message: MoveInstance, destination: InstanceStarted, moved: dict[RequestId, MovedAnswer]
    ) -> None:
        """Stop the instance: who waits for a slot is asked for elsewhere, what can't be moved is finished here."""
        stopping = self.context.tasks.spawn(self._stop(message), f"stop-{message.instance_id}")
        while not stopping.done():
            # Those that came in the last moment.
            with suppress(SllmError):
                await self._turn_away(message.worker)
                await self._sweep(message, destination, moved)
            await asyncio.wait([stopping], timeout=SWEEP_EVERY_S)
        stopping.result()

    async def _turn_away(self, worker: str) -> None:
        await self.context.system.ref(worker).ask(TurnAway(), timeout_s=self._ask_timeout_s)

    async def _stop(self, message: MoveInstance) -> None:
        stop = StopInstances(model=message.model, instance_id=message.instance_id)
        await self.context.system.ref(MANAGER).ask(stop, timeout_s=self._stop_timeout_s)

    async def _sweep(
        self, message: MoveInstance, destination: InstanceStarted, moved: dict[RequestId, MovedAnswer]
    ) -> bool:
        """Move what the instance generates at this moment, and note it; tell whether there was anything.

        Raises:
            SllmError: one of them can't be moved, and has not ended either.
        """
        live = await self._generating(message.worker)
        at = [_location(one, self._own, message.worker, message.instance_id) for one in live]
        moves = await asyncio.gather(*(self._move(one, "", destination) for one in at), return_exceptions=True)
        failed: BaseException | None = None
        for one, outcome in zip(live, moves, strict=True):
            if isinstance(outcome, HandedOver):
                moved[one.request_id] = MovedAnswer(
                    request_id=one.request_id, model=one.model, node=outcome.node, tokens=outcome.tokens,
                    rounds=outcome.rounds,
                )  # fmt: skip
            elif not _has_ended(outcome):
                failed = failed or outcome
        if failed is not None:
            raise failed
        return bool(live)

    async def _generating(self, worker: str) -> list[LiveRequest]:
        at = self.context.system.ref(worker)
        live: tuple[LiveRequest, ...] = await at.ask(ListLive(), timeout_s=self._ask_timeout_s)
        return [one for one in live if not one.waits]

    async def _locate(self, request_id: RequestId) -> RequestLocation:
        """Ask every node's Router, since any may have taken the request; who has it need not wait for the others."""
        question = LocateRequest(request_id=request_id)
        asked = [
            self.context.tasks.spawn(self._ask_router(node, question), "locate", lambda _: None)
            for node in sorted({self._own, *self._members()})
        ]
        try:
            for answer in asyncio.as_completed(asked):
                with suppress(RequestNotFound, DeliveryFailed):
                    found: RequestLocation = await answer
                    return found
        finally:
            for task in asked:
                task.cancel()
        raise RequestNotFound(f"no request {request_id} is generating", param="request_id")

    async def _ask_router(self, node: NodeId, question: LocateRequest) -> RequestLocation:
        location: RequestLocation = await self._at(node, ROUTER).ask(question, timeout_s=self._ask_timeout_s)
        return location

    def _at(self, node: NodeId, actor: str) -> ActorRef:
        address = None if node == self._own else self._members().get(node)
        if node != self._own and address is None:
            raise NodeUnreachable(f"{node} has left the cluster")
        return self.context.system.ref(actor, address)

    async def _move(self, at: RequestLocation, to: str, destination: InstanceStarted | None = None) -> HandedOver:
        """Move one request, as `policy.migration` says: find it a destination, and another one where that is lost."""
        if not {self._own, *self._members()} - {at.node}:
            raise MigrationFailed(f"there is no other node for request {at.request_id}")
        async with self._room:
            record = MigrationRecord(
                migration_id=f"{self._own}-{next(self._numbers)}", request_id=at.request_id, model=at.model,
                source=at.node, destination=NodeId(""), coordinator=self._own, state=State.PLACING,
            )  # fmt: skip
            try:
                return await self._step_by_step(at, to, destination, record)
            finally:
                self._book.forget(record)

    async def _step_by_step(
        self, at: RequestLocation, to: str, destination: InstanceStarted | None, record: MigrationRecord
    ) -> HandedOver:
        state, refused = State.PLACING if destination is None else State.RESUMING, list[NodeId]()
        while True:
            found = NodeId("") if destination is None else destination.node
            self._book.note(msgspec.structs.replace(record, destination=found, state=state))
            try:
                if destination is None:
                    destination = await self._destination(at, to, refused)
                    event = Event.READY
                else:
                    handed = await self._hand_over(at, destination)
                    event = Event.HANDED_OVER
            except SllmError as error:
                event = _event_of(error, destination, bool(to) or len(refused) + 1 == MAX_DESTINATIONS)
                if step(state, event).state is State.ABORTED:
                    self._counts.aborted += 1
                    raise
                log.warning("%s is to go elsewhere: %s", at.request_id, error)
            state, commands = step(state, event)
            if state is State.MOVED:
                self._counts.moved(handed)
                return handed
            if Command.CHOOSE_ANOTHER in commands and destination is not None:
                refused.append(destination.node)
                destination = None

    async def _destination(self, at: RequestLocation, to: str, refused: Sequence[NodeId]) -> InstanceStarted:
        """Find it a place elsewhere, as long as it generates: nobody waits for a place for what has ended."""
        placing = self.context.tasks.spawn(
            self._placed(at, to, refused), f"place-{at.request_id}", on_failure=lambda _: None
        )
        try:
            while not placing.done():
                await asyncio.wait([placing], timeout=LOOK_EVERY_S)
                if not placing.done() and (await self._locate(at.request_id)).instance_id != at.instance_id:
                    raise MigrationFailed(f"request {at.request_id} has left {at.node} before it had a place elsewhere")
            found: InstanceStarted = placing.result()
            return found
        finally:
            placing.cancel()

    async def _placed(self, at: RequestLocation, to: str, refused: Sequence[NodeId]) -> InstanceStarted:
        instance, _ = await self._starting.start(
            self.context.system,
            at.request_id,
            ModelName(at.served),
            "" if at.model == at.served else at.model,
            lambda: (at.priority, (at.instance_id,)),
            not_on=(at.node, *refused),
            only_on=to,
        )
        return instance

    async def _hand_over(self, at: RequestLocation, destination: InstanceStarted) -> HandedOver:
        message = MigrateOut(
            request_id=at.request_id,
            migration_id=f"{self._own}-{next(self._numbers)}-{at.request_id}",
            instance_id=destination.instance_id,
            model=destination.model,
            node=destination.node,
            worker=destination.worker,
            address=destination.address or self._members().get(destination.node, ""),
        )
        handed: HandedOver = await self._at(at.node, at.worker).ask(message, timeout_s=self._migration_timeout_s)
        return handed


def _event_of(error: SllmError, destination: InstanceStarted | None, last: bool) -> Event:
    """Tell what an error means: of a start, no place; of a hand-over, whose fault it was."""
    if destination is None:
        return Event.NO_PLACE
    if isinstance(error, DestinationFailed):
        return Event.NO_PLACE if last else Event.DESTINATION_LOST
    return Event.SOURCE_LOST if isinstance(error, DeliveryFailed) else Event.ENDED


def _has_ended(outcome: BaseException) -> bool:
    """Tell whether a request is not to be moved any more: it has ended, or somebody else moves it."""
    return isinstance(outcome, Conflict | RequestNotFound) and not isinstance(outcome, DestinationFailed)


def _location(one: LiveRequest, node: NodeId, worker: str, instance_id: str) -> RequestLocation:
    return RequestLocation(
        request_id=one.request_id,
        node=node,
        instance_id=instance_id,
        worker=worker,
        model=one.model,
        served=one.served,
        priority=one.priority,
    )
