"""An SSD tier for tests: opened and closed with a count of what it might leak, and filled with known models."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import random
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from checkpoints import CONFIG, weight_bytes

from sllm_actor.checkpoint.manifest import MANIFEST_NAME
from sllm_actor.loader.ssd_partial import Gate, SsdPartial
from sllm_actor.loader.ssd_quota import SsdEntry
from sllm_actor.loader.ssd_record import PlannedFile
from sllm_actor.loader.ssd_tier import SsdTier
from sllm_actor.testing.tier_storm import CHUNK_BYTES, KnownModel, fill, known_models

MODELS = known_models(seed=5)
# One file of several chunks, as stock; two files; converted, with digests for half a chunk, and for four chunks.
STOCK, TWO_FILES, FINE, COARSE = MODELS[3], MODELS[1], MODELS[0], MODELS[2]
ROOM = 10**9


class ManualClock:
    """A clock that stands until it is told to go on."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        raise AssertionError("nobody is to wait")


CLOCK = ManualClock()


def _alive() -> tuple[list[str], list[str], set[asyncio.Task[object]]]:
    """Everything of this process that a tier might leave."""
    open_files = sorted(path.name for path in Path("/proc/self/fd").iterdir() if path.exists())
    threads = sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("sllm-ssd"))
    return open_files, threads, asyncio.all_tasks()


@contextlib.asynccontextmanager
async def opened(folder: Path, quota_bytes: int = ROOM, gate: Gate | None = None) -> AsyncIterator[SsdTier]:
    """Open a tier, and see afterwards that it has left no descriptor, thread or task, and nothing in the trash."""
    before = _alive()
    tier = await SsdTier.open(folder, quota_bytes, CLOCK, gate)
    try:
        yield tier
    finally:
        await tier.close()
    assert _alive() == before
    assert not os.listdir(tier.folder / "trash")
    assert {path.name for path in tier.folder.iterdir()} == {"tier.lock", "models", "partial", "trash"}


async def begin(tier: SsdTier, model: KnownModel, key: str = "", chunk_bytes: int = CHUNK_BYTES) -> SsdPartial:
    """Begin a known model."""
    return await tier.begin(key or f"near:{model.number}", model.planned, model.smalls, chunk_bytes)


async def pull(tier: SsdTier, model: KnownModel, key: str = "") -> SsdEntry:
    """Bring a known model into the tier."""
    partial = await begin(tier, model, key)
    await fill(partial, model, random.Random(1), whole=True)
    return await partial.publish()


def held(tier: SsdTier) -> list[str]:
    """The ids of the whole models, the least recently used first."""
    return [entry.model_id for entry in tier.entries() if not entry.partial]


def sized(number: int, size_bytes: int, key: str = "model") -> tuple[list[PlannedFile], dict[str, bytes], bytes]:
    """A stock model of exactly `size_bytes`, config and all: its plan, its small files, its weights."""
    smalls = {"config.json": repr(dict(CONFIG)).replace("'", '"').encode()}
    raw = weight_bytes(size_bytes - len(smalls["config.json"]), number)
    return [PlannedFile("model.safetensors", len(raw), f"{key}{number}")], smalls, raw


async def put(tier: SsdTier, number: int, size_bytes: int) -> str:
    """Bring a stock model of a size into the tier; return its id."""
    files, smalls, raw = sized(number, size_bytes)
    partial = await tier.begin(f"sized:{number}", files, smalls, CHUNK_BYTES)
    for place in list(partial.missing()):
        at = place.chunk * CHUNK_BYTES
        await partial.write(*place, memoryview(raw)[at : at + CHUNK_BYTES])
    return (await partial.publish()).model_id


def all_files(folder: Path) -> set[str]:
    """Every file and folder below `folder`, by its path."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@contextlib.contextmanager
def mounted(place: Path, size_bytes: int) -> Iterator[Path]:
    """A disk of its own, where this process may mount one."""
    libc = ctypes.CDLL(None, use_errno=True)
    place.mkdir()
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, b"size=%d" % size_bytes) != 0:
        pytest.skip(f"no tmpfs can be mounted: {os.strerror(ctypes.get_errno())}")
    try:
        yield place
    finally:
        libc.umount2(os.fsencode(place), 2)


assert MANIFEST_NAME in FINE.smalls and MANIFEST_NAME in COARSE.smalls and MANIFEST_NAME not in STOCK.smalls
assert len(TWO_FILES.files) == 2
