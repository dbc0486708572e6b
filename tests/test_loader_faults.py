"""The loader's world at its worst: files that changed, reads refused, sizes out of bounds."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop
from checkpoints import folder_of, noise
from loaders import CHUNK, bytes_of, checkpoint_of, descriptors, on_disk, opened
from loaders import mover as mover
from loaders import place as place

from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.errors import (
    CheckpointChanged,
    ConfigInvalid,
    ReadFailed,
)
from sllm_actor.loader import choice, native
from sllm_actor.loader.loader import Loader
from sllm_actor.loader.memory import available_bytes
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.units import MIB

pytestmark = pytest.mark.usefixtures("mover")


# ---- files that are not what they were ----


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    with path.open("ab") as opened_file:
        opened_file.write(b"x")


def replace(path: Path) -> None:
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(path)


def rewrite(path: Path) -> None:
    mtime_ns = path.stat().st_mtime_ns
    path.write_bytes(noise(path.stat().st_size, seed=9))
    os.utime(path, ns=(mtime_ns, mtime_ns + 1))


def make_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("change", [shorten, lengthen, replace, rewrite, make_a_pipe, Path.unlink])
async def test_a_file_that_changed_since_it_was_described_is_refused(
    place: Path, change: Callable[[Path], None]
) -> None:
    checkpoint = read_folder(folder_of(place / "model", 3 * CHUNK, 2 * CHUNK))
    path = checkpoint.file_path(checkpoint.files[1])
    change(path)
    async with opened() as loader:
        with pytest.raises(CheckpointChanged, match="model-00002-of-00002"):
            await loader.lease(checkpoint)
        assert loader.free_bytes == loader.pool_bytes
        assert loader.residents() == []


async def test_a_file_that_cannot_be_opened_is_a_failed_read_that_names_it(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, chunks=2)
    path = tmp_path / "model.safetensors"
    path.unlink()
    path.symlink_to(path)
    async with opened() as loader:
        outcomes = await asyncio.gather(loader.lease(checkpoint), loader.lease(checkpoint), return_exceptions=True)
        assert all(isinstance(outcome, ReadFailed) and str(path) in str(outcome) for outcome in outcomes)
        assert loader.free_bytes == loader.pool_bytes


async def test_a_read_that_the_system_refuses_is_a_failed_read(tmp_path: Path) -> None:
    refuses = Path("/sys/class/net/lo/speed")
    if not refuses.exists():
        pytest.skip("no file here that opens and can't be read")
    checkpoint = checkpoint_of(tmp_path)
    found = refuses.stat()
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to(refuses)
    lying = msgspec.structs.replace(
        checkpoint.files[0], size_bytes=found.st_size, mtime_ns=found.st_mtime_ns, inode=found.st_ino
    )
    async with opened() as loader:
        with pytest.raises(ReadFailed, match="Invalid argument"):
            await loader.lease(msgspec.structs.replace(checkpoint, files=(lying,)))


async def test_a_file_that_ends_before_its_size_is_refused(tmp_path: Path) -> None:
    ends_early = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not ends_early.exists():
        pytest.skip("no file here that is shorter than it says")
    checkpoint = checkpoint_of(tmp_path)
    found = ends_early.stat()
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to(ends_early)
    lying = msgspec.structs.replace(
        checkpoint.files[0], size_bytes=found.st_size, mtime_ns=found.st_mtime_ns, inode=found.st_ino
    )
    async with opened() as loader:
        with pytest.raises(CheckpointChanged, match="ended while it was read"):
            await loader.lease(msgspec.structs.replace(checkpoint, files=(lying,)))


async def test_an_ended_load_holds_no_file_open(tmp_path: Path) -> None:
    checkpoint = read_folder(folder_of(tmp_path, *[CHUNK] * 8))
    async with opened() as loader:
        before = descriptors()
        await loader.lease(checkpoint)
        assert descriptors() == before


# ---- the process's choice, and its bounds ----


async def test_facts_tell_which_mover_runs(mover: str) -> None:
    async with opened(lock=True) as loader:
        assert loader.facts().native == (mover == "native")
    async with opened(lock=False) as loader:
        assert not loader.facts().locked


async def test_the_loop_turns_while_the_pool_is_made() -> None:
    scope = TaskScope("test")
    options: dict[str, Any] = {"pool_bytes": 256 * MIB, "chunk_bytes": MIB, "clock": SystemClock()}
    opening = scope.spawn(Loader.open(**options), "open")
    turns = 0
    while not opening.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 10
    await (await opening).close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"chunk_bytes": 5000},
        {"chunk_bytes": 0},
        {"pool_bytes": CHUNK - 1},
        {"reading_threads": 0},
        {"reading_threads": 1000},
        {"max_loads": 0},
    ],
    ids=str,
)
async def test_a_pool_out_of_bounds_is_refused(wrong: dict[str, int]) -> None:
    options: dict[str, Any] = {"pool_bytes": 4 * CHUNK, "chunk_bytes": CHUNK, **wrong}
    with pytest.raises(ConfigInvalid):
        await Loader.open(clock=SystemClock(), **options)


async def test_a_pool_that_memory_cannot_hold_is_refused_before_it_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A machine that is small by decree: asking a real one for too much would end whatever runs beside us.
    monkeypatch.setattr("sllm_actor.loader.sizes.available_bytes", lambda: 4 * CHUNK)
    with pytest.raises(ConfigInvalid, match=r"host pool of 327\.7 kB is more than 262\.1 kB of free memory"):
        await Loader.open(pool_bytes=5 * CHUNK, chunk_bytes=CHUNK, clock=SystemClock())
    async with opened(chunks=4) as loader:
        assert loader.pool_bytes == 4 * CHUNK


def test_a_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:    4096 kB\n")
    assert available_bytes(meminfo, tmp_path) == 4 * MIB
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert available_bytes(meminfo, tmp_path) == 2_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(meminfo, tmp_path) == 4 * MIB


async def test_a_missing_library_is_loud_unless_it_was_declined(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mover: str
) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libsllm_native.so")
    if mover == "portable":
        assert not choice.use_native()
        return
    with pytest.raises(ConfigInvalid, match=r"pip install -e \."):
        await Loader.open(pool_bytes=CHUNK, chunk_bytes=CHUNK, clock=SystemClock())


def test_uvloop_leases_too(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, chunks=5)

    async def lease_once() -> list[bytes]:
        async with opened() as loader:
            return bytes_of(loader, await loader.lease(checkpoint))

    assert uvloop.run(lease_once()) == on_disk(checkpoint)
