"""One leader at a time among those who campaign under one name, in the order in which they came.

Each candidate has a key under its lease. The one that was created first leads, and the revision of its creation is its
epoch: later leaders have higher ones, and a commit that is fenced by an epoch fails once its key has gone.
Source of the idea: etcd's own elections.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass

from sllm_actor.errors import Fenced, LeaseLost, MetadataCompacted, MetadataFailed
from sllm_actor.metadata.follow import follow
from sllm_actor.metadata.store import (
    Absent,
    Condition,
    CreatedAt,
    Delete,
    Fact,
    LeaseId,
    Operation,
    Outcome,
    Put,
    Store,
)
from sllm_actor.runtime import Clock

ELECTIONS = "elections/"


@dataclass(frozen=True, slots=True)
class Leader:
    """Who leads: what it campaigned with, the seat's key and its epoch."""

    value: bytes
    key: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Seat:
    """What an elected leader holds: the key that says so, and its epoch, the fencing token."""

    key: str
    epoch: int

    @property
    def fence(self) -> CreatedAt:
        """Give the condition that holds while nobody else can lead."""
        return CreatedAt(self.key, self.epoch)


async def campaign(store: Store, name: str, lease: LeaseId, value: bytes) -> Seat:
    """Return when this candidate leads. One that is cancelled meanwhile is a candidate no more.

    Raises:
        LeaseLost: the lease has ended, and the candidacy with it.
        MetadataFailed: the store can't be asked; whoever tries again keeps its place.
    """
    key = f"{ELECTIONS}{name}/{lease:016x}"
    try:
        outcome = await store.commit([Absent(key)], [Put(key, value, lease)])
        known = outcome.fact(key)
        seat = Seat(key, outcome.revision if known is None else known.created)
        await _await_turn(store, f"{ELECTIONS}{name}/", seat)
    except asyncio.CancelledError:
        # The key is this lease's alone; whether it was written already can't be known here.
        with suppress(MetadataFailed):
            await store.delete(key)
        raise
    return seat


async def resign(store: Store, seat: Seat) -> None:
    """Let the next candidate lead."""
    await store.commit([seat.fence], [Delete(seat.key)])


async def unseat(store: Store, leader: Leader) -> bool:
    """Let the next candidate lead, where it is certain that this one can't; tell whether it led until now.

    One that lives after all is fenced from here on, learns of it, and stands again behind the others.
    """
    outcome = await store.commit([CreatedAt(leader.key, leader.epoch)], [Delete(leader.key)])
    return outcome.done


async def commit_fenced(
    store: Store, seat: Seat, conditions: Sequence[Condition], operations: Sequence[Operation]
) -> Outcome:
    """Commit as the leader that one was elected as.

    Raises:
        Fenced: that leader leads no more; nothing was done.
    """
    outcome = await store.commit([seat.fence, *conditions], operations)
    if not outcome.done:
        known = outcome.fact(seat.key)
        if known is None or known.created != seat.epoch:
            raise Fenced(f"the leader of epoch {seat.epoch} leads no more")
    return outcome


async def observe(store: Store, name: str, clock: Clock) -> AsyncGenerator[Leader | None, None]:
    """Give who leads, at once and whenever it changes; None while nobody does."""
    known: Leader | None = None
    told = False
    async with aclosing(follow(store, f"{ELECTIONS}{name}/", clock)) as views:
        async for view in views:
            first = _first(view.facts.values())
            leader = None if first is None else Leader(first.value, first.key, first.created)
            if leader != known or not told:
                known, told = leader, True
                yield leader


def _first(facts: Iterable[Fact]) -> Fact | None:
    return min(facts, key=lambda fact: fact.created, default=None)


async def _await_turn(store: Store, prefix: str, seat: Seat) -> None:
    while True:
        listing = await store.list(prefix)
        if not any(fact.key == seat.key and fact.created == seat.epoch for fact in listing.facts):
            raise LeaseLost(f"the candidacy of epoch {seat.epoch} has ended")
        first = _first(listing.facts)
        if first is not None and first.key == seat.key:
            return
        with suppress(MetadataCompacted):
            await _await_departure(store, prefix, listing.revision + 1)


async def _await_departure(store: Store, prefix: str, from_revision: int) -> None:
    async with aclosing(store.watch(prefix, from_revision)) as watch:
        async for changes in watch:
            if any(change.fact is None for change in changes.changes):
                return
