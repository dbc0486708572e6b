"""The instances of all nodes in the metadata store: each node writes its own, under its lease, and reads all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import aclosing, suppress

import msgspec

from sllm_actor.actors.membership import Membership, Standing
from sllm_actor.errors import MetadataFailed
from sllm_actor.messages.instances import InstanceStarted
from sllm_actor.metadata import Fact, Put, Store
from sllm_actor.metadata.follow import follow
from sllm_actor.metadata.store import Delete, Operation
from sllm_actor.runtime import Clock
from sllm_actor.runtime.tasks import TaskScope

log = logging.getLogger(__name__)

ROUTES = "routes/"
# Of one commit, beside the condition that this node is a member.
MOST_AT_ONCE = 50
PAUSE_S = 0.5
# What no route is written as.
UNSURE = b""


class RouteBook:
    """Brings the store to what this node says of its instances, and tells `on_change` of everybody's.

    What can't be written now is written later: a route is never waited for. All of them go with the node's lease.
    """

    def __init__(
        self,
        store: Store,
        membership: Membership,
        clock: Clock,
        on_change: Callable[[Mapping[str, InstanceStarted]], None],
    ) -> None:
        self._store = store
        self._membership = membership
        self._clock = clock
        self._on_change = on_change
        self._wanted: dict[str, bytes] = {}
        self._written: dict[str, bytes] = {}
        self._written_under: Standing | None = None
        # What was read of each key, and the revision that it was read at.
        self._known: dict[str, tuple[int, InstanceStarted | None]] = {}
        self._changed = asyncio.Event()
        self._scope = TaskScope("routes")

    def start(self) -> None:
        """Write and follow from now on."""
        self._membership.listen(lambda _: self._changed.set())
        self._scope.spawn(self._write(), "write")
        self._scope.spawn(self._follow(), "follow")

    async def stop(self) -> None:
        """Write and follow no more; what was written ends with the lease."""
        await self._scope.close()

    def add(self, instance: InstanceStarted) -> None:
        """Say that an instance of this node takes requests."""
        self._wanted[_key(instance)] = msgspec.msgpack.encode(msgspec.structs.replace(instance, spans=()))  # type: ignore[type-var]
        self._changed.set()

    def remove(self, instance: InstanceStarted) -> None:
        """Say that one takes none any more."""
        self._wanted.pop(_key(instance), None)
        self._changed.set()

    async def _write(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            standing = self._membership.standing
            if standing is None:
                continue  # The next standing is told of.
            if standing != self._written_under:
                self._written, self._written_under = {}, standing
            try:
                while (operations := self._missing(standing)) and await self._commit(standing, operations):
                    pass
            except MetadataFailed as failed:
                log.warning("routes can't be written now: %s", failed.message)
                await self._clock.sleep(PAUSE_S)
                self._changed.set()

    def _missing(self, standing: Standing) -> list[Operation]:
        deletes: list[Operation] = [Delete(key) for key in self._written if key not in self._wanted]
        puts = [
            Put(key, value, standing.lease) for key, value in self._wanted.items() if self._written.get(key) != value
        ]
        return [*deletes, *puts][:MOST_AT_ONCE]

    async def _commit(self, standing: Standing, operations: list[Operation]) -> bool:
        # Whatever becomes of the answer, these may be there from now on, and must not be forgotten.
        self._written.update({one.key: UNSURE for one in operations if isinstance(one, Put)})
        outcome = await self._store.commit([standing.fence], operations)
        if not outcome.done:
            return False  # This node is a member no more, or again: it will be told.
        for operation in operations:
            if isinstance(operation, Put):
                self._written[operation.key] = operation.value
            else:
                self._written.pop(operation.key, None)
        return True

    async def _follow(self) -> None:
        async with aclosing(follow(self._store, ROUTES, self._clock)) as views:
            async for view in views:
                self._on_change(self._read(view.facts))

    def _read(self, facts: Mapping[str, Fact]) -> dict[str, InstanceStarted]:
        """Read the routes that have changed; one that can't be read is of another version, and left out."""
        known, self._known = self._known, {}
        found: dict[str, InstanceStarted] = {}
        for key, fact in facts.items():
            before = known.get(key)
            if before is None or before[0] != fact.changed:
                before = fact.changed, _instance(fact)
            self._known[key] = before
            if before[1] is not None:
                found[before[1].instance_id] = before[1]
        return found


def _key(instance: InstanceStarted) -> str:
    return f"{ROUTES}{instance.model}/{instance.instance_id}"


def _instance(fact: Fact) -> InstanceStarted | None:
    with suppress(msgspec.MsgspecError):
        instance: InstanceStarted = msgspec.msgpack.decode(fact.value, type=InstanceStarted)
        return instance
    return None
