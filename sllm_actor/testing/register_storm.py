"""What a process does to the registrations of a node until it is killed, and what another one finds of them afterwards.

Two operators register, replace, pull, evict and remove the models of `tier_storm` under a few names, through the very
registry, cards, tiers and metadata that a node has; only engines and tokenizers are left out, as no process may be
started here. The witness opens all of it anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from sllm_actor.actors.registration import Examiner, TokenizerFacts
from sllm_actor.actors.registry import Registry
from sllm_actor.checkpoint.folder import Checkpoint
from sllm_actor.checkpoint.manifest import MANIFEST_NAME
from sllm_actor.domain import Model, ModelName, TierChoice
from sllm_actor.errors import Conflict, ModelNotFound, NoCapacity, SourceMissing
from sllm_actor.loader import keeping
from sllm_actor.loader.cards import RECORD_NAME, Card, Cards
from sllm_actor.loader.loader import Loader
from sllm_actor.loader.ssd_tier import SsdTier
from sllm_actor.loader.tiers import Tiers
from sllm_actor.messages.models import RegisterModel
from sllm_actor.metadata import SqliteStore
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.sources.source import SourceFile
from sllm_actor.testing.tier_storm import CHUNK_BYTES, KnownModel, Tell, same

NAMES = [ModelName(name) for name in ("a", "b", "org/c", "org/d")]
_POOL_CHUNKS = 4
_KEEP_ALIVE_S = 60.0


class KnownSource:
    """A model whose bytes are known, as a place that it comes from."""

    def __init__(self, model: KnownModel) -> None:
        self.url = model.url
        self.parallel = 2
        self._files = model.files | model.smalls
        self._planned = {file.name: file.validator for file in model.planned}

    async def files(self) -> tuple[SourceFile, ...]:
        return tuple(
            SourceFile(name, len(raw), self._planned.get(name, "v")) for name, raw in sorted(self._files.items())
        )

    async def read(self, file: SourceFile, offset: int, into: memoryview) -> None:
        await asyncio.sleep(0)
        into[:] = self._files[file.name][offset : offset + len(into)]

    async def close(self) -> None:
        return


class _UnbuiltExaminer(Examiner):
    """Tries everything but whether an engine can build the model."""

    async def _try_model(self, model: Model, checkpoint: Checkpoint) -> None:
        return


class _Rooms:
    """The parts of a node that keep registrations."""

    def __init__(self, registry: Registry, tiers: Tiers, store: SqliteStore) -> None:
        self.registry = registry
        self.tiers = tiers
        self.store = store


@asynccontextmanager
async def _opened(folder: Path, ssd: SsdTier, sources: Mapping[str, KnownModel]) -> AsyncIterator[_Rooms]:
    clock = SystemClock()

    def source_of(url: str) -> KnownSource:
        if url not in sources:
            raise SourceMissing(f"{url} is not to be asked", param="source")
        return KnownSource(sources[url])

    async def no_tokenizer(_: str) -> TokenizerFacts:
        return TokenizerFacts(vocabulary_tokens=1, chat=False)

    async with AsyncExitStack() as stack:
        pool_bytes = _POOL_CHUNKS * CHUNK_BYTES
        loader = await Loader.open(
            pool_bytes=pool_bytes, chunk_bytes=CHUNK_BYTES, clock=clock, reading_threads=1, io_uring=False
        )
        stack.push_async_callback(loader.close)
        tiers = Tiers(loader, ssd, Cards(folder / "cards"), source_of, clock, lambda: 0.0)
        stack.push_async_callback(tiers.close)
        store = await SqliteStore.open(folder / "metadata.db")
        stack.push_async_callback(store.close)
        examiner = _UnbuiltExaminer(
            {}, no_tokenizer, {}, tiers.describe,
            max_adapter_rank=1, max_adapter_bytes=1 << 40,
            pool_bytes=1 << 40, chunk_bytes=CHUNK_BYTES, keep_alive_s=_KEEP_ALIVE_S, stop_timeout_s=1.0,
        )  # fmt: skip
        registry = Registry(store, examiner, tiers, clock)
        stack.push_async_callback(registry.close)
        await registry.open()
        yield _Rooms(registry, tiers, store)


async def operate(folder: Path, ssd: SsdTier, models: Sequence[KnownModel], draw: random.Random, tell: Tell) -> None:
    """Open the registrations of a node and change them, until somebody puts an end to it."""
    async with _opened(folder, ssd, {model.url: model for model in models}) as rooms:
        # Each has names and models of its own, so that what becomes of one is told in order; the rest is for both.
        operators = [
            _Operator(rooms, NAMES[k::2], models[k::2], random.Random(draw.random()), tell).act(steps=25)
            for k in range(2)
        ]
        await asyncio.gather(*operators)


class _Operator:
    def __init__(
        self, rooms: _Rooms, names: Sequence[ModelName], models: Sequence[KnownModel], draw: random.Random, tell: Tell
    ) -> None:
        self._registry = rooms.registry
        self._tiers = rooms.tiers
        self._names = names
        self._models = models
        self._by_url = {model.url: model for model in models}
        self._draw = draw
        self._tell = tell

    async def act(self, steps: int) -> None:
        acts: list[Callable[[ModelName], Awaitable[None]]] = [self._register, self._remove, self._pull, self._evict]
        for _ in range(steps):
            act = self._draw.choices(acts, [6, 2, 3, 1])[0]
            with contextlib.suppress(NoCapacity, Conflict, ModelNotFound):
                await act(self._draw.choice(self._names))

    async def _register(self, name: ModelName) -> None:
        model = self._draw.choice(self._models)
        self._tell(f"registering {name}")
        message = RegisterModel(name=name, source=model.url, keep_alive_s=None, replace=True)
        with self._registry.change(name):
            await self._registry.register(message)
        self._tell(f"registered {name}:{model.number}")

    async def _remove(self, name: ModelName) -> None:
        self._registry.find(name)
        self._tell(f"registering {name}")
        with self._registry.change(name):
            await self._registry.remove(name)
        self._tell(f"removed {name}")

    async def _pull(self, name: ModelName) -> None:
        card = await self._registry.wanted(self._registry.find(name))
        assert isinstance(card, Card)
        model_id = self._by_url[card.url].model_id
        self._tell(f"beginning {model_id}")
        self._tell(f"publishing {model_id}")
        try:
            await self._tiers.pull(card)
        finally:
            self._tell(f"begun {model_id}")
        self._tell(f"published {model_id}")

    async def _evict(self, name: ModelName) -> None:
        known = await self._registry.kept(name)
        assert isinstance(known.wanted, Card)
        model_id = self._by_url[known.wanted.url].model_id
        self._tell(f"evicting {model_id}")
        await keeping.evict(self._tiers, known, TierChoice.ALL)
        # A stock model that was registered anew does not know of a copy that is there.
        if known.wanted.model_id:
            self._tell(f"evicted {model_id}")


async def witness_registrations(
    folder: Path, ssd: SsdTier, models: Sequence[KnownModel], registered: Mapping[str, int | None]
) -> int:
    """Open what a killed process has left of its registrations, and compare it with what may be; count them.

    `registered` has, for each name of which it is certain, the number of its model, or None for none.
    """
    async with _opened(folder, ssd, {}) as rooms:
        found = {model.name: model for model in rooms.registry.models()}
        by_url = {model.url: model for model in models}
        for name, number in registered.items():
            has = by_url[found[ModelName(name)].source].number if name in found else None
            same(has, number, f"registration {name}")
        for model in found.values():
            try:
                # No source is there to be asked: what was registered needs none.
                card = await rooms.registry.wanted(model)
            except SourceMissing:
                raise AssertionError(f"torn: the card of {model.name}") from None
            assert isinstance(card, Card)
            _check_card(card, by_url[model.source])
        cards = folder / "cards"
        same(set(os.listdir(cards)) if cards.is_dir() else set(), {m.card for m in found.values()}, "the cards")
    return len(found)


def _check_card(card: Card, model: KnownModel) -> None:
    """Compare a card with what it should be: small files and headers byte by byte, and holes for the weights."""
    path = card.checkpoint.path
    same(set(os.listdir(path)), {RECORD_NAME, *model.files, *model.smalls}, str(path))
    for name, raw in model.smalls.items():
        assert (path / name).read_bytes() == raw, f"torn: {path / name}"
    for name, raw in model.files.items():
        head = 8 + int.from_bytes(raw[:8], "little")
        assert (path / name).read_bytes() == raw[:head] + bytes(len(raw) - head), f"torn: {path / name}"
    learns = MANIFEST_NAME not in model.smalls
    assert card.model_id == model.model_id or (learns and not card.model_id), f"torn: the id of {path}"
