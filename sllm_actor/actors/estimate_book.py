"""Keeps what a Scheduler has learned of starts in the metadata store, for whoever leads after it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

from sllm_actor.domain import NodeId
from sllm_actor.errors import Fenced, MetadataFailed
from sllm_actor.metadata import Outcome, Put, Store
from sllm_actor.metadata.store import Condition, Delete, Operation
from sllm_actor.policy.estimator import Estimator
from sllm_actor.policy.learned import packed, unpacked
from sllm_actor.runtime import Clock

log = logging.getLogger(__name__)

ESTIMATES = "estimates/"
# How often, and of how many nodes at once, something is written: at most some 25 KB each.
WRITE_EVERY_S = 10.0
MAX_AT_ONCE = 16

Commit = Callable[[Sequence[Condition], Sequence[Operation]], Awaitable[Outcome]]


class EstimateBook:
    """Belongs to one node; whoever leads there keeps one Scheduler's estimates with it. `commit` is fenced."""

    def __init__(self, store: Store, commit: Commit, clock: Clock) -> None:
        self._store = store
        self._commit = commit
        self._clock = clock

    async def keep(self, estimator: Estimator) -> None:
        """Let the estimator begin with what was kept, and keep what it learns, until cancelled."""
        try:
            await self._open(estimator)
        except MetadataFailed as failed:
            log.warning("what earlier leaders have learned of starts can't be read: %s", failed.message)
        while True:
            await self._clock.sleep(WRITE_EVERY_S)
            await self.write(estimator)

    async def _open(self, estimator: Estimator) -> None:
        for fact in (await self._store.list(ESTIMATES)).facts:
            kept = unpacked(fact.value)
            if kept is None:
                log.info("%s is nothing that this version can use", fact.key)
            else:
                estimator.restore(NodeId(fact.key.removeprefix(ESTIMATES)), kept)

    async def write(self, estimator: Estimator) -> None:
        """Write what has changed, a batch of it; what could not be written is tried again the next time."""
        batch = sorted(estimator.changed)[:MAX_AT_ONCE]
        if not batch:
            return
        estimator.changed.difference_update(batch)
        try:
            await self._commit([], [_operation(estimator, node) for node in batch])
        except Fenced:
            estimator.changed.update(batch)
        except MetadataFailed as failed:
            estimator.changed.update(batch)
            log.warning("what was learned of starts can't be kept for now: %s", failed.message)


def _operation(estimator: Estimator, node: NodeId) -> Operation:
    kept = estimator.of_node(node)
    return Delete(ESTIMATES + node) if kept is None else Put(ESTIMATES + node, packed(kept))
