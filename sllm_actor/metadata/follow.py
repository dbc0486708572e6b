"""A view of all facts below a prefix that stays true: a listing, the changes since, and a listing again if need be."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Collection, Mapping
from contextlib import aclosing
from typing import NamedTuple

from sllm_actor.errors import MetadataCompacted, MetadataFailed
from sllm_actor.metadata.store import Fact, Store
from sllm_actor.runtime import Clock

log = logging.getLogger(__name__)

PAUSE_S = 0.5


class View(NamedTuple):
    """All facts below a prefix, by key, as they were together at a revision; true until the next view is asked for.

    Only those of the keys `changed` may differ from the view before. One that is `listed` anew also tells by what it
    has not what is gone.
    """

    revision: int
    facts: Mapping[str, Fact]
    changed: Collection[str]
    listed: bool


async def follow(store: Store, prefix: str, clock: Clock, seen: View | None = None) -> AsyncGenerator[View, None]:
    """Give the facts below `prefix`, at once and after each revision that changes one of them; behind a view that was
    `seen`, only the latter.

    It goes on while nobody answers, whatever the store says meanwhile, and gives what is true afterwards.
    """
    facts: dict[str, Fact] = {}
    while True:
        if seen is not None:
            revision, facts = seen.revision, dict(seen.facts)
            seen = None
        else:
            try:
                listing = await store.list(prefix)
            except MetadataFailed as failed:
                log.warning("what is below %s can't be listed for now: %s", prefix, failed.message)
                await clock.sleep(PAUSE_S)
                continue
            revision, before, facts = listing.revision, facts, {fact.key: fact for fact in listing.facts}
            yield View(revision, facts, before.keys() | facts.keys(), True)
        try:
            async with aclosing(store.watch(prefix, revision + 1)) as watch:
                async for changes in watch:
                    for change in changes.changes:
                        if change.fact is None:
                            facts.pop(change.key, None)
                        else:
                            facts[change.key] = change.fact
                    yield View(changes.revision, facts, [change.key for change in changes.changes], False)
        except MetadataCompacted:
            continue
        except MetadataFailed as failed:
            log.warning("what is below %s can't be followed for now: %s", prefix, failed.message)
            await clock.sleep(PAUSE_S)
