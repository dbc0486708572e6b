"""The registrations in the metadata store, which the registries of all nodes share: known ones, and newer ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import msgspec

from sllm_actor.domain import Model, ModelName
from sllm_actor.errors import Conflict
from sllm_actor.metadata import Absent, Fact, Put, Store, Unchanged
from sllm_actor.metadata.follow import View
from sllm_actor.metadata.store import Condition, Delete, Operation, Outcome

log = logging.getLogger(__name__)

MODELS = "models/"

# Reads a registration; None is one that can't be read.
Decode = Callable[[Fact], Model | None]


def decode_model(fact: Fact) -> Model | None:
    """Read a registration; None for one of another version, or of another name than its key has."""
    try:
        model = msgspec.msgpack.decode(fact.value, type=Model)
    except msgspec.MsgspecError as wrong:
        log.warning("%s is no registration that this version knows: %s", fact.key, wrong)
        return None
    if MODELS + model.name != fact.key:
        log.warning("%s is no registration of that model, but of %s", fact.key, model.name)
        return None
    return model


class SharedModels:
    """Owns what this node knows of them, each by the revision of its last change.

    Nobody writes over what it has not seen. `followed` says whether views come after the first one.
    """

    def __init__(self, store: Store, *, followed: bool, decode: Decode = decode_model) -> None:
        self._store = store
        self._followed = followed
        self._decode = decode
        # By their keys in the store, as are the next ones.
        self._changed: dict[str, int] = {}
        self._loaded: View | None = None
        # The revision of the last view.
        self._seen = 0
        # Put by this node, and in no view yet.
        self._put: set[str] = set()
        # Removed by this node: what a view of before still has must not come back.
        self._removed: dict[str, int] = {}

    async def load(self) -> View:
        """Read all of them."""
        listing = await self._store.list(MODELS)
        facts = {fact.key: fact for fact in listing.facts}
        view = View(listing.revision, facts, facts.keys(), True)
        self._loaded = view if self._followed else None
        return view

    def taken(self) -> View | None:
        """Give what `load` has read to who goes on from there, once."""
        loaded, self._loaded = self._loaded, None
        return loaded

    def newer(self, view: View) -> dict[ModelName, Model | None]:
        """Take in a view; give what has changed by somebody else, None for what is no longer registered."""
        found: dict[ModelName, Model | None] = {}
        facts, decode, changed, removed = view.facts, self._decode, self._changed, self._removed
        # What the last view had already was looked at then; a store that was set back is looked through anew.
        seen = self._seen if self._seen <= view.revision else 0
        for key in view.changed:
            fact = facts.get(key)
            if fact is None or fact.changed <= seen or fact.changed <= changed.get(key, 0):
                continue
            if removed and fact.changed <= removed.get(key, 0):
                continue
            model = decode(fact)
            if model is not None:
                found[model.name] = model
                changed[key] = fact.changed
                if removed:
                    removed.pop(key, None)
        for key in self._gone(view):
            found[ModelName(key.removeprefix(MODELS))] = None
            del changed[key]
        self._put = {key for key in self._put if changed.get(key, 0) > view.revision}
        self._seen = view.revision
        # Views come in the order of their revisions: from here on none has what was removed before.
        self._removed = {key: revision for key, revision in removed.items() if revision > view.revision}
        return found

    def _gone(self, view: View) -> list[str]:
        """List the known ones that a view has no more.

        What this node has put itself may have been removed by others before it knew that it was put.
        """
        known, facts = self._changed, view.facts
        if not view.listed:
            known = {key: known[key] for key in dict.fromkeys((*view.changed, *self._put)) if key in known}
        return [key for key, revision in known.items() if key not in facts and revision <= view.revision]

    async def put(self, model: Model) -> None:
        """Store a registration.

        Raises:
            Conflict: somebody else has changed it since this node last heard.
        """
        key = MODELS + model.name
        await self._commit(model.name, [Put(key, msgspec.msgpack.encode(model))])

    async def delete(self, name: ModelName) -> None:
        """Remove a registration.

        Raises:
            Conflict: somebody else has changed it since this node last heard.
        """
        await self._commit(name, [Delete(MODELS + name)])

    async def _commit(self, name: ModelName, operations: list[Operation]) -> None:
        key = MODELS + name
        condition: Condition = Unchanged(key, self._changed[key]) if key in self._changed else Absent(key)
        outcome: Outcome = await self._store.commit([condition], operations)
        if not outcome.done:
            raise Conflict(f"{name} has been changed by another node just now", param="name")
        if isinstance(operations[0], Put):
            self._changed[key] = outcome.revision
            self._removed.pop(key, None)
            if self._followed:
                self._put.add(key)
        else:
            self._changed.pop(key, None)
            self._put.discard(key)
            if self._followed:
                self._removed[key] = outcome.revision


def based_on(models: Mapping[ModelName, Model], model: Model) -> Model | None:
    """Give an adapter's base, if it is registered."""
    return models.get(ModelName(model.base)) if model.base else None
