"""What is asked of the cluster as a whole: who there is, how they are, and what one or all of them are to do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from sllm_actor.actors.migration_book import under_way
from sllm_actor.actors.node_keeper import NODE_KEEPER
from sllm_actor.actors.scheduler_way import SchedulerWay
from sllm_actor.domain import NodeId
from sllm_actor.domain.migration import MigrationRecord
from sllm_actor.domain.roles import Roles
from sllm_actor.errors import NodeNotFound, NoLeader, SllmError
from sllm_actor.messages.instances import InstanceStatus, ListInstances, StopInstances
from sllm_actor.messages.operations import (
    Cordon,
    CordonNode,
    Drain,
    DrainNode,
    ListMigrations,
    NodeShown,
    Notice,
    NoticeNode,
    NoticeTaken,
    ShowNodes,
)
from sllm_actor.messages.placement import ListNodes, NodeReport
from sllm_actor.metadata import Store
from sllm_actor.runtime import Actor, ActorRef, handles

log = logging.getLogger(__name__)

MANAGER = "model-manager"


class NodesDesk(Actor):
    """Asks nodes on behalf of those who may not know them; `members` gives everybody's address as it is known here."""

    def __init__(
        self,
        own: NodeId,
        members: Callable[[], Mapping[NodeId, str]],
        roles: Callable[[], Mapping[NodeId, Roles]],
        way: SchedulerWay,
        store: Store,
        *,
        ask_timeout_s: float,
        stop_timeout_s: float,
    ) -> None:
        self._own = own
        self._members = members
        self._roles = roles
        self._way = way
        self._store = store
        self._ask_timeout_s = ask_timeout_s
        self._stop_timeout_s = stop_timeout_s

    @handles(ShowNodes, concurrent=True)
    async def show(self, _: ShowNodes) -> tuple[NodeShown, ...]:
        members = dict(self._members())
        reports: dict[NodeId, NodeReport] = {}
        leader = ""
        try:
            for report in await self._way.ask(ListNodes(), timeout_s=self._ask_timeout_s):
                reports[report.node] = report
        except NoLeader:
            log.info("nobody leads: of the nodes no more is known than that they are members")
        else:
            leader = self._way.ref.address.node if self._way.ref is not None else ""
        nodes = sorted(members.keys() | reports.keys())
        roles = self._roles()
        return tuple(
            _shown(node, members.get(node, ""), roles.get(node, frozenset()), node == leader, reports.get(node))
            for node in nodes
        )

    @handles(Cordon, concurrent=True)
    async def cordon(self, message: Cordon) -> None:
        keeper = self._at(message.node, NODE_KEEPER)
        await keeper.ask(CordonNode(cordoned=message.cordoned), timeout_s=self._ask_timeout_s)

    @handles(Drain, concurrent=True)
    async def drain(self, message: Drain) -> int:
        stopped: int = await self._at(message.node, NODE_KEEPER).ask(DrainNode(), timeout_s=self._stop_timeout_s)
        return stopped

    @handles(Notice, concurrent=True)
    async def notice(self, message: Notice) -> NoticeTaken:
        keeper, timeout_s = self._at(message.node, NODE_KEEPER), message.seconds + self._ask_timeout_s
        taken: NoticeTaken = await keeper.ask(NoticeNode(seconds=message.seconds), timeout_s=timeout_s)
        return taken

    @handles(ListInstances, concurrent=True)
    async def instances(self, message: ListInstances) -> tuple[InstanceStatus, ...]:
        answers: list[tuple[InstanceStatus, ...]] = await self._ask_managers(message, self._ask_timeout_s)
        return tuple(instance for answer in answers for instance in answer)

    @handles(ListMigrations, concurrent=True)
    async def migrations(self, _: ListMigrations) -> tuple[MigrationRecord, ...]:
        return await under_way(self._store)

    @handles(StopInstances, concurrent=True)
    async def stop(self, message: StopInstances) -> int:
        stopped: list[int] = await self._ask_managers(message, self._stop_timeout_s)
        return sum(stopped)

    def _at(self, node: NodeId, name: str) -> ActorRef:
        members = self._members()
        if node == self._own:
            return self.context.system.ref(name)
        if node not in members:
            known = ", ".join(sorted({self._own, *members}))
            raise NodeNotFound(f"there is no node {node[:100]!r}; the cluster has {known}", param="node")
        return self.context.system.ref(name, members[node])

    async def _ask_managers(self, message: object, timeout_s: float) -> list[Any]:
        """Ask the ModelManager of every node; give the answers of this one and of those that gave one."""
        nodes = sorted({self._own, *self._members()})
        asked = await asyncio.gather(
            *(self._at(node, MANAGER).ask(message, timeout_s=timeout_s) for node in nodes), return_exceptions=True
        )
        answers = []
        for node, answer in zip(nodes, asked, strict=True):
            if not isinstance(answer, BaseException):
                answers.append(answer)
            elif node == self._own or not isinstance(answer, SllmError):
                raise answer
            else:
                log.warning("%s does not answer %s: %s", node, type(message).__name__, answer.message)
        return answers


def _shown(node: NodeId, address: str, roles: Roles, leads: bool, report: NodeReport | None) -> NodeShown:
    named = tuple(sorted(roles))
    if report is None:
        return NodeShown(
            node=node, address=address, leads=leads, cordoned=False, reported=False, epoch=0, instances=0, active=0,
            slots=0, host_pool_bytes=0, checkpoints=0, roles=named,
        )  # fmt: skip
    return NodeShown(
        node=node,
        address=address,
        leads=leads,
        cordoned=report.cordoned,
        reported=True,
        epoch=report.epoch,
        instances=len(report.instances),
        active=sum(one.active for one in report.instances),
        slots=report.slots,
        host_pool_bytes=report.host_pool_bytes,
        checkpoints=len({*report.host_fingerprints, *report.ssd_fingerprints}),
        roles=named,
        host_fingerprints=report.host_fingerprints,
        ssd_fingerprints=report.ssd_fingerprints,
        starting=tuple(one.model for one in report.starting),
    )
