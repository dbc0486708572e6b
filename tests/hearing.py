"""A Scheduler that only listens, for what nodes report."""

from __future__ import annotations

from sllm_actor.messages.placement import NodeReport
from sllm_actor.runtime import Actor, handles


class Hearing(Actor):
    """Keeps the reports, the newest last."""

    def __init__(self) -> None:
        self.reports: list[NodeReport] = []

    @handles(NodeReport)
    async def hear(self, message: NodeReport) -> None:
        self.reports.append(message)
