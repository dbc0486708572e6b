"""Grants each cold model the node that can start it soonest."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Any, cast

import msgspec

from sllm_actor.domain import NodeId
from sllm_actor.errors import DeliveryFailed, ModelTooLarge, NoCapacity, QueueFull
from sllm_actor.messages.instances import StopInstances
from sllm_actor.messages.placement import HurryPlacement, ListNodes, NodeReport, Placement, PlaceModel
from sllm_actor.policy.placement import Evict, Grant, Start, Wait, Waiter, decide, fits_nowhere, next_of
from sllm_actor.policy.retrying import Pace, placement_s
from sllm_actor.runtime import Actor, Clock, handles

log = logging.getLogger(__name__)

# A placement whose start has not begun by then was given to somebody who has left.
BEGIN_WITHIN_S = 10.0


class _Waiting:
    """Who waits, and what is to be told."""

    def __init__(self, question: PlaceModel, since_s: float) -> None:
        self.question = question
        self.since_s = since_s
        self.answer: asyncio.Future[Placement] = asyncio.get_running_loop().create_future()


class Scheduler(Actor):
    """Owns the cluster view: the newest report of every node, the grants not yet used, who waits."""

    def __init__(self, clock: Clock, *, lease_s: float, evict_timeout_s: float, max_waiting: int) -> None:
        self._clock = clock
        self._lease_s = lease_s
        self._evict_timeout_s = evict_timeout_s
        self._max_waiting = max_waiting
        self._reports: dict[NodeId, NodeReport] = {}
        self._grants: dict[str, Grant] = {}
        self._leaving: set[str] = set()
        self._waiting: list[_Waiting] = []
        self._placements = itertools.count(1)
        self._pace = Pace()

    @handles(NodeReport)
    async def hear(self, report: NodeReport) -> None:
        self._reports[report.node] = report
        for placement_id in report.ended_placements:
            self._grants.pop(placement_id, None)
        for placement_id in report.starting_placements:
            if placement_id in self._grants:  # A start that goes on keeps its room.
                expires_s = self._clock.monotonic_s() + self._lease_s
                self._grants[placement_id] = self._grants[placement_id]._replace(expires_s=expires_s)
        living = {view.instance_id for known in self._reports.values() for view in known.instances}
        self._leaving &= living
        self._serve()

    @handles(ListNodes)
    async def list_nodes(self, _: ListNodes) -> tuple[NodeReport, ...]:
        return tuple(self._reports.values())

    @handles(PlaceModel, concurrent=True)
    async def place(self, question: PlaceModel) -> Placement:
        now_s = self._clock.monotonic_s()
        if len(self._waiting) >= self._max_waiting:
            raise QueueFull(f"{len(self._waiting)} starts are waiting already", retry_after_s=self._pace.next_s(now_s))
        waiting = _Waiting(question, now_s)
        self._waiting.append(waiting)
        self._serve()
        try:
            async with asyncio.timeout(question.timeout_s):
                return await waiting.answer
        except TimeoutError:
            raise NoCapacity(
                f"no node could start {question.model} within {question.timeout_s:g} s: all of them are busy",
                retry_after_s=placement_s(question, list(self._reports.values())),
            ) from None
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            self._pace.note(self._clock.monotonic_s())

    @handles(HurryPlacement)
    async def hurry(self, message: HurryPlacement) -> None:
        for waiting in self._waiting:
            if waiting.question.request_id == message.request_id:
                priority = min(waiting.question.priority, message.priority)
                waiting.question = msgspec.structs.replace(cast(Any, waiting.question), priority=priority)
        self._serve()

    def _serve(self) -> None:
        """Grant by priority and then in the order of asking, until someone has to wait."""
        self._refuse()
        now_s = self._clock.monotonic_s()
        self._grants = {key: grant for key, grant in self._grants.items() if grant.expires_s > now_s}
        while self._waiting:
            place = next_of([Waiter(waiting.question, waiting.since_s) for waiting in self._waiting], now_s)
            waiting = self._waiting[place]
            decision = decide(
                waiting.question,
                list(self._reports.values()),
                self._grants.values(),
                frozenset(self._leaving),
            )
            if isinstance(decision, Wait):
                return
            if isinstance(decision, Evict):
                self._leaving.add(decision.victim.instance_id)
                self.context.tasks.spawn(self._evict(decision), f"evict-{decision.victim.instance_id}")
                return
            del self._waiting[place]
            if not waiting.answer.done():
                waiting.answer.set_result(self._grant(waiting.question, decision, now_s))

    def _refuse(self) -> None:
        """Tell those who would wait in vain, also behind others who don't."""
        for waiting in list(self._waiting):
            reason = fits_nowhere(waiting.question, list(self._reports.values()))
            if reason:
                self._waiting.remove(waiting)
                if not waiting.answer.done():
                    waiting.answer.set_exception(ModelTooLarge(reason, param="model"))

    def _grant(self, question: PlaceModel, start: Start, now_s: float) -> Placement:
        placement_id = f"placement-{next(self._placements)}"
        lease_s = min(self._lease_s, BEGIN_WITHIN_S)
        self._grants[placement_id] = Grant(start.report.node, question.host_bytes, now_s + lease_s)
        return Placement(
            placement_id=placement_id,
            node=start.report.node,
            manager=start.report.manager,
            estimate_s=start.estimate_s,
            lease_s=lease_s,
            reason=start.reason,
        )

    async def _evict(self, decision: Evict) -> None:
        """Ask for the victim's slot; the manager's next report tells when it is free."""
        manager = self.context.system.ref(decision.report.manager)
        victim = decision.victim
        stopped = 0
        try:
            stopped = await manager.ask(
                StopInstances(model=victim.model, instance_id=victim.instance_id, only_idle=True),
                timeout_s=self._evict_timeout_s,
            )
        except DeliveryFailed as error:
            log.warning("instance %s could not be given up: %s", victim.instance_id, error)
        if not stopped:
            self._leaving.discard(victim.instance_id)
            self._serve()
