"""Disks that are full, fail or lie under the SSD tier: a typed error that names the path, that model alone, no leak."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ssd_tiers import (
    CLOCK,
    COARSE,
    FINE,
    STOCK,
    TWO_FILES,
    all_files,
    begin,
    held,
    mounted,
    opened,
    pull,
    put,
    sized,
)

from sllm_actor.errors import CheckpointCorrupt, ReadFailed, WriteFailed
from sllm_actor.loader.chunk_place import ChunkPlace
from sllm_actor.loader.ssd_tier import SsdTier
from sllm_actor.testing.tier_storm import CHUNK_BYTES, check_model, fill

SIZE = 100_000


class Disk:
    """Lets calls of a name fail for paths that hold a text, a number of times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def fails(self, name: str, number: int, path: str, times: int = 1000, wanted: int = 0) -> None:
        """Let `os.name` fail with `number` for paths with `path` in them, when `wanted` of them have passed."""
        real, seen = getattr(os, name), 0

        def failing(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            first = args[0]
            where = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.fspath(first)
            if path in where:
                seen += 1
                if wanted < seen <= wanted + times:
                    raise OSError(number, os.strerror(number), where)
            return real(*args, **kwargs)

        self._monkeypatch.setattr(os, name, failing)

    def well(self) -> None:
        """Let everything work again."""
        self._monkeypatch.undo()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", 512 * 1024) as place:
        yield place


async def test_a_full_disk_is_told_at_the_beginning_and_nothing_is_left(small_disk: Path) -> None:
    async with opened(small_disk) as tier:
        a = await put(tier, 1, SIZE)
        await tier.trash_emptied()
        before = all_files(small_disk)
        files, smalls, _ = sized(2, 5 * SIZE)
        with pytest.raises(WriteFailed, match=rf"{small_disk}/partial/.*model.safetensors.*No space left on device"):
            await tier.begin("large", files, smalls, CHUNK_BYTES)
        assert all_files(small_disk) == before and tier.used_bytes == SIZE
        b = await put(tier, 3, 2 * SIZE)
        assert held(tier) == [a, b]


async def test_room_is_there_when_it_is_promised_and_the_reserved_is_nobodys_elses(small_disk: Path) -> None:
    async with opened(small_disk, 4 * SIZE) as tier:
        await put(tier, 1, 2 * SIZE)
        await put(tier, 2, 2 * SIZE)
        # No larger than the quota, the disk takes this one only after the others have been deleted.
        files, smalls, raw = sized(3, 4 * SIZE)
        partial = await tier.begin("large", files, smalls, CHUNK_BYTES)
        with (small_disk / "tier.lock").open("ab", buffering=0) as other, pytest.raises(OSError, match="No space left"):
            while other.write(bytes(4096)):
                pass
        for place in list(partial.missing()):
            at = place.chunk * CHUNK_BYTES
            await partial.write(*place, memoryview(raw)[at : at + CHUNK_BYTES])
        # The record needs room that is not there; when it is, the model can be published.
        with pytest.raises(WriteFailed, match=r"\.sllm-tier\.json can't be written: No space left on device"):
            await partial.publish()
        os.truncate(small_disk / "tier.lock", 0)
        entry = await partial.publish()
        assert held(tier) == [entry.model_id] and tier.used_bytes == 4 * SIZE


async def test_a_failed_write_costs_its_chunk_and_no_other_model(tmp_path: Path, disk: Disk) -> None:
    async with opened(tmp_path / "tier") as tier:
        well, ill = await begin(tier, STOCK), await begin(tier, FINE)
        disk.fails("pwrite", errno.EIO, f"{ill.folder.name}/model/model.safetensors")
        for place in list(ill.missing())[:2]:
            with pytest.raises(WriteFailed, match=r"model/model.safetensors can't be written: Input/output error"):
                await ill.write(*place, memoryview(FINE.chunk(place)))
        assert ill.done_bytes == 0
        await fill(well, STOCK, random.Random(1), whole=True)
        check_model((await well.publish()).path, STOCK)
        disk.well()
        await fill(ill, FINE, random.Random(1), whole=True)
        check_model((await ill.publish()).path, FINE)


async def test_a_chunk_that_can_not_be_noted_is_not_done(tmp_path: Path, disk: Disk) -> None:
    async with opened(tmp_path / "tier") as tier:
        partial = await begin(tier, STOCK)
        for number, name in ((errno.ENOSPC, "No space left"), (errno.EIO, "Input/output"), (errno.EROFS, "Read-only")):
            disk.fails("pwrite", number, "/journal")
            with pytest.raises(WriteFailed, match=f"journal can't be written: {name}"):
                await partial.write(0, 0, memoryview(STOCK.chunk(ChunkPlace(0, 0))))
            disk.well()
        assert ChunkPlace(0, 0) in partial.missing()
        await partial.write(0, 0, memoryview(STOCK.chunk(ChunkPlace(0, 0))))
    async with opened(tmp_path / "tier") as tier:
        assert (await begin(tier, STOCK)).done_bytes == CHUNK_BYTES


async def test_a_disk_that_lost_weights_costs_the_partial(tmp_path: Path, disk: Disk) -> None:
    async with opened(tmp_path / "tier") as tier:
        partial = await begin(tier, STOCK)
        await fill(partial, STOCK, random.Random(1), whole=True)
        disk.fails("fsync", errno.EIO, "/model/model.safetensors")
        with pytest.raises(WriteFailed, match=r"model.safetensors can't be written: Input/output error"):
            await partial.publish()
        disk.well()
        # The page cache may hold what the disk does not: such bytes are not resumed from.
        assert tier.entries() == [] and not os.listdir(tmp_path / "tier" / "partial")
        check_model((await pull(tier, STOCK)).path, STOCK)


@pytest.mark.parametrize(
    ("call", "path"),
    [("rename", "/model"), ("fsync", "/models"), ("pwrite", ".sllm-tier.json"), ("utime", ".sllm-tier.json")],
)
async def test_a_model_that_can_not_be_published_can_be_later(tmp_path: Path, disk: Disk, call: str, path: str) -> None:
    async with opened(tmp_path / "tier") as tier:
        partial = await begin(tier, TWO_FILES)
        await fill(partial, TWO_FILES, random.Random(1), whole=True)
        disk.fails(call, errno.EIO, path)
        with pytest.raises(WriteFailed, match="Input/output error"):
            await partial.publish()
        disk.well()
        assert held(tier) == [] and not os.listdir(tmp_path / "tier" / "models")
        assert tier.used_bytes == TWO_FILES.size_bytes
        check_model((await partial.publish()).path, TWO_FILES)


@pytest.mark.parametrize(
    "ask",
    [lambda tier, a: tier.evict(a), lambda tier, _: begin(tier, STOCK)],
    ids=["by name", "for room"],
)
async def test_what_can_not_be_evicted_is_still_there(
    tmp_path: Path, disk: Disk, ask: Callable[[SsdTier, str], Any]
) -> None:
    async with opened(tmp_path / "tier", 2 * SIZE + STOCK.size_bytes - 1) as tier:
        a, b = await put(tier, 1, SIZE), await put(tier, 2, SIZE)
        for call, path in (("rename", f"/models/{a}"), ("fsync", "/trash")):
            disk.fails(call, errno.EIO, path)
            with pytest.raises(WriteFailed, match="Input/output error"):
                await ask(tier, a)
            disk.well()
            assert held(tier) == [a, b] and tier.used_bytes == 2 * SIZE
            assert set(os.listdir(tmp_path / "tier" / "models")) == {a, b}
        await ask(tier, a)
        assert held(tier) == [b]


async def test_what_can_not_be_deleted_is_by_the_next_start(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    tier = await SsdTier.open(tmp_path / "tier", 2 * SIZE, CLOCK)
    a = await put(tier, 1, SIZE)
    disk.fails("unlink", errno.EIO, "model")
    await tier.evict(a)
    await tier.trash_emptied()
    assert "left in the trash" in caplog.text and tier.used_bytes == 0
    await put(tier, 2, SIZE)
    await tier.close()
    disk.well()
    assert os.listdir(tmp_path / "tier" / "trash")
    async with opened(tmp_path / "tier") as tier:
        assert tier.used_bytes == SIZE


async def test_a_pin_that_the_disk_does_not_know_is_none(tmp_path: Path, disk: Disk) -> None:
    async with opened(tmp_path / "tier") as tier:
        a = await put(tier, 1, SIZE)
        disk.fails("open", errno.EROFS, ".sllm-pinned")
        with pytest.raises(WriteFailed, match=r"\.sllm-pinned can't be written: Read-only file system"):
            await tier.pin(a)
        assert not tier.entries()[0].pinned
        disk.well()
        await tier.pin(a)
        disk.fails("unlink", errno.EIO, ".sllm-pinned")
        with pytest.raises(WriteFailed):
            await tier.unpin(a)
        assert tier.entries()[0].pinned


@pytest.mark.parametrize("call", ["mkdir", "posix_fallocate", "fsync", "rename"])
@pytest.mark.parametrize("wanted", [0, 1])
async def test_a_beginning_that_fails_leaves_nothing(tmp_path: Path, disk: Disk, call: str, wanted: int) -> None:
    async with opened(tmp_path / "tier") as tier:
        a = await put(tier, 1, SIZE)
        disk.fails(call, errno.EIO, "/partial/", wanted=wanted, times=1)
        with pytest.raises(WriteFailed, match=f"{tmp_path}/tier/partial/.* can't be written: Input/output error"):
            await begin(tier, TWO_FILES)
        disk.well()
        assert held(tier) == [a] and tier.used_bytes == SIZE and not os.listdir(tmp_path / "tier" / "partial")
        check_model((await pull(tier, TWO_FILES)).path, TWO_FILES)


async def test_a_resumption_that_fails_keeps_what_was_done(tmp_path: Path, disk: Disk) -> None:
    async with opened(tmp_path / "tier") as tier:
        partial = await begin(tier, STOCK)
        await partial.write(0, 0, memoryview(STOCK.chunk(ChunkPlace(0, 0))))
        await partial.pause()
        disk.fails("rename", errno.EIO, "/journal.new")
        with pytest.raises(WriteFailed, match="journal can't be written"):
            await begin(tier, STOCK)
        disk.well()
        assert tier.used_bytes == STOCK.size_bytes
        assert (await begin(tier, STOCK)).done_bytes == CHUNK_BYTES


async def test_a_disk_that_does_not_read_or_lies_is_told_apart(tmp_path: Path, disk: Disk) -> None:
    async with opened(tmp_path / "tier") as tier:
        partial = await begin(tier, STOCK)
        for chunk in range(2):
            await partial.write(0, chunk, memoryview(STOCK.chunk(ChunkPlace(0, chunk))))
        into = memoryview(bytearray(CHUNK_BYTES))
        disk.fails("preadv", errno.EIO, "model.safetensors")
        with pytest.raises(ReadFailed, match=r"model.safetensors can't be read: Input/output error"):
            await partial.read(0, 0, into)
        disk.well()
        await partial.read(0, 0, into)
        with (partial.folder / "model" / "model.safetensors").open("r+b") as file:
            file.write(b"liar")
        with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors chunk 0"):
            await partial.read(0, 0, into)
        assert ChunkPlace(0, 0) in partial.missing() and ChunkPlace(0, 1) not in partial.missing()
        await partial.pause()
        # What can't be read when it is resumed is fetched again.
        disk.fails("preadv", errno.EIO, "model.safetensors")
        partial = await begin(tier, STOCK)
        disk.well()
        assert partial.done_bytes == 0
        await fill(partial, STOCK, random.Random(1), whole=True)
        check_model((await partial.publish()).path, STOCK)


@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename", "listdir"])
async def test_an_opening_that_fails_is_typed_and_holds_nothing(tmp_path: Path, disk: Disk, call: str) -> None:
    async with opened(tmp_path / "tier") as tier:
        a = await put(tier, 1, SIZE)
        await begin(tier, STOCK)
    (tmp_path / "tier" / "models" / ("0" * 64)).mkdir()
    disk.fails(call, errno.EIO, "tier/")
    with pytest.raises(WriteFailed, match=rf"{tmp_path}/tier/.*Input/output error"):
        await SsdTier.open(tmp_path / "tier", 10**9, CLOCK)
    disk.well()
    async with opened(tmp_path / "tier") as tier:
        assert held(tier) == [a] and len(tier.entries()) == 2


async def test_aligned_chunks_go_past_the_page_cache_and_the_rest_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError as wrong:
        pytest.skip(f"this file system has no direct writes: {wrong.strerror}")
    size_bytes = 3 * CHUNK_BYTES + 4096 + 77
    files, smalls, raw = sized(1, size_bytes)
    written: list[tuple[bool, int]] = []
    pwrite = os.pwrite

    def seen(fd: int, data: memoryview, at: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("model.safetensors"):
            written.append((bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT), len(data)))
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "pwrite", seen)
    async with opened(tmp_path / "tier") as tier:
        partial = await tier.begin("k", files, smalls, CHUNK_BYTES)
        # Not closed: a thread of the tier may keep its last piece of work for a moment.
        aligned = mmap.mmap(-1, CHUNK_BYTES)
        for place in list(partial.missing()):
            length = partial.plan.length(place)
            aligned[:length] = raw[place.chunk * CHUNK_BYTES :][:length]
            await partial.write(*place, memoryview(aligned)[:length])
        tail_bytes = len(raw) % 4096
        assert written == [(True, CHUNK_BYTES)] * 3 + [(True, 4096), (False, tail_bytes)]
        assert ((await partial.publish()).path / "model.safetensors").read_bytes() == raw


async def test_file_systems_without_direct_writes_are_written_through_the_cache(tmp_path: Path, disk: Disk) -> None:
    real = os.open

    def refusing(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *args, **kwargs)

    disk._monkeypatch.setattr(os, "open", refusing)
    async with opened(tmp_path / "tier") as tier:
        check_model((await pull(tier, COARSE)).path, COARSE)


@pytest.mark.parametrize("taken", [1000, 4096])
async def test_writes_of_which_the_kernel_takes_a_part_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, bytes(data[:taken]), at))
    async with opened(tmp_path / "tier") as tier:
        check_model((await pull(tier, TWO_FILES)).path, TWO_FILES)


async def test_bytes_are_on_the_disk_before_their_name_and_the_name_before_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill can't show and a power cut would: the order of syncs and renames."""
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def synced(fd: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{fd}")).name))
        fsync(fd)

    def renamed(old: Path, new: Path) -> None:
        events.append(("rename", Path(new).parent.name))
        rename(old, new)

    async with opened(tmp_path / "tier") as tier:
        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "rename", renamed)
        partial = await begin(tier, TWO_FILES)
        name = partial.folder.name
        assert events[-3:] == [("rename", name), ("sync", name), ("sync", "partial")]
        assert {"model", *TWO_FILES.smalls, "journal.new", "plan.json.new"} <= {what for _, what in events[:-3]}
        await fill(partial, TWO_FILES, random.Random(1), whole=True)
        events.clear()
        await partial.publish()
        at = events.index(("rename", "models"))
        assert {name for _, name in events[:at]} == {*TWO_FILES.files, ".sllm-tier.json", "model"}
        assert events[at - 1] == ("sync", "model") and events[at + 1] == ("sync", "models")
        events.clear()
        await tier.evict(TWO_FILES.model_id)
        assert events[:3] == [("rename", "trash"), ("sync", "trash"), ("sync", "models")]
        monkeypatch.undo()
