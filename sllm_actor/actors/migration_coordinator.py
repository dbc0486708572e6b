"""Moves running requests between nodes."""

from __future__ import annotations

from sllm_actor.actors.scheduler_way import SchedulerWay
from sllm_actor.errors import AlreadyThere, NodeNotFound
from sllm_actor.messages.generation import LocateRequest, RequestLocation
from sllm_actor.messages.migration import MigrateRequest
from sllm_actor.messages.placement import ListNodes, NodeReport
from sllm_actor.runtime import Actor, ActorRef, handles


class MigrationCoordinator(Actor):
    """Checks what is asked against where requests run and which nodes there are.

    A node is alone in this version, so each request is where it was asked to go, or there is no such node.
    """

    def __init__(self, router: ActorRef, scheduler: SchedulerWay, *, ask_timeout_s: float) -> None:
        self._router = router
        self._scheduler = scheduler
        self._ask_timeout_s = ask_timeout_s

    @handles(MigrateRequest)
    async def migrate(self, message: MigrateRequest) -> None:
        location: RequestLocation = await self._router.ask(
            LocateRequest(request_id=message.request_id), timeout_s=self._ask_timeout_s
        )
        nodes: tuple[NodeReport, ...] = await self._scheduler.ask(ListNodes(), timeout_s=self._ask_timeout_s)
        if message.to not in {report.node for report in nodes}:
            known = ", ".join(sorted(report.node for report in nodes))
            raise NodeNotFound(f"there is no node {message.to!r}; the cluster has {known}", param="to")
        raise AlreadyThere(f"request {message.request_id} runs on {location.node} already", param="to")
