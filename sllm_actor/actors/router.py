"""Finds each request an instance, starting one where there is none, and keeps the record of its tokens."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from sllm_actor.actors.explained import explained, explained_undecided, explained_warm
from sllm_actor.actors.going_on import Answered, Given, Tries, most_urgent, rest_of
from sllm_actor.actors.queued import CalledElsewhere, Queued
from sllm_actor.actors.request_log import RequestLog, RequestRecord
from sllm_actor.actors.routes import Routes
from sllm_actor.actors.scheduler_way import SchedulerWay
from sllm_actor.actors.start_counts import StartCounts
from sllm_actor.actors.starting import GONE, MAX_ATTEMPTS, Starting
from sllm_actor.actors.waiting_room import WaitingRoom
from sllm_actor.domain import ModelName, RequestId, Span, Timeline
from sllm_actor.errors import (
    Conflict,
    Draining,
    EngineDied,
    NoCapacity,
    Overloaded,
    Preempted,
    RequestNotFound,
    SllmError,
)
from sllm_actor.messages.embedding import Embed
from sllm_actor.messages.engine import Prefilled
from sllm_actor.messages.explanation import Explained, ExplainPlacement, ExplainRequest, Explanation
from sllm_actor.messages.generation import (
    Generate,
    GetTimeline,
    ListRequests,
    LocateRequest,
    Migrated,
    RequestLocation,
)
from sllm_actor.messages.instances import (
    AdapterHeld,
    EndStart,
    InstanceGone,
    InstanceStarted,
    NoSlot,
)
from sllm_actor.messages.placement import HurryPlacement
from sllm_actor.runtime import Actor, Clock, Ended, handles

log = logging.getLogger(__name__)

# Before a place is asked for anew, where none became free in time.
PAUSE_S = 0.2


class _Start:
    """A start under way, the request it was begun for, how many wait for it, and the lowest priority of them so far."""

    def __init__(self, request: Generate | Embed, failed: tuple[str, ...]) -> None:
        self.request = request
        self.failed = failed
        self.priority = request.priority
        self.waiters = 0
        self.ended: SllmError = Draining("the node is stopping")
        self.task: asyncio.Task[tuple[InstanceStarted, tuple[Span, ...]]]

    def joined_by(self, request: Generate | Embed, failed: tuple[str, ...]) -> bool:
        """Let another request wait, too; tell whether that changes what is asked for."""
        before = self.priority, self.failed
        self.priority = min(self.priority, request.priority)
        self.failed = tuple(dict.fromkeys((*self.failed, *failed)))
        return before != (self.priority, self.failed)


class Router(Actor):
    """Owns the routes (model to instance), the starts under way and the log of requests."""

    def __init__(
        self,
        scheduler: SchedulerWay,
        starting: Starting,
        log: RequestLog,
        clock: Clock,
        *,
        routes: Routes,
        room: WaitingRoom,
        counts: StartCounts,
        ask_timeout_s: float,
    ) -> None:
        self._scheduler = scheduler
        self._starting = starting
        self._log = log
        self._clock = clock
        self._room = room
        self._counts = counts
        self._ask_timeout_s = ask_timeout_s
        self._routes = routes
        self._starts: dict[ModelName, _Start] = {}
        # By their workers, those that it knows from starts.
        self._watched: dict[str, InstanceStarted] = {}
        self._queued = Queued(routes.idle)
        routes.on_free = self._queued.look

    # Each token of an answer goes through all generators of its request here, so these are few.

    @handles(Generate, stream=True)
    def generate(self, request: Generate) -> AsyncGenerator[Answered, None]:
        return self._answer(request)

    @handles(Embed, stream=True)
    def embed(self, request: Embed) -> AsyncGenerator[Answered, None]:
        return self._answer(request)

    async def _answer(self, request: Generate | Embed) -> AsyncGenerator[Answered, None]:
        """Run the request. Where its instance goes, another one goes on behind what has been given.

        Each that has it has an epoch of its own: nothing counts but the tokens of the current one.
        """
        with self._log.following(request) as record:
            failed: tuple[str, ...] = ()
            given, tries = Given(), Tries()
            moved: Migrated | None = None
            called: InstanceStarted | None = None
            tried: set[str] = set()
            while True:
                try:
                    instance = called or (_reached(moved) if moved else await self._instance(request, record, failed))
                except NoCapacity:
                    # Who had a place waits on for another one, as long as whoever asked waits.
                    if not tries.preempted:
                        raise
                    await self._clock.sleep(PAUSE_S)
                    continue
                self._log.route(record, instance)
                rest = rest_of(request, record.tokens, record.epoch, moved.migration_id if moved else "")
                moving, moved, called, had_slot = moved, None, None, False
                tried.add(instance.instance_id)
                try:
                    async with aclosing(self._items(instance, rest, record, moving, tried)) as items:
                        async for item in items:
                            had_slot = True
                            if isinstance(item, Migrated):
                                moved = item
                            elif given.is_new(item, record.epoch):
                                record.take(item, self._clock.monotonic_s())
                                yield item
                    if moved is None:
                        return
                    record.moved_s = self._clock.monotonic_s()
                except CalledElsewhere as call:
                    called = call.instance
                except SllmError as gone:
                    if not isinstance(gone, (*GONE, EngineDied)) and moving is None:
                        raise
                    self._routes.remove(instance.model, instance.instance_id)
                    failed = (*failed, instance.instance_id)
                    tries.note(gone, had_slot=had_slot)
                    if isinstance(gone, Preempted):
                        self._counts.preempted += 1
                        request = most_urgent(request) if tries.spared else request
                    if record.begun:
                        self._counts.recovered += 1
                        behind = len(record.tokens)
                        log.warning("%s goes on elsewhere behind %d tokens: %s", request.request_id, behind, gone)
                record.epoch += 1

    async def _items(
        self,
        instance: InstanceStarted,
        rest: Generate | Embed,
        record: RequestRecord,
        moving: Migrated | None,
        tried: set[str],
    ) -> AsyncGenerator[Answered | Migrated, None]:
        """Ask an instance, and note what its items say of the time that it takes.

        Raises:
            CalledElsewhere: it has no slot for the request, and another one has.
        """
        worker = self.context.system.ref(instance.worker, instance.address or None)
        self._routes.take(instance)
        try:
            async with aclosing(worker.stream(rest)) as items:
                async for item in items:
                    while isinstance(item, NoSlot):
                        try:
                            item = await self._queued.next_of(items, instance.model, tried, rest.priority)
                        except StopAsyncIteration:
                            return
                    if isinstance(item, Prefilled):
                        if moving is None:
                            record.spans.append(item.span)
                    elif isinstance(item, AdapterHeld):
                        record.spans.extend(item.spans)
                    else:
                        if moving is not None:
                            now_s = self._clock.monotonic_s()
                            span = Span(name="migration", begin_s=record.moved_s, end_s=now_s, tier=instance.node)
                            record.spans.append(span)
                            moving = None
                        yield item
        finally:
            self._routes.give(instance)

    async def _instance(
        self, request: Generate | Embed, record: RequestRecord, failed: tuple[str, ...]
    ) -> InstanceStarted:
        """Find the model an instance, or wait for the one start that all waiting requests share."""
        running = self._routes.choose(_served(request), request.prompt)
        if running is not None:
            return running
        record.cold = True
        with self._room.place(request.model):
            for _ in range(MAX_ATTEMPTS):
                instance, spans = await self._share(request, record, failed)
                # Another request may have begun the start, and been given what this one could not reach.
                if instance.instance_id not in failed:
                    break
                self._routes.remove(instance.model, instance.instance_id)
        record.spans.extend(spans)
        return instance

    async def _share(
        self, request: Generate | Embed, record: RequestRecord, failed: tuple[str, ...]
    ) -> tuple[InstanceStarted, tuple[Span, ...]]:
        """Wait for the start of the request's model; it ends when the last who waits for it leaves."""
        served = _served(request)
        start = self._starts.get(served)
        if start is None:
            start = self._starts[served] = _Start(request, failed)
            work = self._start(start)
            start.task = self.context.tasks.spawn(work, f"start-{served}", on_failure=lambda _: None)
            begun = start
            start.task.add_done_callback(lambda _: self._over(served, begun))
        if start.joined_by(request, failed):
            request_id, priority = start.request.request_id, start.priority
            self._scheduler.tell(HurryPlacement(request_id=request_id, priority=priority, failed=start.failed))
        record.start_of = start.request.request_id
        start.waiters += 1
        try:
            with self._room.start(served):
                await asyncio.wait([start.task])
        finally:
            start.waiters -= 1
            if not start.waiters and not start.task.done():
                start.task.cancel()
                self._over(served, start)
        if start.task.cancelled():
            raise start.ended
        return start.task.result()

    def _over(self, model: ModelName, start: _Start) -> None:
        """Let the next request begin anew."""
        if self._starts.get(model) is start:
            del self._starts[model]

    @handles(EndStart, concurrent=True)
    async def end_start(self, message: EndStart) -> bool:
        start = self._starts.get(message.model)
        if start is None:
            return False
        start.ended = Conflict(f"{message.model} was {message.why} while it started", param="model")
        start.task.cancel()
        self._over(message.model, start)
        await asyncio.wait([start.task])
        return True

    async def _start(self, start: _Start) -> tuple[InstanceStarted, tuple[Span, ...]]:
        request, served = start.request, _served(start.request)
        adapter = "" if request.model == served else request.model
        instance, spans = await self._starting.start(
            self.context.system, request.request_id, served, adapter, lambda: (start.priority, start.failed)
        )
        self._routes.add(instance)
        self._watch(instance)
        return instance, spans

    def _watch(self, instance: InstanceStarted) -> None:
        """Hear of its end from itself, too: a node that the store can't be reached from may never have published it."""
        if instance.worker in self._watched:
            return
        # Where too many are watched already, a request that fails there tells as much.
        with suppress(Overloaded):
            self.context.watch(self.context.system.ref(instance.worker, instance.address or None))
            self._watched[instance.worker] = instance

    @handles(Ended)
    async def worker_ended(self, ended: Ended) -> None:
        instance = self._watched.pop(ended.ref.name, None)
        if instance is not None:
            self._routes.remove(instance.model, instance.instance_id)

    @handles(InstanceGone)
    async def gone(self, message: InstanceGone) -> None:
        self._routes.remove(message.model, message.instance_id)

    @handles(GetTimeline)
    async def timeline(self, message: GetTimeline) -> Timeline:
        return self._log.timeline(message.request_id)

    @handles(ExplainRequest, concurrent=True)
    async def explain(self, message: ExplainRequest) -> Explained:
        try:
            timeline = self._log.timeline(message.request_id)
        except RequestNotFound:
            # The Scheduler remembers more of them, under the request that a start was begun for.
            return explained(await self._decision(message.request_id))
        if not timeline.cold:
            return explained_warm(timeline)
        try:
            decision = await self._decision(RequestId(timeline.start_of))
        except RequestNotFound:
            return explained_undecided(timeline)
        return explained(decision, timeline)

    async def _decision(self, request_id: RequestId) -> Explanation:
        question = ExplainPlacement(request_id=request_id)
        decision: Explanation = await self._scheduler.ask(question, timeout_s=self._ask_timeout_s)
        return decision

    @handles(ListRequests)
    async def requests(self, _: ListRequests) -> tuple[Timeline, ...]:
        return self._log.timelines()

    @handles(LocateRequest)
    async def locate(self, message: LocateRequest) -> RequestLocation:
        return self._log.location(message.request_id)


def _reached(moved: Migrated) -> InstanceStarted:
    return InstanceStarted(
        instance_id=moved.instance_id,
        model=moved.model,
        node=moved.node,
        worker=moved.worker,
        address=moved.address,
        spans=(),
    )


def _served(request: Generate | Embed) -> ModelName:
    """Name the model whose instances answer a request: an adapter's base, or the model itself."""
    return ModelName(request.base or request.model) if isinstance(request, Generate) else request.model
