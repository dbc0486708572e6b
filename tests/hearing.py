"""A Scheduler that only listens, for what nodes report."""

from __future__ import annotations

from sllm_actor.messages.placement import NodeChange, NodeReport
from sllm_actor.runtime import Actor, handles


class Hearing(Actor):
    """Keeps the reports, and what was told between them, the newest last."""

    def __init__(self) -> None:
        self.reports: list[NodeReport] = []
        self.changes: list[NodeChange] = []

    @handles(NodeReport)
    async def hear(self, message: NodeReport) -> None:
        self.reports.append(message)

    @handles(NodeChange)
    async def hear_of_change(self, message: NodeChange) -> None:
        self.changes.append(message)
