"""This node's place in the cluster, held by a lease, and a view of everybody else's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass

import msgspec

from sllm_actor.domain.member import Member
from sllm_actor.domain.names import NodeId
from sllm_actor.errors import LeaseLost, MetadataFailed, NodeIdInUse
from sllm_actor.metadata import Absent, CreatedAt, Fact, LeaseId, Put, Store
from sllm_actor.metadata.follow import follow
from sllm_actor.policy.lease_term import LeaseTerm
from sllm_actor.policy.members import Joined, Left, View, differences
from sllm_actor.runtime import Clock
from sllm_actor.runtime.tasks import TaskScope

log = logging.getLogger(__name__)

NODES = "nodes/"
# Until somebody of our id must have lost its lease if it is dead: its time, and some for the store to notice.
PATIENCE_FACTOR, PATIENCE_S = 1.5, 2.0
LOOK_EVERY_S = 0.2
# The pause after a call that failed, as a part of the lease's time.
PAUSE_PART = 0.05


@dataclass(frozen=True, slots=True)
class Standing:
    """What a node holds while it is a member: its lease, and the epoch that its key was created in."""

    key: str
    lease: LeaseId
    epoch: int

    @property
    def fence(self) -> CreatedAt:
        """Give the condition that holds while this is so."""
        return CreatedAt(self.key, self.epoch)


class Membership:
    """Keeps this node a member. Who listens hears at once of a standing gained, or, as None, of one that is lost.

    A listener must have stopped owning when it returns: a quarter of the lease's time later others may own.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        member: Member,
        *,
        on_change: Callable[[Joined | Left], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._member = member
        self._key = NODES + member.node
        self._on_change = on_change
        self._listeners: list[Callable[[Standing | None], None]] = []
        self._scope = TaskScope("membership")
        self._standing: Standing | None = None
        self._term = LeaseTerm(member.ttl_s, clock.monotonic_s())
        self._members: dict[NodeId, Joined] = {}

    @property
    def members(self) -> View:
        """Everybody who is a member, as far as this node has heard."""
        return self._members

    @property
    def node(self) -> NodeId:
        """Whose membership this is."""
        return self._member.node

    def listen(self, listener: Callable[[Standing | None], None]) -> None:
        """Let somebody hear of each standing; the first to listen is told first."""
        self._listeners.append(listener)
        if self._standing is not None:
            listener(self._standing)

    @property
    def standing(self) -> Standing | None:
        """What this node holds now by its own clock; None where that is nothing, even if it was not noticed yet."""
        return self._standing if self._term.holds(self._clock.monotonic_s()) else None

    def held(self) -> Standing:
        """Give what this node holds, before it acts as an owner.

        Raises:
            LeaseLost: it holds nothing.
        """
        standing = self.standing
        if standing is None:
            raise LeaseLost(f"{self._member.node} is no member of the cluster just now")
        return standing

    async def start(self) -> None:
        """Join, and stay a member from then on.

        Raises:
            NodeIdInUse: another node of this id is a member, and stays one.
            MetadataFailed: the store can't be asked.
        """
        await self._join()
        self._scope.spawn(self._stay(), "stay")
        self._scope.spawn(self._look(), "look")

    async def stop(self) -> None:
        """Leave: whoever waits for this node's end need not wait for its lease."""
        await self._scope.close()
        standing = self._standing
        self._tell(None)
        if standing is not None:
            with suppress(MetadataFailed):
                await self._store.revoke(standing.lease)

    async def _join(self) -> Standing:
        """Join. What is joined slowly may be lost already."""
        await self._await_vacancy()
        sent_s = self._clock.monotonic_s()
        lease = await self._store.grant(self._member.ttl_s)
        put = Put(self._key, msgspec.msgpack.encode(self._member), lease.id)
        try:
            outcome = await self._store.commit([Absent(self._key)], [put])
        except BaseException:
            with suppress(MetadataFailed):
                await self._store.revoke(lease.id)
            raise
        if not outcome.done:
            await self._store.revoke(lease.id)
            raise self._in_use()
        self._term = LeaseTerm(self._member.ttl_s, sent_s)
        standing = Standing(self._key, lease.id, outcome.revision)
        self._tell(standing)
        return standing

    async def _await_vacancy(self) -> None:
        """Wait until nobody has this id: a node that was killed has it until its lease ends."""
        known = await self._store.get(self._key)
        if known is None:
            return
        ttl_s = max(self._member.ttl_s, _member(known).ttl_s)
        until_s = self._clock.monotonic_s() + PATIENCE_FACTOR * ttl_s + PATIENCE_S
        log.info(
            "another node %s is a member; if its lease ends within %d s, this one follows", self._member.node, ttl_s
        )
        while self._clock.monotonic_s() < until_s:
            await self._clock.sleep(LOOK_EVERY_S)
            seen = await self._store.get(self._key)
            if seen is None:
                return
            if seen.created != known.created:
                break
        raise self._in_use()

    def _in_use(self) -> NodeIdInUse:
        return NodeIdInUse(f"another node has the id {self._member.node}; give this one another", param="node_id")

    def _tell(self, standing: Standing | None) -> None:
        if standing == self._standing:
            return
        self._standing = standing
        for listener in self._listeners:
            listener(standing)

    async def _stay(self) -> None:
        while True:
            standing = self._standing
            assert standing is not None
            reason = await self._keep_alive(standing)
            self._tell(None)
            log.error("%s has lost its place in the cluster: %s", self._member.node, reason)
            again = await self._join_again(standing)
            log.warning("%s is a member again, in epoch %d", self._member.node, again.epoch)

    async def _keep_alive(self, standing: Standing) -> str:
        """Return why a standing is lost, when it is."""
        while True:
            now_s = self._clock.monotonic_s()
            await self._clock.sleep(max(0.0, min(self._term.next_s, self._term.given_up_s) - now_s))
            sent_s = self._clock.monotonic_s()
            failure = await self._kept_alive(standing, self._term.given_up_s - sent_s)
            # A process that was held up finds both the answer and the end of its time.
            if not self._term.holds(self._clock.monotonic_s()):
                return failure or "it was held up"
            if failure is None:
                self._term = LeaseTerm(self._member.ttl_s, sent_s)
            else:
                await self._clock.sleep(PAUSE_PART * self._member.ttl_s)

    async def _kept_alive(self, standing: Standing, timeout_s: float) -> str | None:
        """Keep the lease alive; give why that has failed, None where it has not."""
        try:
            async with asyncio.timeout(max(0.0, timeout_s)):
                await self._store.keep_alive(standing.lease)
                known = await self._store.get(standing.key)
        except LeaseLost as lost:
            return self._lost(lost.message)
        except MetadataFailed as failed:
            return failed.message
        except TimeoutError:
            return "the metadata store does not answer"
        if known is None or known.created != standing.epoch:
            return self._lost("it was removed")
        return None

    def _lost(self, reason: str) -> str:
        """End the term: what is lost for certain is not to be kept alive again."""
        self._term = LeaseTerm(self._member.ttl_s, self._clock.monotonic_s() - self._member.ttl_s)
        return reason

    async def _join_again(self, lost: Standing) -> Standing:
        while True:
            try:
                # Where it has not ended yet, its key would be in our own way.
                await self._store.revoke(lost.lease)
                return await self._join()
            except (MetadataFailed, NodeIdInUse) as error:
                log.warning("%s can't join again yet: %s", self._member.node, error.message)
                await self._clock.sleep(PAUSE_PART * self._member.ttl_s)

    async def _look(self) -> None:
        async with aclosing(follow(self._store, NODES, self._clock)) as views:
            async for view in views:
                before, after = self._take(view.facts, view.changed)
                for change in differences(before, after):
                    self._on_change(change)

    def _take(self, facts: Mapping[str, Fact], changed: Collection[str]) -> tuple[View, View]:
        """Take over what has changed; give what was known of it before, and what is now."""
        nodes = [NodeId(key.removeprefix(NODES)) for key in changed]
        before = {node: self._members[node] for node in nodes if node in self._members}
        after = _view({key: facts[key] for key in changed if key in facts})
        for node in before:
            del self._members[node]
        self._members.update(after)
        return before, after


def _member(fact: Fact) -> Member:
    try:
        return msgspec.msgpack.decode(fact.value, type=Member)
    except msgspec.MsgspecError as error:
        raise MetadataFailed(f"{fact.key} is no member that this version knows: {error}") from None


def _view(facts: Mapping[str, Fact]) -> View:
    """Read the members; one that can't be read is told of and left out."""
    view: dict[NodeId, Joined] = {}
    for key, fact in facts.items():
        try:
            view[NodeId(key.removeprefix(NODES))] = Joined(_member(fact), fact.created)
        except MetadataFailed as failed:
            log.warning("%s", failed.message)
    return view
