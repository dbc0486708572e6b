"""A node's tiers over one source, for tests: opened and closed with a count of what they might leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from checkpoints import folder_of
from loaders import CHUNK, bytes_of, descriptors, mapped_pools, until
from scripted_source import Fault, ScriptedSource

from sllm_actor.checkpoint.convert import convert
from sllm_actor.loader.cards import Card, Cards
from sllm_actor.loader.lease import HostLease
from sllm_actor.loader.loader import Loader
from sllm_actor.loader.ssd_partial import Gate
from sllm_actor.loader.ssd_tier import SsdTier
from sllm_actor.loader.tiers import PULL_MEMORY_BYTES, Tiers
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.sources.source import Source, SourceFile

URL = "test://model"
WEIGHTS = "model.safetensors"


class House(NamedTuple):
    """A node's tiers over one source."""

    tiers: Tiers
    source: ScriptedSource
    card: Card

    async def lease(self, **options: object) -> HostLease:
        return await self.tiers.lease(self.card, **options)  # type: ignore[arg-type]

    def bytes_of(self, lease: HostLease) -> list[bytes]:
        return bytes_of(self.tiers.loader, lease)

    def expected(self) -> list[bytes]:
        return [(self.source.folder / file.name).read_bytes() for file in self.card.checkpoint.files]

    async def stored(self) -> None:
        """Wait until the SSD has the checkpoint whole."""
        await until(lambda: self.tiers.is_on_ssd(self.card))


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A converted checkpoint of 17 chunks in two files, with digests."""
    stock = folder_of(tmp_path / "stock", 10 * CHUNK + 77, 6 * CHUNK + 1)
    convert(stock, tmp_path / "origin", chunk_bytes=CHUNK // 4)
    return tmp_path / "origin"


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """A stock checkpoint in two shards, without digests."""
    return folder_of(tmp_path / "stock", 10 * CHUNK + 77, 6 * CHUNK + 1)


def is_temporary(path: Path) -> bool:
    """Tell whether this is what a change is prepared in, or what waits to be deleted."""
    is_staged = path.name.startswith(".") and ".sllm-" in path.name[1:]
    return is_staged or path.parent.name == "trash" or path.name.endswith(".new")


@asynccontextmanager
async def tiers_at(
    data: Path,
    open_source: Callable[[str], Source],
    *,
    chunks: int = 40,
    quota_bytes: int = 10**9,
    max_loads: int = 64,
    pull_memory_bytes: int = PULL_MEMORY_BYTES,
    gate: Gate | None = None,
    pressing: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> AsyncIterator[Tiers]:
    """The tiers of a node with its folder; they leave nothing behind."""
    await asyncio.to_thread(gc.collect)
    before = {*descriptors()}, mapped_pools(), len(asyncio.all_tasks())
    clock = SystemClock()
    async with contextlib.AsyncExitStack() as stack:
        loader = await Loader.open(pool_bytes=chunks * CHUNK, chunk_bytes=CHUNK, clock=clock, max_loads=max_loads)
        stack.push_async_callback(loader.close)
        ssd = await SsdTier.open(data / "ssd", quota_bytes, clock, gate)
        stack.push_async_callback(ssd.close)
        tiers = Tiers(
            loader,
            ssd,
            Cards(data / "cards"),
            open_source,
            clock,
            lambda: 0.0,
            pressing,
            pull_memory_bytes=pull_memory_bytes,
        )
        stack.push_async_callback(tiers.close)
        yield tiers
        await tiers.close()
        if not any(resident.leases or resident.pinned for resident in loader.residents()):
            assert loader._memory.obtainable_chunks == chunks, "a chunk is lost"
    assert [path for path in data.rglob("*") if is_temporary(path)] == []
    await asyncio.to_thread(gc.collect)

    def left() -> tuple[set[str], int, int]:
        files, pools, tasks = before
        return {*descriptors()} - files, mapped_pools() - pools, len(asyncio.all_tasks()) - tasks

    # The threads of a test's own servers close their ends of our connections a moment later.
    with contextlib.suppress(TimeoutError):
        await until(lambda: left() == (set(), 0, 0))
    assert left() == (set(), 0, 0)


@asynccontextmanager
async def house(origin: Path, **options: Any) -> AsyncIterator[House]:
    """The tiers of a node whose folder is beside `origin`, over a source that the test commands."""
    source = ScriptedSource(origin, URL)
    async with tiers_at(origin.parent / "node", lambda _: source, **options) as tiers:
        yield House(tiers, source, await tiers.describe(URL))
    assert source.under_way == 0


def spoiled(name: str, offset: int, times: int = 10**9) -> Fault:
    """Flip a bit of one chunk, so many times."""
    left = times

    async def spoil(file: SourceFile, at: int, into: memoryview) -> None:
        nonlocal left
        if (file.name, at) == (name, offset) and left:
            left -= 1
            into[5] ^= 1

    return spoil
