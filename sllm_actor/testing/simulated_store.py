"""A metadata store on virtual time that many nodes share, and ways to it that can be cut."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar

from sllm_actor.errors import MetadataUnavailable, MetadataUncertain
from sllm_actor.metadata import Changes, Fact, Lease, LeaseId, Listing, Outcome, StoreLimits
from sllm_actor.metadata.facts import Facts, Plan
from sllm_actor.metadata.local import LocalStore
from sllm_actor.metadata.store import Condition, Operation
from sllm_actor.runtime import Clock

T = TypeVar("T")


class MemoryStore(LocalStore):
    """The common truth: a `Store` in memory, that nothing happens to."""

    def __init__(self, clock: Clock, limits: StoreLimits | None = None) -> None:
        limits = limits or StoreLimits()
        super().__init__(Facts(limits), clock, limits)

    async def _keep(self, plan: Plan) -> None:
        """There is nothing that outlives it."""


class Way:
    """One node's `Store`: the common truth, some time away, and out of reach while `cut`.

    A call that is made while it is cut fails after the store's whole patience. With `loses_answers` it is carried out
    all the same, as if the answer alone had been lost.
    """

    def __init__(self, truth: MemoryStore, clock: Clock, *, latency_s: float = 0.001, patience_s: float = 10.0) -> None:
        self._truth = truth
        self._clock = clock
        self.latency_s = latency_s
        self.patience_s = patience_s
        self.cut = False
        self.loses_answers = False

    async def get(self, key: str) -> Fact | None:
        return await self._asked(lambda: self._truth.get(key))

    async def list(self, prefix: str) -> Listing:
        return await self._asked(lambda: self._truth.list(prefix))

    async def put(self, key: str, value: bytes, lease: LeaseId | None = None) -> int:
        return await self._asked(lambda: self._truth.put(key, value, lease))

    async def delete(self, key: str) -> bool:
        return await self._asked(lambda: self._truth.delete(key))

    async def commit(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> Outcome:
        return await self._asked(lambda: self._truth.commit(conditions, operations))

    async def grant(self, ttl_s: int) -> Lease:
        return await self._asked(lambda: self._truth.grant(ttl_s))

    async def keep_alive(self, lease: LeaseId) -> None:
        await self._asked(lambda: self._truth.keep_alive(lease))

    async def revoke(self, lease: LeaseId) -> None:
        await self._asked(lambda: self._truth.revoke(lease))

    async def watch(self, prefix: str, from_revision: int) -> AsyncGenerator[Changes, None]:
        async for changes in self._truth.watch(prefix, from_revision):
            await self._clock.sleep(self.latency_s)
            while self.cut:
                await self._clock.sleep(self.latency_s)
            yield changes

    async def close(self) -> None:
        """The truth is everybody's."""

    async def _asked(self, call: Callable[[], Awaitable[T]]) -> T:
        await self._clock.sleep(self.latency_s)
        if not self.cut:
            result = await call()
            await self._clock.sleep(self.latency_s)
            if not self.cut:
                return result
        elif self.loses_answers:
            await call()
        await self._clock.sleep(self.patience_s)
        kind = MetadataUncertain if self.loses_answers else MetadataUnavailable
        raise kind("nobody answers")
