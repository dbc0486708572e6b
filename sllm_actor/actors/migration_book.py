"""The migrations under way in the metadata store: each node writes those that it coordinates, and may read all."""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol

import msgspec

from sllm_actor.actors.leased_facts import LeasedFacts
from sllm_actor.domain.migration import MigrationRecord
from sllm_actor.metadata import Store

MIGRATIONS = "migrations/"


class MigrationBook(Protocol):
    """Where a MigrationCoordinator notes what it does."""

    def note(self, record: MigrationRecord) -> None:
        """Say that a migration is under way, or how far it is now."""

    def forget(self, record: MigrationRecord) -> None:
        """Say that it has ended."""


class NoBook:
    """The book of a node without others: nothing moves there."""

    def note(self, record: MigrationRecord) -> None:
        """There is nobody to tell."""

    def forget(self, record: MigrationRecord) -> None:
        """There is nobody to tell."""


class SharedBook:
    """Written behind the migrations, under the lease of the node that coordinates them; none waits for it."""

    def __init__(self, facts: LeasedFacts) -> None:
        self._facts = facts

    def note(self, record: MigrationRecord) -> None:
        """Say that a migration is under way, or how far it is now."""
        self._facts.put(_key(record), msgspec.msgpack.encode(record))

    def forget(self, record: MigrationRecord) -> None:
        """Say that it has ended."""
        self._facts.remove(_key(record))


async def under_way(store: Store) -> tuple[MigrationRecord, ...]:
    """List the migrations of all nodes; those that a later version wrote and this one can't read are left out.

    Raises:
        MetadataFailed: the store can't be asked.
    """
    found = []
    for fact in (await store.list(MIGRATIONS)).facts:
        with suppress(msgspec.MsgspecError):
            found.append(msgspec.msgpack.decode(fact.value, type=MigrationRecord))
    return tuple(found)


def _key(record: MigrationRecord) -> str:
    return f"{MIGRATIONS}{record.migration_id}"
