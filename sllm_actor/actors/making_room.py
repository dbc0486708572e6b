"""Makes room on a node for a model that waits: idle instances stop, the answers of others move away or are ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from sllm_actor.actors.node_keeper import COORDINATOR
from sllm_actor.actors.start_counts import StartCounts
from sllm_actor.domain import NodeId
from sllm_actor.errors import SllmError
from sllm_actor.messages.explanation import Explanation, MovedAnswer
from sllm_actor.messages.instances import StopInstances
from sllm_actor.messages.migration import InstanceMoved, MoveInstance
from sllm_actor.messages.placement import InstanceView, NodeReport, Placement, RunsAlready
from sllm_actor.policy.cluster_view import ClusterView
from sllm_actor.policy.estimator import Estimator
from sllm_actor.policy.offers import Action
from sllm_actor.policy.placement import MakeRoom
from sllm_actor.runtime import ActorSystem, Clock

log = logging.getLogger(__name__)

PAUSE_S = 0.5

# Where each instance that moves goes on, by its id.
Destinations = Mapping[str, Placement | RunsAlready]


class NotIdle(Exception):
    """What was to leave because it is idle does something after all."""


class Room:
    """Room that is being made, which nobody else gets: a grant of this id stands for it."""

    def __init__(self, room_id: str, decision: MakeRoom, begin_s: float) -> None:
        self.room_id = room_id
        self.node = decision.report.node
        self.explanation: Explanation = decision.explanation
        self.begin_s = begin_s
        # All have left; the node's next report shows it.
        self.made = False
        self.moved: tuple[MovedAnswer, ...] = ()


class MakingRoom:
    """Asks instances to leave, and tells the view and the estimator what comes of it. Owns no more than that."""

    def __init__(
        self, view: ClusterView, estimator: Estimator, clock: Clock, counts: StartCounts, *, evict_timeout_s: float,
        move_timeout_s: float,
    ) -> None:  # fmt: skip
        self._view = view
        self._estimator = estimator
        self._clock = clock
        self._counts = counts
        self._evict_timeout_s = evict_timeout_s
        self._move_timeout_s = move_timeout_s

    @property
    def longest_s(self) -> float:
        """After this time room is made, or has failed to be."""
        return self._move_timeout_s + self._evict_timeout_s

    async def evict(self, system: ActorSystem, report: NodeReport, victim: InstanceView) -> bool:
        """Ask for the slot of an idle instance; the manager's next report tells when it is free."""
        manager = system.ref(report.manager, report.address or None)
        begin_s, stopped = self._clock.monotonic_s(), 0
        try:
            stopped = await manager.ask(
                StopInstances(model=victim.model, instance_id=victim.instance_id, only_idle=True),
                timeout_s=self._evict_timeout_s,
            )
        except SllmError as error:
            log.warning("instance %s could not be given up: %s", victim.instance_id, error)
        if stopped:
            self._estimator.learn_leave(report.node, self._clock.monotonic_s() - begin_s)
            return True
        if self._has_as_idle(report.node, victim.instance_id):
            # That a node can't be reached is said at once, and one that is no member refuses without having told why:
            # it must not be asked all the time until it has left, or reports.
            await self._clock.sleep(PAUSE_S)
        self._view.keep(report.node, victim.instance_id)
        return False

    def _has_as_idle(self, node: NodeId, instance_id: str) -> bool:
        known = self._view.nodes.get(node)
        instances = known.report.instances if known is not None else ()
        return any(one.instance_id == instance_id and not one.active for one in instances)

    async def make(self, system: ActorSystem, decision: MakeRoom, to: Destinations) -> tuple[MovedAnswer, ...]:
        """Have all leave that a decision names; give the answers that moved.

        Raises:
            SllmError: one of them stays, and goes on there; those that have left already have left.
            NotIdle: the same, and it was only taken for one that may leave.
        """
        report, offer = decision.report, decision.offer
        leaving = [self._leave(system, report, one, to.get(one.instance_id), offer.action) for one in offer.leaving]
        outcomes = await asyncio.gather(*leaving, return_exceptions=True)
        failed = [one for one in outcomes if isinstance(one, BaseException)]
        self._counts.rooms[f"{offer.action.value}{'_failed' if failed else ''}"] += 1
        if failed:
            raise failed[0]
        return tuple(answer for answers in outcomes if not isinstance(answers, BaseException) for answer in answers)

    async def _leave(
        self, system: ActorSystem, report: NodeReport, one: InstanceView, to: Placement | RunsAlready | None,
        action: Action,
    ) -> tuple[MovedAnswer, ...]:  # fmt: skip
        try:
            if to is not None:
                return await self._move(system, report, one, to)
            if action is Action.PREEMPT and one.active:
                await self._end(system, report, one)
            elif not await self.evict(system, report, one):
                raise NotIdle(f"instance {one.instance_id} is not idle any more")
        except SllmError:
            self._view.keep(report.node, one.instance_id)
            raise
        return ()

    async def _move(
        self, system: ActorSystem, report: NodeReport, one: InstanceView, to: Placement | RunsAlready
    ) -> tuple[MovedAnswer, ...]:
        coordinator = system.ref(COORDINATOR, report.address or None)
        # It is a struct, which a type checker does not see of messages.
        wish: Any = MoveInstance(instance_id=one.instance_id, worker=one.worker, model=one.model, to=to)
        moved: InstanceMoved = await coordinator.ask(wish, timeout_s=self.longest_s)
        return moved.answers

    async def _end(self, system: ActorSystem, report: NodeReport, one: InstanceView) -> None:
        manager = system.ref(report.manager, report.address or None)
        stop = StopInstances(model=one.model, instance_id=one.instance_id, preempt=True)
        await manager.ask(stop, timeout_s=self._evict_timeout_s)
