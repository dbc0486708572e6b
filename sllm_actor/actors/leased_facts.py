"""What a node says of itself in the metadata store, as long as it is a member: all of it goes with its lease."""

from __future__ import annotations

import asyncio
import logging

from sllm_actor.actors.membership import Membership, Standing
from sllm_actor.errors import MetadataFailed
from sllm_actor.metadata import Put, Store
from sllm_actor.metadata.store import Delete, Operation
from sllm_actor.runtime import Clock
from sllm_actor.runtime.tasks import TaskScope

log = logging.getLogger(__name__)

# Of one commit, beside the condition that this node is a member.
MOST_AT_ONCE = 50
PAUSE_S = 0.5
# What no fact is written as.
UNSURE = b""


class LeasedFacts:
    """Brings the store to what this node says. What can't be written now is written later: nobody waits for it.

    What is said and taken back before it was written never gets there. `name` is for the log.
    """

    def __init__(self, store: Store, membership: Membership, clock: Clock, name: str) -> None:
        self._store = store
        self._membership = membership
        self._clock = clock
        self._name = name
        self._wanted: dict[str, bytes] = {}
        self._written: dict[str, bytes] = {}
        self._written_under: Standing | None = None
        self._changed = asyncio.Event()
        self._scope = TaskScope(name)

    def start(self) -> None:
        """Write from now on."""
        self._membership.listen(lambda _: self._changed.set())
        self._scope.spawn(self._write(), "write")

    async def stop(self) -> None:
        """Write no more; what was written ends with the lease."""
        await self._scope.close()

    def put(self, key: str, value: bytes) -> None:
        """Say something."""
        self._wanted[key] = value
        self._changed.set()

    def remove(self, key: str) -> None:
        """Take it back, if it was said."""
        self._wanted.pop(key, None)
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
                log.warning("%s can't be written now: %s", self._name, failed.message)
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
