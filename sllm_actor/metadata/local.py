"""A store whose facts live in this process; what makes them durable is its subclass's. Belongs to one event loop."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from itertools import count
from weakref import WeakValueDictionary

from sllm_actor.errors import MetadataFailed
from sllm_actor.metadata.facts import Facts, Plan
from sllm_actor.metadata.limits import StoreLimits
from sllm_actor.metadata.store import (
    Changes,
    Condition,
    Delete,
    Fact,
    Lease,
    LeaseId,
    Listing,
    Operation,
    Outcome,
    Present,
    Put,
    check_commit,
    check_key,
    check_prefix,
    check_ttl,
    check_watch,
)
from sllm_actor.runtime import Clock
from sllm_actor.runtime.tasks import TaskScope


class _Wake:
    """Ends the sleep of those who watch a prefix, at the first change below it."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.revision = 0


class LocalStore(ABC):
    """A `Store` in one process: leases go by its clock and end with it, watchers follow its memory."""

    def __init__(self, facts: Facts, clock: Clock, limits: StoreLimits) -> None:
        self._facts = facts
        self._clock = clock
        self._limits = limits
        self._writing = asyncio.Lock()
        # By prefix, as long as somebody sleeps there.
        self._wakes: WeakValueDictionary[str, _Wake] = WeakValueDictionary()
        self._lease_ids = count(1)
        self._scope = TaskScope("metadata")
        self._timer: asyncio.Task[None] | None = None
        self._timer_s = 0.0
        self._closed = False

    @abstractmethod
    async def _keep(self, plan: Plan) -> None:
        """Make a plan's changes durable, whole or not at all."""

    async def get(self, key: str) -> Fact | None:
        check_key(key, self._limits)
        await self._end_due()
        return self._facts.get(key)

    async def list(self, prefix: str) -> Listing:
        check_prefix(prefix, self._limits)
        await self._end_due()
        listing = self._facts.listing(prefix)
        if len(listing.facts) > self._limits.listing_facts:
            raise MetadataFailed(f"there are more than {self._limits.listing_facts} facts below {prefix!r}")
        return listing

    async def put(self, key: str, value: bytes, lease: LeaseId | None = None) -> int:
        return (await self.commit((), [Put(key, value, lease)])).revision

    async def delete(self, key: str) -> bool:
        return (await self.commit([Present(key)], [Delete(key)])).done

    async def commit(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> Outcome:
        check_commit(conditions, operations, self._limits)
        return (await self._write(lambda: self._facts.plan(conditions, operations))).outcome

    async def grant(self, ttl_s: int) -> Lease:
        check_ttl(ttl_s, self._limits)
        self._check_open()
        lease = Lease(LeaseId(next(self._lease_ids)), ttl_s)
        self._facts.grant(lease, self._clock.monotonic_s())
        self._await_ends()
        return lease

    async def keep_alive(self, lease: LeaseId) -> None:
        await self._end_due()
        self._facts.keep_alive(lease, self._clock.monotonic_s())

    async def revoke(self, lease: LeaseId) -> None:
        await self._write(lambda: self._facts.plan_end([lease]))

    async def watch(self, prefix: str, from_revision: int) -> AsyncGenerator[Changes, None]:
        check_watch(prefix, from_revision, self._limits)
        while True:
            self._check_open()
            wake = self._wakes.get(prefix)
            if wake is None:
                wake = self._wakes[prefix] = _Wake()
            up_to = self._facts.revision
            for changes in self._facts.since(prefix, from_revision):
                yield changes
                from_revision = changes.revision + 1
            # What is not below the prefix need not be looked through again, nor be kept for this watcher.
            from_revision = max(from_revision, up_to + 1)
            await wake.changed.wait()
            from_revision = max(from_revision, wake.revision)

    async def close(self) -> None:
        """End the watches and the timer; doing it twice does nothing."""
        self._closed = True
        for wake in self._wakes.values():
            wake.changed.set()
        await self._scope.close()

    def _check_open(self) -> None:
        if self._closed:
            raise MetadataFailed("the metadata store is closed")

    async def _write(self, make: Callable[[], Plan]) -> Plan:
        """Carry out what `make` plans, also where whoever asked for it is cancelled meanwhile."""
        self._check_open()
        work: asyncio.Task[Plan] = self._scope.spawn(self._write_alone(make), "write", on_failure=lambda _: None)
        await asyncio.wait([work])
        if work.cancelled():
            raise MetadataFailed("the metadata store is closed")
        return work.result()

    async def _write_alone(self, make: Callable[[], Plan]) -> Plan:
        async with self._writing:
            due = self._facts.due(self._clock.monotonic_s())
            if due:
                await self._carry_out(self._facts.plan_end(due))
            plan = make()
            await self._carry_out(plan)
            return plan

    async def _carry_out(self, plan: Plan) -> None:
        if plan.changes:
            await self._keep(plan)
        self._facts.apply(plan)
        if plan.changes:
            self._tell(plan)

    def _tell(self, plan: Plan) -> None:
        """Wake those below whose prefixes something has changed."""
        for prefix, wake in list(self._wakes.items()):
            if any(change.key.startswith(prefix) for change in plan.changes):
                wake.revision = plan.outcome.revision
                wake.changed.set()
                del self._wakes[prefix]

    async def _end_due(self) -> None:
        self._check_open()
        if self._facts.due(self._clock.monotonic_s()):
            await self._write(lambda: self._facts.plan_end(()))

    def _await_ends(self) -> None:
        """See to it that a timer runs that is early enough for the next end of a lease."""
        next_s = self._facts.next_end_s()
        if next_s is None or (self._timer is not None and not self._timer.done() and self._timer_s <= next_s):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_s = next_s
        self._timer = self._scope.spawn(self._end_in_time(), "leases")

    async def _end_in_time(self) -> None:
        while (next_s := self._facts.next_end_s()) is not None:
            self._timer_s = next_s
            wait_s = next_s - self._clock.monotonic_s()
            if wait_s > 0:
                await self._clock.sleep(wait_s)
            try:
                await self._end_due()
            except MetadataFailed:
                # The disk refuses for now: the leases stay due, and the next call or the next round ends them.
                await self._clock.sleep(self._limits.retry_last_s)
