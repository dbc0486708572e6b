"""The instances of all nodes in the metadata store: each node writes its own, under its lease, and reads all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress

import msgspec

from sllm_actor.actors.leased_facts import LeasedFacts
from sllm_actor.actors.membership import Membership
from sllm_actor.messages.instances import InstanceStarted
from sllm_actor.metadata import Fact, Store
from sllm_actor.metadata.follow import View, follow
from sllm_actor.runtime import Clock
from sllm_actor.runtime.tasks import TaskScope

ROUTES = "routes/"

# Is told which instances have come, and which have gone.
Tell = Callable[[Sequence[InstanceStarted], Sequence[InstanceStarted]], None]


class RouteBook:
    """Brings the store to what this node says of its instances, and tells `on_change` of everybody's: come, and gone.

    Where nobody wants to know (`on_change` is None), nothing is followed. A route is never waited for. All of a node's
    go with its lease.
    """

    def __init__(
        self,
        store: Store,
        membership: Membership,
        clock: Clock,
        on_change: Tell | None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._on_change = on_change
        self._own = LeasedFacts(store, membership, clock, "routes")
        self._known: dict[str, InstanceStarted] = {}
        self._scope = TaskScope("routes")

    def start(self) -> None:
        """Write and follow from now on."""
        self._own.start()
        if self._on_change is not None:
            self._scope.spawn(self._follow(self._on_change), "follow")

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

    async def _follow(self, tell: Tell) -> None:
        async with aclosing(follow(self._store, ROUTES, self._clock)) as views:
            async for view in views:
                tell(*self._read(view))

    def _read(self, view: View) -> tuple[list[InstanceStarted], list[InstanceStarted]]:
        """Give the instances that have come and gone; one that can't be read is of another version, and left out.

        One that is written again has not come anew.
        """
        come, gone = list[InstanceStarted](), list[InstanceStarted]()
        for key in view.changed:
            fact, before = view.facts.get(key), self._known.pop(key, None)
            now = _instance(fact) if fact is not None else None
            if now is not None:
                self._known[key] = now
                if before is None:
                    come.append(now)
            elif before is not None:
                gone.append(before)
        return come, gone


def _key(instance: InstanceStarted) -> str:
    return f"{ROUTES}{instance.model}/{instance.instance_id}"


def _instance(fact: Fact) -> InstanceStarted | None:
    with suppress(msgspec.MsgspecError):
        instance: InstanceStarted = msgspec.msgpack.decode(fact.value, type=InstanceStarted)
        return instance
    return None
