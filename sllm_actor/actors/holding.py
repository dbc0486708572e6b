"""New instances that make no room for others yet: their first request is on its way, or it is their model's turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sllm_actor.domain import NodeId
from sllm_actor.messages.placement import InstanceView, NodeReport
from sllm_actor.policy.cluster_view import ClusterView
from sllm_actor.policy.taking_turns import FIRST_REQUEST_S, TakingTurns
from sllm_actor.runtime import ActorContext, Clock


class Holding:
    """Belongs to one Scheduler, whose view it marks, and which may `serve` others once an instance is held no more."""

    def __init__(
        self, context: ActorContext, view: ClusterView, clock: Clock, turns: TakingTurns, serve: Callable[[], None]
    ) -> None:
        self._context = context
        self._view = view
        self._clock = clock
        self._turns = turns
        self._serve = serve

    def hear(self, report: NodeReport, now_s: float) -> None:
        """Hold what is new in a report that the view has, and let go what has been asked."""
        for instance_id, turn_s in self._turns.newcomers(report, now_s):
            self._view.hold(report.node, instance_id)
            self._context.tasks.spawn(self._hold(report.node, instance_id, turn_s), f"hold-{instance_id}")
        self.hear_of(report.node, report.instances, now_s)

    def hear_of(self, node: NodeId, instances: Iterable[InstanceView], now_s: float) -> None:
        """Let those go whose first request is there, or was, and whose turn is over."""
        for instance in instances:
            if self._turns.asked(node, instance, now_s):
                self._view.let_go(node, instance.instance_id)

    async def _hold(self, node: NodeId, instance_id: str, turn_s: float) -> None:
        await self._clock.sleep(turn_s)
        if self._turns.is_unasked(node, instance_id) and turn_s < FIRST_REQUEST_S:
            await self._clock.sleep(FIRST_REQUEST_S - turn_s)
        self._view.let_go(node, instance_id)
        self._serve()
