"""Pins and evictions by hand: what is to stay in host memory or on the SSD, and what is to go.

A pin is one of bytes, not of a name: all names of the same checkpoint share it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from sllm_actor.checkpoint.folder import Checkpoint
from sllm_actor.domain import TierChoice
from sllm_actor.errors import Conflict
from sllm_actor.loader.cards import Card
from sllm_actor.loader.lease import Resident
from sllm_actor.loader.ssd_quota import SsdEntry
from sllm_actor.loader.tiers import Tiers

_PLACES = {
    TierChoice.HOST: "in host memory",
    TierChoice.SSD: "on the SSD",
    TierChoice.ALL: "in host memory or on the SSD",
}


class Kept(NamedTuple):
    """A model as the tiers know it. `name` is for people; the SSD has it under one of `ssd_ids`, whole or partial."""

    name: str
    wanted: Checkpoint | Card | None
    ssd_ids: frozenset[str]

    @property
    def checkpoint(self) -> Checkpoint | None:
        """What host memory knows it by."""
        return self.wanted.checkpoint if isinstance(self.wanted, Card) else self.wanted


Change = Callable[[Tiers, Kept, TierChoice], Awaitable[tuple[TierChoice, ...]]]
"""One of `pin`, `unpin` and `evict`."""


def kept(name: str, wanted: Checkpoint | Card) -> Kept:
    """Say what the tiers know a model by; they have no copy of a plain folder on the SSD."""
    ids = {wanted.model_id, wanted.checkpoint.identity} - {""} if isinstance(wanted, Card) else ()
    return Kept(name, wanted, frozenset(ids))


async def pin(tiers: Tiers, model: Kept, choice: TierChoice) -> tuple[TierChoice, ...]:
    """Keep a model where it is whole; tell where that is.

    Raises:
        Conflict: no tier of the choice has it.
        WriteFailed, Draining: as `SsdTier.pin` does.
    """
    changed = await _mark(tiers, model, choice, pinned=True)
    if not changed:
        raise Conflict(f"{model.name} is not {_PLACES[choice]}, so that it can't be kept there", param="tier")
    return changed


async def unpin(tiers: Tiers, model: Kept, choice: TierChoice) -> tuple[TierChoice, ...]:
    """Let a model go where room is needed; tell where it was pinned.

    Raises:
        WriteFailed, Draining: as `SsdTier.pin` does.
    """
    return await _mark(tiers, model, choice, pinned=False)


async def _mark(tiers: Tiers, model: Kept, choice: TierChoice, *, pinned: bool) -> tuple[TierChoice, ...]:
    changed = []
    for entry in _copies(tiers, model, choice):
        if not entry.partial and (pinned or entry.pinned):
            await (tiers.ssd.pin(entry.model_id) if pinned else tiers.ssd.unpin(entry.model_id))
            changed.append(TierChoice.SSD)
    resident = _resident(tiers, model, choice)
    if model.checkpoint is not None and resident is not None and (pinned or resident.pinned):
        tiers.loader.pin(model.checkpoint, pinned)
        changed.append(TierChoice.HOST)
    return tuple(sorted(changed))


async def evict(tiers: Tiers, model: Kept, choice: TierChoice) -> tuple[TierChoice, ...]:
    """Give up what tiers have of a model, half a download too; tell which had something. All of it or nothing.

    Raises:
        Conflict: it is held, pinned or on its way; the message says where and by whom.
        WriteFailed, Draining: as `SsdTier.evict` does.
    """
    resident, copies = _resident(tiers, model, choice), _copies(tiers, model, choice)
    if choice is not TierChoice.SSD and isinstance(model.wanted, Card) and tiers.arriving(model.wanted) is not None:
        raise Conflict(f"{model.name} can't be evicted: it is just being loaded", param="model")
    if resident is not None:
        _check_free(model.name, TierChoice.HOST, resident)
    for entry in copies:
        _check_free(model.name, TierChoice.SSD, entry)
    changed = []
    if model.checkpoint is not None and resident is not None:
        tiers.loader.evict(model.checkpoint)
        changed.append(TierChoice.HOST)
    for entry in copies:
        await (tiers.ssd.forget(entry.model_id) if entry.partial else tiers.ssd.evict(entry.model_id))
        changed.append(TierChoice.SSD)
    return tuple(dict.fromkeys(changed))


def _check_free(name: str, tier: TierChoice, entry: Resident | SsdEntry) -> None:
    why = []
    if entry.holders:
        why.append(f"held by {', '.join(holder.who for holder in entry.holders)}")
    if entry.pinned:
        why.append("pinned")
    if why:
        raise Conflict(f"{name} can't be evicted: {_PLACES[tier]} it is {' and '.join(why)}", param="model")


def _resident(tiers: Tiers, model: Kept, choice: TierChoice) -> Resident | None:
    if model.checkpoint is None or choice is TierChoice.SSD:
        return None
    return tiers.loader.resident(model.checkpoint)


def _copies(tiers: Tiers, model: Kept, choice: TierChoice) -> list[SsdEntry]:
    if choice is TierChoice.HOST:
        return []
    return [entry for entry in tiers.ssd.entries() if entry.model_id in model.ssd_ids]
