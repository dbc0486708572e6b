"""All the facts of one store in memory: what a commit does, which leases are due, which changes are still known.

Pure: no clock, no disk. A store asks for a `Plan`, makes it durable in its own way, and then applies it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf

from sllm_actor.errors import LeaseLost, MetadataCompacted
from sllm_actor.metadata.limits import StoreLimits
from sllm_actor.metadata.store import (
    Absent,
    Change,
    Changes,
    Condition,
    CreatedAt,
    Delete,
    Fact,
    HasValue,
    Kind,
    Lease,
    LeaseId,
    Listing,
    Operation,
    Outcome,
    Present,
    Put,
    Unchanged,
    prefix_end,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a commit would do: its outcome, the changes, and the leases that end with it."""

    outcome: Outcome
    changes: tuple[Change, ...]
    ended: tuple[LeaseId, ...] = ()


@dataclass(slots=True)
class _Held:
    lease: Lease
    ends_s: float
    keys: set[str]


class Facts:
    """Belongs to one store. `known` are the facts that it begins with, at `revision`."""

    def __init__(self, limits: StoreLimits, known: Iterable[Fact] = (), revision: int = 1) -> None:
        self.revision = revision
        self._facts = {fact.key.encode(): fact for fact in known}
        self._order = sorted(self._facts)
        self._leases: dict[LeaseId, _Held] = {}
        # No lease ends before this moment.
        self._ends_from_s = inf
        self._limits = limits
        self._history: deque[Changes] = deque()
        self._history_bytes = 0
        # What came before this revision is no longer known.
        self._kept_from = revision + 1

    def get(self, key: str) -> Fact | None:
        """Give a key's fact."""
        return self._facts.get(key.encode())

    def listing(self, prefix: str) -> Listing:
        """Give the facts of a prefix."""
        raw = prefix.encode()
        end = prefix_end(raw)
        first = bisect_left(self._order, raw)
        last = len(self._order) if end is None else bisect_left(self._order, end)
        return Listing(tuple(self._facts[key] for key in self._order[first:last]), self.revision)

    def plan(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> Plan:
        """Say what a commit would do.

        Raises:
            LeaseLost: a lease of the operations has ended.
        """
        if not all(self._holds(condition) for condition in conditions):
            keys = dict.fromkeys(condition.key for condition in conditions)
            seen = tuple(fact for key in keys if (fact := self.get(key)) is not None)
            return Plan(Outcome(False, self.revision, seen), ())
        for operation in operations:
            if isinstance(operation, Put) and operation.lease is not None:
                self._held(operation.lease)
        changes = [change for operation in operations if (change := self._change(operation)) is not None]
        return Plan(Outcome(True, self.revision + bool(changes)), tuple(changes))

    def plan_end(self, leases: Iterable[LeaseId]) -> Plan:
        """Say what the end of leases would delete; those that have ended are left out."""
        ended = tuple(lease for lease in dict.fromkeys(leases) if lease in self._leases)
        keys = sorted((key for lease in ended for key in self._leases[lease].keys), key=str.encode)
        changes = tuple(Change(Kind.DELETED, key, None) for key in keys)
        return Plan(Outcome(True, self.revision + bool(changes)), changes, ended)

    def apply(self, plan: Plan) -> None:
        """Make a plan true. Nothing else may have been applied since it was made."""
        for change in plan.changes:
            self._apply(change)
        for lease in plan.ended:
            del self._leases[lease]
        if plan.changes:
            self.revision = plan.outcome.revision
            self._remember(Changes(self.revision, plan.changes))

    def _remember(self, changes: Changes) -> None:
        self._history.append(changes)
        self._history_bytes += _size_bytes(changes)
        while len(self._history) > self._limits.kept_changes or self._history_bytes > self._limits.kept_bytes:
            oldest = self._history.popleft()
            self._history_bytes -= _size_bytes(oldest)
            self._kept_from = oldest.revision + 1

    def since(self, prefix: str, from_revision: int) -> list[Changes]:
        """Give the changes below a prefix from a revision on.

        Raises:
            MetadataCompacted: they are no longer all known.
        """
        if from_revision < self._kept_from:
            raise MetadataCompacted(f"changes from revision {from_revision} on are no longer kept; list anew")
        if from_revision > self.revision:
            return []
        found = []
        for changes in reversed(self._history):
            if changes.revision < from_revision:
                break
            below = tuple(change for change in changes.changes if change.key.startswith(prefix))
            if below:
                found.append(Changes(changes.revision, below))
        return found[::-1]

    def grant(self, lease: Lease, now_s: float) -> None:
        """Begin a lease."""
        self._leases[lease.id] = _Held(lease, now_s + lease.ttl_s, set())
        self._ends_from_s = min(self._ends_from_s, now_s + lease.ttl_s)

    def keep_alive(self, lease: LeaseId, now_s: float) -> None:
        """Let a lease's time begin anew.

        Raises:
            LeaseLost: it has ended.
        """
        held = self._held(lease)
        held.ends_s = now_s + held.lease.ttl_s

    def due(self, now_s: float) -> list[LeaseId]:
        """List the leases whose time has passed."""
        if now_s < self._ends_from_s:
            return []
        self._ends_from_s = min((held.ends_s for held in self._leases.values()), default=inf)
        return [lease for lease, held in self._leases.items() if held.ends_s <= now_s]

    def next_end_s(self) -> float | None:
        """Give the moment at which the next lease ends, if there are any."""
        return min((held.ends_s for held in self._leases.values()), default=None)

    def _held(self, lease: LeaseId) -> _Held:
        held = self._leases.get(lease)
        if held is None:
            raise LeaseLost(f"the lease {lease} has ended")
        return held

    def _holds(self, condition: Condition) -> bool:
        fact = self.get(condition.key)
        match condition:
            case Absent():
                return fact is None
            case Present():
                return fact is not None
            case Unchanged():
                return fact is not None and fact.changed == condition.changed
            case CreatedAt():
                return fact is not None and fact.created == condition.created
            case HasValue():
                return fact is not None and fact.value == condition.value

    def _change(self, operation: Operation) -> Change | None:
        before = self.get(operation.key)
        if isinstance(operation, Delete):
            return None if before is None else Change(Kind.DELETED, operation.key, None)
        revision = self.revision + 1
        created = revision if before is None else before.created
        fact = Fact(operation.key, operation.value, created, revision, operation.lease)
        return Change(Kind.PUT, operation.key, fact)

    def _apply(self, change: Change) -> None:
        raw = change.key.encode()
        before = self._facts.pop(raw, None)
        if before is not None and before.lease is not None:
            self._leases[before.lease].keys.discard(change.key)
        if change.fact is None:
            del self._order[bisect_left(self._order, raw)]
            return
        self._facts[raw] = change.fact
        if before is None:
            insort(self._order, raw)
        if change.fact.lease is not None:
            self._leases[change.fact.lease].keys.add(change.key)


def _size_bytes(changes: Changes) -> int:
    return sum(len(change.key) + len(change.fact.value if change.fact else b"") for change in changes.changes)
