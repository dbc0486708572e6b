"""What the rest of the house asks of a metadata store, and what is promised of each.

Keys are `/`-separated paths, values are bytes. One revision counts all changes of a store: a commit that changes
anything takes the next one, for all that it changes. Reads are linearizable. The model is etcd's, and small enough for
SQLite: docs/metadata.md has the keyspace and the guarantees.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import NewType, Protocol

from sllm_actor.errors import MetadataInvalid
from sllm_actor.metadata.limits import StoreLimits

LeaseId = NewType("LeaseId", int)


@dataclass(frozen=True, slots=True)
class Fact:
    """A key's value. `created` is the revision that it has been there since, `changed` that of its last change."""

    key: str
    value: bytes
    created: int
    changed: int
    lease: LeaseId | None


@dataclass(frozen=True, slots=True)
class Listing:
    """The facts of a prefix in the order of their keys' bytes, as they were together at `revision`."""

    facts: tuple[Fact, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class Lease:
    """Holds what is put under it for `ttl_s` after it was granted or last kept alive."""

    id: LeaseId
    ttl_s: int


@dataclass(frozen=True, slots=True)
class Absent:
    """Holds where the key has no value."""

    key: str


@dataclass(frozen=True, slots=True)
class Present:
    """Holds where the key has a value."""

    key: str


@dataclass(frozen=True, slots=True)
class Unchanged:
    """Holds where the key's last change is that of `changed`."""

    key: str
    changed: int


@dataclass(frozen=True, slots=True)
class CreatedAt:
    """Holds where the key has been there since `created`: the fencing of owners, whose epoch this is."""

    key: str
    created: int


@dataclass(frozen=True, slots=True)
class HasValue:
    """Holds where the key has this value."""

    key: str
    value: bytes


Condition = Absent | Present | Unchanged | CreatedAt | HasValue


@dataclass(frozen=True, slots=True)
class Put:
    """Write a value. Under a lease, it is deleted when that ends."""

    key: str
    value: bytes
    lease: LeaseId | None = None


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove a value, if there is one."""

    key: str


Operation = Put | Delete


@dataclass(frozen=True, slots=True)
class Outcome:
    """What has become of a commit. Where a condition did not hold, `seen` has the facts of the keys compared."""

    done: bool
    revision: int
    seen: tuple[Fact, ...] = ()

    def fact(self, key: str) -> Fact | None:
        """Give what a compared key had when a condition did not hold."""
        return next((fact for fact in self.seen if fact.key == key), None)


class Kind(enum.Enum):
    """What has happened to a key."""

    PUT = "put"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Change:
    """One key's change; `fact` is None where it was deleted."""

    kind: Kind
    key: str
    fact: Fact | None


@dataclass(frozen=True, slots=True)
class Changes:
    """All that one revision changed below the watched prefix."""

    revision: int
    changes: tuple[Change, ...]


class Store(Protocol):
    """Durable once a call has returned.

    Every call may raise `MetadataInvalid` for what is out of bounds, `MetadataUnavailable` where nobody answers in
    time, its subclass `MetadataUncertain` for a write that may have been made, and `MetadataFailed` for the rest.
    """

    async def get(self, key: str) -> Fact | None:
        """Give a key's fact, or None where there is none."""

    async def list(self, prefix: str) -> Listing:
        """Give the facts of all keys that begin with `prefix`; of all keys where it is empty."""

    async def put(self, key: str, value: bytes, lease: LeaseId | None = None) -> int:
        """Write a value, whole or not at all, and give its revision.

        Raises:
            LeaseLost: the lease has ended.
        """

    async def delete(self, key: str) -> bool:
        """Remove a value; false if there was none."""

    async def commit(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> Outcome:
        """Carry out all the operations, once, if all the conditions hold at that moment; none otherwise.

        Raises:
            LeaseLost: a lease of the operations has ended; nothing was done.
        """

    async def grant(self, ttl_s: int) -> Lease:
        """Begin a lease. Its `ttl_s` may be longer than was asked for."""

    async def keep_alive(self, lease: LeaseId) -> None:
        """Let a lease's time begin anew.

        Raises:
            LeaseLost: it has ended.
        """

    async def revoke(self, lease: LeaseId) -> None:
        """End a lease, and with it all that is held under it; one that has ended stays so."""

    def watch(self, prefix: str, from_revision: int) -> AsyncGenerator[Changes, None]:
        """Give every change below `prefix` from a revision on, in order, each once, for as long as it is read.

        Raises:
            MetadataCompacted: changes since then are no longer kept.
        """

    async def close(self) -> None:
        """Release the store; nothing may be asked of it afterwards."""


def check_key(key: str, limits: StoreLimits) -> bytes:
    """Give a key's bytes.

    Raises:
        MetadataInvalid: it is empty, too long, or no text without NUL.
    """
    if not key:
        raise MetadataInvalid("a key has at least one character", param="key")
    return check_prefix(key, limits)


def check_prefix(prefix: str, limits: StoreLimits) -> bytes:
    """Give a prefix's bytes; it may be empty.

    Raises:
        MetadataInvalid: it is too long, or no text without NUL.
    """
    try:
        raw = prefix.encode()
    except UnicodeEncodeError:
        raise MetadataInvalid(f"{prefix[:64]!r} is no text", param="key") from None
    if len(raw) > limits.key_bytes or b"\0" in raw:
        raise MetadataInvalid(f"{prefix[:64]!r} is no key: at most {limits.key_bytes} bytes, and no NUL", param="key")
    return raw


def check_ttl(ttl_s: int, limits: StoreLimits) -> None:
    """Refuse a lease that is shorter than a second or longer than the bound.

    Raises:
        MetadataInvalid: it is.
    """
    if not 1 <= ttl_s <= limits.lease_ttl_s:
        raise MetadataInvalid(f"a lease has 1 to {limits.lease_ttl_s} seconds, not {ttl_s}", param="ttl_s")


def check_watch(prefix: str, from_revision: int, limits: StoreLimits) -> bytes:
    """Give the bytes of a prefix to watch.

    Raises:
        MetadataInvalid: the prefix is no prefix, or the revision none.
    """
    if not 1 <= from_revision < 2**63:
        raise MetadataInvalid(f"revisions begin with 1; {from_revision} is none", param="from_revision")
    return check_prefix(prefix, limits)


def check_commit(conditions: Sequence[Condition], operations: Sequence[Operation], limits: StoreLimits) -> None:
    """Refuse a commit that is out of bounds, or that writes a key twice.

    Raises:
        MetadataInvalid: it is, or does.
    """
    if max(len(conditions), len(operations)) > limits.commit_operations:
        raise MetadataInvalid(f"a commit has at most {limits.commit_operations} conditions and operations")
    size_bytes = 0
    for part in (*conditions, *operations):
        value = part.value if isinstance(part, Put | HasValue) else b""
        if len(value) > limits.value_bytes:
            raise MetadataInvalid(f"the value of {part.key[:64]!r} has {len(value)} bytes, over {limits.value_bytes}")
        size_bytes += len(check_key(part.key, limits)) + len(value)
    if size_bytes > limits.commit_bytes:
        raise MetadataInvalid(f"a commit of {size_bytes} bytes is over {limits.commit_bytes}")
    if len({operation.key for operation in operations}) < len(operations):
        raise MetadataInvalid("a commit writes each key once")


def prefix_end(prefix: bytes) -> bytes | None:
    """Give the first bytes after all that begin with `prefix`; None where nothing is after them."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes([kept[-1] + 1]) if kept else None
