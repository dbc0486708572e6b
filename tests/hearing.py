"""A Scheduler that only listens, for what nodes report."""

from __future__ import annotations

from sllm_actor.messages.placement import InstanceReport, NodeReport
from sllm_actor.runtime import Actor, handles


class Hearing(Actor):
    """Keeps the reports, the newest last, and those of single instances."""

    def __init__(self) -> None:
        self.reports: list[NodeReport] = []
        self.of_instances: list[InstanceReport] = []

    @handles(NodeReport)
    async def hear(self, message: NodeReport) -> None:
        self.reports.append(message)

    @handles(InstanceReport)
    async def hear_of_instance(self, message: InstanceReport) -> None:
        self.of_instances.append(message)
