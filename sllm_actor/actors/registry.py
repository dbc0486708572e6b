"""The registered models of this node: durable in the metadata store, each with the description of its checkpoint."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from pathlib import Path

import msgspec

from sllm_actor.actors.bases import base_of, check_unused
from sllm_actor.actors.on_disk import OnDisk, Wanted
from sllm_actor.actors.registration import Examiner, read_off_loop
from sllm_actor.actors.same_model import runs_alike, same_but_time, source_of
from sllm_actor.actors.shared_models import MODELS, Decode, SharedModels, based_on, decode_model
from sllm_actor.checkpoint.adapter import LoraConfig
from sllm_actor.domain import Backend, Model, ModelName, TierChoice
from sllm_actor.errors import (
    CheckpointChanged,
    CheckpointInvalid,
    Conflict,
    Draining,
    ModelExists,
    ModelNotFound,
    SllmError,
)
from sllm_actor.loader import keeping
from sllm_actor.loader.cards import Card
from sllm_actor.loader.host_memory import Key
from sllm_actor.loader.keeping import Kept, kept
from sllm_actor.loader.order import key_of
from sllm_actor.loader.tiers import Tiers
from sllm_actor.messages.models import RegisterModel
from sllm_actor.metadata import Store
from sllm_actor.metadata.follow import follow
from sllm_actor.runtime import Clock
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.units import format_bytes

log = logging.getLogger(__name__)


class Registry:
    """Owns the registrations. One change of a name at a time.

    Where other nodes share the store, what they change is `followed`.
    """

    def __init__(
        self, store: Store, examiner: Examiner, tiers: Tiers, clock: Clock, *, shared: bool = False,
        decode: Decode = decode_model,
    ) -> None:  # fmt: skip
        self._store = store
        self._stored = SharedModels(store, followed=shared, decode=decode)
        self._examiner = examiner
        self._tiers = tiers
        self._clock = clock
        self._models: dict[ModelName, Model] = {}
        self._wanted: dict[ModelName, Wanted] = {}
        self.on_disk = OnDisk(self._models, self._wanted, tiers, shared=shared)
        # Those of which instances always run, and all cards, where somebody has asked since a registration has changed.
        self._kept: tuple[Model, ...] | None = None
        self._cards: frozenset[str] | None = None
        self._changing: set[ModelName] = set()
        self._examining = 0
        self._scope = TaskScope("registry")
        self._reading: dict[tuple[str, str], asyncio.Task[Wanted]] = {}
        # Called when a model of another node's registering was found here.
        self.on_found: Callable[[], None] = lambda: None

    async def open(self) -> None:
        """Read what was registered before, say what can't start here, and drop the cards that no model has."""
        self._take(self._stored.newer(await self._stored.load()))
        pool_bytes = self._tiers.loader.pool_bytes
        for model in self._models.values():
            if model.host_bytes > pool_bytes:
                needs, has = format_bytes(model.host_bytes), format_bytes(pool_bytes)
                log.warning(
                    "%s can't start: it needs %s of host memory, the pool has %s; raise host_pool_bytes",
                    model.name, needs, has,
                )  # fmt: skip
        await self._tiers.recover()
        await self._sweep()
        for model in self._models.values():
            if not model.card:
                continue
            try:
                self._wanted[model.name] = await self._tiers.card(model.card)
            except CheckpointInvalid:
                continue  # It is made anew when it is needed.
        self._look_again()
        for held in self._tiers.ssd.given_up:
            names = ", ".join(self.names_by_model_id().get(held.model_id, ())) or held.model_id
            size, quota = format_bytes(held.size_bytes), format_bytes(self._tiers.ssd.quota_bytes)
            log.warning("%s (%s) was given up on the SSD: the quota of %s does not hold it", names, size, quota)

    def _take(self, changed: Mapping[ModelName, Model | None]) -> None:
        """Take over registrations as they are on this node: what is kept of a model lies in its own folder."""
        if not changed:
            return
        for name, model in changed.items():
            self._wanted.pop(name, None)
            if model is None:
                self._models.pop(name, None)
            else:
                path = str(self._tiers.card_folder(model.card)) if model.card else model.path
                self._models[name] = model if path == model.path else msgspec.structs.replace(model, path=path)
        for adapter in [model for model in self._models.values() if model.base]:
            base = based_on(self._models, adapter)
            if base is not None and base.path != adapter.text_path:
                self._models[adapter.name] = msgspec.structs.replace(adapter, text_path=base.path)
        self._look_again()

    async def followed(self) -> AsyncGenerator[tuple[ModelName, bool], None]:
        """Give the name of each model that another node has changed, once this one knows.

        With it goes whether what runs of it is now another one's, or nobody's.
        """
        for name in self._models:
            if name not in self._wanted:  # What `open` has read is known already.
                self._look_for(name)
        async with aclosing(follow(self._store, MODELS, self._clock, self._stored.taken())) as views:
            async for view in views:
                changed = self._stored.newer(view)
                before = {name: self._models.get(name) for name in changed}
                self._take(changed)
                for name, known in before.items():
                    model = self._models.get(name)
                    self._look_for(name)
                    yield name, known is None or model is None or not runs_alike(known, model)
                await self._sweep()

    def _look_for(self, name: ModelName) -> None:
        """Find out whether a folder is here, or bring what is small of what is elsewhere."""
        model = self._models.get(name)
        if model is not None:
            self._scope.spawn(self._look(model), "look")

    async def _look(self, model: Model) -> None:
        try:
            await self.wanted(model)
        except SllmError as error:
            log.warning("%s can't be started on this node: %s", model.name, error.message)
        else:
            self.on_found()

    def models(self) -> list[Model]:
        """List the registrations by name."""
        return [self._models[name] for name in sorted(self._models)]

    def known(self, name: ModelName) -> Model | None:
        """Give a registration, None where there is none."""
        return self._models.get(name)

    def find(self, name: ModelName) -> Model:
        """Give a registration.

        Raises:
            ModelNotFound: there is none of this name.
        """
        model = self._models.get(name)
        if model is None:
            raise ModelNotFound(f"the model {name!r} does not exist", param="model")
        return model

    def keeps(self, name: ModelName) -> bool:
        """Tell whether instances of a model run also while nobody asks."""
        model = self._models.get(name)
        return model is not None and model.scaling.min_instances > 0

    def kept_running(self) -> tuple[Model, ...]:
        """List the models of which instances run also while nobody asks."""
        if self._kept is None:
            self._kept = tuple(model for model in self._models.values() if model.scaling.min_instances > 0)
        return self._kept

    def _look_again(self) -> None:
        """Make anew, when it is asked for, what follows from the registrations."""
        self._kept = self._cards = None
        self.on_disk.look_again()

    def is_current(self, model: Model) -> bool:
        """Tell whether a registration is still the one of its name."""
        return self._models.get(model.name) is model

    @contextmanager
    def change(self, name: ModelName) -> Iterator[None]:
        """Have a name to oneself until the block ends.

        Raises:
            Conflict: somebody else has it.
        """
        if name in self._changing:
            raise Conflict(f"{name} is being registered or removed just now", param="name")
        self._changing.add(name)
        try:
            yield
        finally:
            self._changing.discard(name)

    async def register(self, message: RegisterModel) -> tuple[Model, bool]:
        """Examine and store a model; also tell whether what runs of it is now another one's. Within `change`.

        Raises:
            ModelExists: the name is taken by another source.
            Conflict: it would be another model, and is the base of adapters.
            SllmError: as `Examiner.examine` does.
        """
        self._examining += 1
        try:
            return await self._register(message)
        finally:
            self._examining -= 1
            await self._sweep()

    async def _register(self, message: RegisterModel) -> tuple[Model, bool]:
        async def find_base(config: LoraConfig) -> Model:
            base = base_of(self.models(), message.base, config)
            await self.wanted(base)
            return base

        model, wanted = await self._examiner.examine(message, self._clock.wall_s(), find_base)
        known = self._models.get(model.name)
        if known is not None and same_but_time(known, model):
            self._wanted[model.name] = wanted  # The same bytes; perhaps other inodes.
            self._look_again()
            return known, False
        if known is not None and source_of(known) != model.source and not message.replace:
            raise ModelExists(
                f"{model.name} is registered already, from {source_of(known)}; replace it or remove it first",
                param="name",
            )
        if known is not None and _what_adapters_fit(known) != _what_adapters_fit(model):
            check_unused(known.name, self.models(), "replaced")
        with self._based(model):
            if known is not None and known.fingerprint != model.fingerprint:
                await self._let_go(model.name)
            await self._stored.put(model)
            self._models[model.name] = model
            self._wanted[model.name] = wanted
            self._look_again()
        return model, known is None or not runs_alike(known, model)

    @contextmanager
    def _based(self, model: Model) -> Iterator[None]:
        """Have an adapter's base stay what it was when the adapter was compared with it."""
        if not model.base:
            yield
            return
        base = self._models.get(ModelName(model.base))
        if base is None or base.path != model.text_path:
            raise Conflict(f"{model.base} was removed or replaced meanwhile", param="base")
        with self.change(base.name):
            yield

    async def remove(self, name: ModelName) -> Model:
        """Forget a registration, and the pins of what no other name has. Within `change`.

        Raises:
            ModelNotFound: there is none of this name.
            Conflict: it is the base of adapters.
            WriteFailed: the disk refused.
        """
        model = self.find(name)
        check_unused(name, self.models(), "removed")
        await self._let_go(name)
        await self._stored.delete(name)
        self._models.pop(name, None)  # Where the store is followed, this may be known before the call returns.
        self._wanted.pop(name, None)
        self._look_again()
        await self._sweep()
        return model

    def arriving(self, model: Model) -> tuple[int, int] | None:
        """Tell how much of a model has arrived from its source, and of how much; None where it is not on its way."""
        wanted = self._wanted.get(model.name)
        return self._tiers.arriving(wanted) if isinstance(wanted, Card) else None

    def names_by_model_id(self) -> dict[str, list[str]]:
        """List the names under which each model id is registered, as far as ids are known.

        What is on its way to the SSD has the identity of its card in an id's place.
        """
        names: dict[str, list[str]] = {}
        for name, wanted in sorted(self._wanted.items()):
            identity = wanted.checkpoint.identity if isinstance(wanted, Card) else ""
            for model_id in {_model_id(wanted), identity} - {""}:
                names.setdefault(model_id, []).append(name)
        return names

    async def kept(self, name: ModelName) -> Kept:
        """Say what the tiers know a model by: one that is registered, or one of which the SSD alone still has bytes.

        Raises:
            ModelNotFound: there is neither.
            SllmError: as `wanted` does.
        """
        if name not in self._models and any(entry.model_id == name for entry in self._tiers.ssd.entries()):
            return Kept(name, None, frozenset({name}))
        return kept(name, await self.wanted(self.find(name)))

    async def _let_go(self, name: ModelName) -> None:
        """Take the pins from what only this name has: without one, nobody would think of them."""
        wanted = self._wanted.get(name)
        if wanted is not None and not any(
            _identity(other) == _identity(wanted) for known, other in self._wanted.items() if known != name
        ):
            await keeping.unpin(self._tiers, kept(name, wanted), TierChoice.ALL)

    async def _sweep(self) -> None:
        """Drop the cards that no model has; while something is being examined, any may be about to be needed."""
        await self._tiers.keep_cards(lambda key: self._examining > 0 or self._has_card(key))

    def _has_card(self, key: str) -> bool:
        if self._cards is None:
            self._cards = frozenset([model.card for model in self._models.values()])
        return key in self._cards

    async def wanted(self, model: Model) -> Wanted:
        """Give what the tiers are to be asked for, read anew after a restart of the node.

        A card that was lost is fetched anew, once for all who want it.

        Raises:
            CheckpointChanged: it is no longer what was registered.
            SllmError: it can't be read, or its source can't be asked.
            Draining: the node is closing.
        """
        known = self._wanted.get(model.name)
        if known is not None and _describes(known, model) and not (isinstance(known, Card) and await _is_lost(known)):
            return known
        wanted = await self._read_once(model)
        if not _describes(wanted, model):
            raise CheckpointChanged(f"{model.source} has changed since {model.name} was registered; deploy it again")
        if self.is_current(model):  # It may have been registered anew meanwhile, from elsewhere.
            self._wanted[model.name] = wanted
            self._look_again()
        return wanted

    async def _read_once(self, model: Model) -> Wanted:
        """Read it for all who ask meanwhile; who stops waiting ends it for nobody."""
        key = model.path, model.source
        reading = self._reading.get(key)
        if reading is None:
            reading = self._reading[key] = self._scope.spawn(self._read(model), "read", on_failure=lambda _: None)
            reading.add_done_callback(lambda _: self._reading.pop(key, None))
        await asyncio.wait([reading])
        if reading.cancelled():
            raise Draining("the node is closing")
        return reading.result()

    async def restore(self, path: str) -> bool:
        """See to it that a card is whole whose folder is at `path`; false where no model has its card there.

        Raises:
            SllmError: as `wanted` does.
        """
        model = next((model for model in self._models.values() if model.card and model.path == path), None)
        if model is not None:
            await self.wanted(model)
        return model is not None

    async def close(self) -> None:
        """End what is being read."""
        await self._scope.close()

    async def _read(self, model: Model) -> Wanted:
        if not model.card:
            return await read_off_loop(Path(model.path))
        try:
            return await self._tiers.card(model.card)
        except CheckpointInvalid:
            return await self._tiers.describe(model.source)


def _model_id(wanted: Wanted) -> str:
    if isinstance(wanted, Card):
        return wanted.model_id
    return wanted.manifest.model_id if wanted.manifest is not None else ""


def _what_adapters_fit(model: Model) -> tuple[str, str, Backend]:
    return model.fingerprint, model.path, model.backend


async def _is_lost(card: Card) -> bool:
    return not await card.is_whole()


def _identity(wanted: Wanted) -> Key:
    return key_of(wanted.checkpoint if isinstance(wanted, Card) else wanted)


def _describes(wanted: Wanted, model: Model) -> bool:
    checkpoint = wanted.checkpoint if isinstance(wanted, Card) else wanted
    return checkpoint.fingerprint == model.fingerprint and str(checkpoint.path) == model.path
