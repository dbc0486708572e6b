"""The instances of all nodes in the metadata store: each node writes its own, under its lease, and reads all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import aclosing, suppress

import msgspec

from sllm_actor.actors.leased_facts import LeasedFacts
from sllm_actor.actors.membership import Membership
from sllm_actor.messages.instances import InstanceStarted
from sllm_actor.metadata import Fact, Store
from sllm_actor.metadata.follow import follow
from sllm_actor.runtime import Clock
from sllm_actor.runtime.tasks import TaskScope

ROUTES = "routes/"


class RouteBook:
    """Brings the store to what this node says of its instances, and tells `on_change` of everybody's.

    A route is never waited for. All of a node's go with its lease.
    """

    def __init__(
        self,
        store: Store,
        membership: Membership,
        clock: Clock,
        on_change: Callable[[Mapping[str, InstanceStarted]], None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._on_change = on_change
        self._own = LeasedFacts(store, membership, clock, "routes")
        # What was read of each key, and the revision that it was read at.
        self._known: dict[str, tuple[int, InstanceStarted | None]] = {}
        self._scope = TaskScope("routes")

    def start(self) -> None:
        """Write and follow from now on."""
        self._own.start()
        self._scope.spawn(self._follow(), "follow")

    async def stop(self) -> None:
        """Write and follow no more; what was written ends with the lease."""
        await self._own.stop()
        await self._scope.close()

    def add(self, instance: InstanceStarted) -> None:
        """Say that an instance of this node takes requests."""
        self._own.put(_key(instance), msgspec.msgpack.encode(msgspec.structs.replace(instance, spans=())))  # type: ignore[type-var]

    def remove(self, instance: InstanceStarted) -> None:
        """Say that one takes none any more."""
        self._own.remove(_key(instance))

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
