"""Finds each request an instance, starting one where there is none, and keeps the record of its tokens."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

import msgspec

from sllm_actor.actors.explained import explained, explained_undecided, explained_warm
from sllm_actor.actors.going_on import Answered, Given, rest_of
from sllm_actor.actors.request_log import RequestLog, RequestRecord
from sllm_actor.actors.routes import Routes
from sllm_actor.actors.scheduler_way import SchedulerWay
from sllm_actor.actors.start_counts import StartCounts
from sllm_actor.actors.waiting_room import WaitingRoom
from sllm_actor.domain import Model, ModelName, RequestId, Span, Timeline
from sllm_actor.errors import (
    ActorDied,
    Conflict,
    Draining,
    EngineDied,
    Fenced,
    LeaseLost,
    NoCapacity,
    NodeUnreachable,
    NoSuchActor,
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
    RequestLocation,
)
from sllm_actor.messages.instances import (
    AdapterHeld,
    EndStart,
    InstanceGone,
    InstanceStarted,
    StartInstance,
    StartProgress,
)
from sllm_actor.messages.models import GetModel
from sllm_actor.messages.placement import HurryPlacement, Placement, PlaceModel, RunsAlready
from sllm_actor.policy.retrying import UNKNOWN_S, rest_s
from sllm_actor.runtime import Actor, ActorRef, Clock, handles
from sllm_actor.units import format_bytes

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
# An instance or a node that has gone, or is going: another one may do it.
GONE = (Draining, NoSuchActor, ActorDied, NodeUnreachable)


class _Start:
    """A start under way, the request it was begun for, how many wait for it, and the lowest priority of them so far."""

    def __init__(self, request: Generate | Embed, failed: tuple[str, ...]) -> None:
        self.request = request
        self.failed = failed
        self.priority = request.priority
        self.waiters = 0
        self.ended: SllmError = Draining("the node is stopping")
        self.task: asyncio.Task[tuple[InstanceStarted, tuple[Span, ...]]]


class Router(Actor):
    """Owns the routes (model to instance), the starts under way and the log of requests."""

    def __init__(
        self,
        manager: ActorRef,
        scheduler: SchedulerWay,
        log: RequestLog,
        clock: Clock,
        *,
        routes: Routes,
        room: WaitingRoom,
        counts: StartCounts,
        ask_timeout_s: float,
        placement_timeout_s: float,
        start_timeout_s: float,
    ) -> None:
        self._manager = manager
        self._scheduler = scheduler
        self._log = log
        self._clock = clock
        self._room = room
        self._counts = counts
        self._ask_timeout_s = ask_timeout_s
        self._placement_timeout_s = placement_timeout_s
        self._start_timeout_s = start_timeout_s
        self._routes = routes
        self._starts: dict[ModelName, _Start] = {}

    @handles(Generate)
    async def generate(self, request: Generate) -> AsyncGenerator[Answered, None]:
        async with aclosing(self._answer(request)) as items:
            async for item in items:
                yield item

    @handles(Embed)
    async def embed(self, request: Embed) -> AsyncGenerator[Answered, None]:
        async with aclosing(self._answer(request)) as items:
            async for item in items:
                yield item

    async def _answer(self, request: Generate | Embed) -> AsyncGenerator[Answered, None]:
        record = self._log.open(request)
        try:
            async for item in self._attempts(request, record):
                yield item
            record.outcome = "finished"
        except SllmError as error:
            record.outcome = error.code
            raise
        except (asyncio.CancelledError, GeneratorExit):
            record.outcome = "cancelled"
            raise
        finally:
            self._log.close(record)

    async def _attempts(self, request: Generate | Embed, record: RequestRecord) -> AsyncGenerator[Answered, None]:
        """Run the request. Where its instance goes, another one goes on behind what has been given."""
        failed: tuple[str, ...] = ()
        given = Given()
        for attempt in range(1, MAX_ATTEMPTS + 1):
            instance = await self._instance(request, record, failed)
            self._log.route(record, instance)
            worker = self.context.system.ref(instance.worker, instance.address or None)
            try:
                with self._routes.using(instance):
                    async with aclosing(worker.stream(rest_of(request, record.tokens))) as items:
                        async for item in items:
                            if isinstance(item, Prefilled):
                                record.spans.append(item.span)
                            elif isinstance(item, AdapterHeld):
                                record.spans.extend(item.spans)
                            elif given.is_new(item):
                                record.take(item, self._clock.monotonic_s())
                                yield item
                return
            except (*GONE, EngineDied) as gone:
                self._routes.remove(instance.model, instance.instance_id)
                failed = (*failed, instance.instance_id)
                if attempt == MAX_ATTEMPTS:
                    raise
                if record.begun:
                    self._counts.recovered += 1
                    log.warning(
                        "%s goes on elsewhere behind %d tokens: %s", record.request.request_id, len(record.tokens), gone
                    )

    async def _instance(
        self, request: Generate | Embed, record: RequestRecord, failed: tuple[str, ...]
    ) -> InstanceStarted:
        """Find the model an instance, or wait for the one start that all waiting requests share."""
        running = self._routes.choose(_served(request), request.prompt)
        if running is not None:
            return running
        record.cold = True
        with self._room.place(request.model):
            instance, spans = await self._share(request, record, failed)
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
        if request.priority < start.priority:
            start.priority = request.priority
            self._scheduler.tell(HurryPlacement(request_id=start.request.request_id, priority=start.priority))
        record.start_of = start.request.request_id
        start.waiters += 1
        try:
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
        begin_s, request, served = self._clock.monotonic_s(), start.request, _served(start.request)
        model: Model = await self._manager.ask(GetModel(name=served), timeout_s=self._ask_timeout_s)
        adapter_bytes = 0
        if request.model != served:
            adapter: Model = await self._manager.ask(GetModel(name=request.model), timeout_s=self._ask_timeout_s)
            adapter_bytes = adapter.host_bytes
        wish = StartInstance(
            placement_id="", model=model.name, adapter="" if request.model == served else request.model
        )
        question = PlaceModel(
            request_id=request.request_id,
            model=model.name,
            fingerprint=model.fingerprint,
            size_bytes=model.size_bytes,
            host_bytes=model.host_bytes + adapter_bytes,
            timeout_s=self._placement_timeout_s,
            holders_only=not model.card,
        )
        for attempt in range(1, MAX_ATTEMPTS + 1):
            placement = await self._place(start, question)
            placed = Span(name="placement", begin_s=begin_s, end_s=self._clock.monotonic_s(), tier=placement.node)
            try:
                instance = await self._use(placement, wish)
            except (*GONE, Fenced, LeaseLost) as gone:
                if attempt == MAX_ATTEMPTS:
                    raise
                log.warning("%s could not start %s: %s; another place is asked for", placement.node, served, gone)
                if isinstance(gone, NodeUnreachable):  # From here; the leader may well reach it.
                    question = msgspec.structs.replace(cast(Any, question), not_on=(*question.not_on, placement.node))
                continue
            break
        self._routes.add(instance)
        return instance, (placed, *instance.spans)

    async def _place(self, start: _Start, question: PlaceModel) -> Placement | RunsAlready:
        now = msgspec.structs.replace(cast(Any, question), priority=start.priority, failed=start.failed)
        placement: Placement | RunsAlready = await self._scheduler.ask(
            now, timeout_s=self._placement_timeout_s + self._ask_timeout_s
        )
        self._counts.placements += 1
        return placement

    async def _use(self, placement: Placement | RunsAlready, wish: StartInstance) -> InstanceStarted:
        if isinstance(placement, RunsAlready):
            return InstanceStarted(
                instance_id=placement.instance_id,
                model=placement.model,
                node=placement.node,
                worker=placement.worker,
                address=placement.address,
                spans=(),
            )
        manager = self.context.system.ref(placement.manager, placement.address or None)
        granted = msgspec.structs.replace(cast(Any, wish), placement_id=placement.placement_id, epoch=placement.epoch)
        return await self._started(manager, granted)

    async def _started(self, manager: ActorRef, message: StartInstance) -> InstanceStarted:
        """Wait for a start as long as it goes on: its time counts from the last bytes that came."""
        come, left_s, begin_s = "", UNKNOWN_S, self._clock.monotonic_s()
        try:
            async with aclosing(manager.stream(message)) as steps:
                while True:
                    async with asyncio.timeout(self._start_timeout_s):
                        step = await anext(steps)
                    if isinstance(step, InstanceStarted):
                        return step
                    if isinstance(step, StartProgress) and step.done_bytes:
                        come = f" after {format_bytes(step.done_bytes)} of {format_bytes(step.total_bytes)}"
                        left_s = rest_s(step.done_bytes, step.total_bytes, self._clock.monotonic_s() - begin_s)
        except TimeoutError:
            raise NoCapacity(
                f"{message.model} was not running, and nothing of it came, for {self._start_timeout_s:g} s{come}",
                retry_after_s=left_s,
            ) from None

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


def _served(request: Generate | Embed) -> ModelName:
    """Name the model whose instances answer a request: an adapter's base, or the model itself."""
    return ModelName(request.base or request.model) if isinstance(request, Generate) else request.model
