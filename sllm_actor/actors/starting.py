"""A start as those see it who need an instance: a place from the Scheduler, then its node's ModelManager."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any, cast

import msgspec

from sllm_actor.actors.scheduler_way import SchedulerWay
from sllm_actor.actors.start_counts import StartCounts
from sllm_actor.domain import Model, ModelName, NodeId, RequestId, Span
from sllm_actor.errors import (
    ActorDied,
    DestinationFailed,
    Draining,
    EngineDied,
    Fenced,
    LeaseLost,
    NoCapacity,
    NodeUnreachable,
    NoSuchActor,
)
from sllm_actor.messages.instances import InstanceStarted, StartInstance, StartProgress
from sllm_actor.messages.models import GetModel
from sllm_actor.messages.placement import Placement, PlaceModel, RunsAlready
from sllm_actor.policy.retrying import UNKNOWN_S, rest_s
from sllm_actor.runtime import ActorRef, ActorSystem, Clock
from sllm_actor.units import format_bytes

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
# An instance or a node that has gone, or is going: another one may do it.
GONE = (Draining, NoSuchActor, ActorDied, NodeUnreachable)

# The priority of the most urgent who waits, and the instances that could not be reached.
Urgency = Callable[[], tuple[int, tuple[str, ...]]]


class Starting:
    """Asks for starts, and looks for another place where a node can't do what it was chosen for."""

    def __init__(
        self,
        manager: ActorRef,
        scheduler: SchedulerWay,
        clock: Clock,
        counts: StartCounts,
        *,
        ask_timeout_s: float,
        placement_timeout_s: float,
        start_timeout_s: float,
    ) -> None:
        self._manager = manager
        self._scheduler = scheduler
        self._clock = clock
        self._counts = counts
        self._ask_timeout_s = ask_timeout_s
        self._placement_timeout_s = placement_timeout_s
        self._start_timeout_s = start_timeout_s

    async def start(
        self,
        system: ActorSystem,
        request_id: RequestId,
        served: ModelName,
        adapter: str,
        urgency: Urgency,
        *,
        not_on: Sequence[NodeId] = (),
        only_on: str = "",
    ) -> tuple[InstanceStarted, tuple[Span, ...]]:
        """Have an instance of the model `served`, with an adapter's bytes beside its own where one is named; also one
        that runs already, or that others wait for. What it has taken is in the spans.

        Raises:
            SllmError: whatever went wrong, by its type.
        """
        begin_s = self._clock.monotonic_s()
        question = await self._question(request_id, served, adapter)
        question = msgspec.structs.replace(question, not_on=tuple(not_on), only_on=only_on)
        wish = StartInstance(placement_id="", model=served, adapter=ModelName(adapter))
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                placement = await self._place(question, *urgency())
            except DestinationFailed:
                if len(question.not_on) == len(not_on):
                    raise
                # Every other one has left, or could not do it a moment ago.
                question = msgspec.structs.replace(question, not_on=tuple(not_on))
                placement = await self._place(question, *urgency())
            placed = self._placed(placement, begin_s)
            try:
                instance = await self.use(system, placement, wish)
            except (*GONE, EngineDied, Fenced, LeaseLost) as gone:
                if attempt == MAX_ATTEMPTS:
                    raise
                log.warning("%s could not start %s: %s; another place is asked for", placement.node, served, gone)
                # From here; the leader may well reach it, and not know yet that nothing is to be started there.
                if isinstance(gone, NodeUnreachable | Draining):
                    if only_on:
                        raise
                    question = msgspec.structs.replace(question, not_on=(*question.not_on, placement.node))
                continue
            break
        return instance, (*placed, *instance.spans)

    def _placed(self, placement: Placement | RunsAlready, begin_s: float) -> tuple[Span, ...]:
        """One span for the wait, and in it one for bytes that came first, and one for making room, where those were."""
        end_s = self._clock.monotonic_s()
        spans = [Span(name="placement", begin_s=begin_s, end_s=end_s, tier=placement.node)]
        if isinstance(placement, Placement):
            parts = {"fetching": placement.fetched_s, "making room": placement.made_room_s}
            spans += [
                Span(name=name, begin_s=max(begin_s, end_s - part_s), end_s=end_s, tier=placement.node)
                for name, part_s in parts.items()
                if part_s
            ]
        return tuple(spans)

    async def _question(self, request_id: RequestId, served: ModelName, adapter: str) -> Any:
        model: Model = await self._manager.ask(GetModel(name=served), timeout_s=self._ask_timeout_s)
        adapter_bytes = 0
        if adapter:
            beside: Model = await self._manager.ask(GetModel(name=ModelName(adapter)), timeout_s=self._ask_timeout_s)
            adapter_bytes = beside.host_bytes
        return PlaceModel(
            request_id=request_id,
            model=model.name,
            fingerprint=model.fingerprint,
            size_bytes=model.size_bytes,
            host_bytes=model.host_bytes + adapter_bytes,
            timeout_s=self._placement_timeout_s,
            holders_only=not model.card,
        )

    async def _place(self, question: Any, priority: int, failed: tuple[str, ...]) -> Placement | RunsAlready:
        placement: Placement | RunsAlready = await self._scheduler.ask(
            msgspec.structs.replace(question, priority=priority, failed=failed),
            timeout_s=self._placement_timeout_s + self._ask_timeout_s,
        )
        self._counts.placements += 1
        return placement

    async def use(
        self, system: ActorSystem, placement: Placement | RunsAlready, wish: StartInstance
    ) -> InstanceStarted:
        """Have the instance that a placement is for.

        Raises:
            SllmError: whatever went wrong, by its type.
        """
        if isinstance(placement, RunsAlready):
            return InstanceStarted(
                instance_id=placement.instance_id,
                model=placement.model,
                node=placement.node,
                worker=placement.worker,
                address=placement.address,
                spans=(),
            )
        manager = system.ref(placement.manager, placement.address or None)
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
