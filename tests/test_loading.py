"""How a loader loads: digests, priorities, files mapped in place, and what it observes of its paths."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash
from checkpoints import drop_page_cache, folder_of
from loaders import CHUNK, LIMIT_S, bytes_of, checkpoint_of, kept_in_page_cache, on_disk, opened
from loaders import mover as mover
from loaders import place as place

from sllm_actor.checkpoint.convert import convert
from sllm_actor.checkpoint.folder import Checkpoint, read_folder
from sllm_actor.errors import CheckpointChanged, CheckpointCorrupt, ConfigInvalid, Draining, EngineDied
from sllm_actor.loader import libc, native
from sllm_actor.loader.lease import HostLease
from sllm_actor.loader.mapping import HostFile, map_files
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.units import KIB

pytestmark = pytest.mark.usefixtures("mover")

DIGEST_BYTES = 16 * KIB
LOADS_MAX = 100


def with_digests(checkpoint: Checkpoint, digest_bytes: int = DIGEST_BYTES) -> Checkpoint:
    """The same checkpoint, converted: its manifest has a digest for each so many bytes."""
    target = checkpoint.path.with_name(f"{checkpoint.path.name}-converted")
    convert(checkpoint.path, target, chunk_bytes=digest_bytes)
    return read_folder(target)


def damage(path: Path, at: int) -> None:
    """Flip a bit, and leave nothing else by which one could tell."""
    before = path.stat()
    with path.open("r+b") as opened_file:
        opened_file.seek(at)
        byte = opened_file.read(1)[0]
        opened_file.seek(at)
        opened_file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# ---- digests ----


@pytest.mark.parametrize("sizes", [[200], [CHUNK], [5 * CHUNK + 1, DIGEST_BYTES + 7]], ids=str)
async def test_a_checkpoint_of_its_digests_is_loaded(place: Path, sizes: list[int]) -> None:
    checkpoint = with_digests(read_folder(folder_of(place / "model", *sizes)))
    async with opened() as loader:
        assert bytes_of(loader, await loader.lease(checkpoint, verify=True)) == on_disk(checkpoint)


@pytest.mark.parametrize("at", [9, 3 * CHUNK + 20, 5 * CHUNK - 1])
async def test_a_damaged_chunk_is_named_with_both_digests_and_nothing_is_kept(tmp_path: Path, at: int) -> None:
    checkpoint = with_digests(checkpoint_of(tmp_path / "model", chunks=5))
    path = checkpoint.file_path(checkpoint.files[0])
    damage(path, at)
    number = at // DIGEST_BYTES
    piece = path.read_bytes()[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
    expected = checkpoint.files[0].digests[number * 16 : number * 16 + 16].hex()
    said = f"{path}: chunk {number} has the digest {xxhash.xxh3_128_hexdigest(piece)} and should have {expected}"
    async with opened() as loader:
        with pytest.raises(CheckpointCorrupt) as caught:
            await loader.lease(checkpoint, verify=True)
        assert caught.value.message == said
        assert loader.free_bytes == loader.pool_bytes
        (await loader.lease(checkpoint)).release()  # Nobody asked for a comparison.


async def test_what_is_in_the_pool_unchecked_is_checked_once_when_that_is_asked_for(tmp_path: Path) -> None:
    checkpoint = with_digests(checkpoint_of(tmp_path / "model", chunks=3))
    async with opened() as loader:
        first = await loader.lease(checkpoint)
        second = await loader.lease(checkpoint, verify=True)
        assert second.report.pool_bytes == checkpoint.size_bytes
        assert second.report.ssd_bytes == second.report.page_cache_bytes == 0
        # Had it been compared again, these digests would have been found wrong.
        lying = msgspec.structs.replace(checkpoint.files[0], digests=bytes(len(checkpoint.files[0].digests)))
        third = await loader.lease(msgspec.structs.replace(checkpoint, files=(lying,)), verify=True)
        for lease in (first, second, third):
            lease.release()
        assert [resident.leases for resident in loader.residents()] == [0]


async def test_damage_found_in_the_pool_is_leased_to_nobody_else(tmp_path: Path) -> None:
    checkpoint = with_digests(checkpoint_of(tmp_path / "model", chunks=3))
    whole, path = on_disk(checkpoint), checkpoint.file_path(checkpoint.files[0])
    damage(path, 2 * CHUNK)
    async with opened() as loader:
        first = await loader.lease(checkpoint)
        with pytest.raises(CheckpointCorrupt):
            await loader.lease(checkpoint, verify=True)
        assert loader.residents() == []
        assert 0 < loader.free_bytes < loader.pool_bytes, "somebody still has them"
        first.release()
        assert loader.free_bytes == loader.pool_bytes
        damage(path, 2 * CHUNK)
        assert bytes_of(loader, await loader.lease(checkpoint, verify=True)) == whole


async def test_digests_that_do_not_fit_the_pools_chunks_are_refused_when_they_are_to_be_compared(
    tmp_path: Path,
) -> None:
    checkpoint = with_digests(checkpoint_of(tmp_path / "model", chunks=3), digest_bytes=2 * CHUNK)
    async with opened() as loader:
        with pytest.raises(ConfigInvalid, match="131072"):
            await loader.lease(checkpoint, verify=True)
        await loader.lease(checkpoint)


# ---- who is first ----


class Queue:
    """One reading thread, kept busy by a load of the highest priority while others queue up behind it."""

    def __init__(self, tmp_path: Path) -> None:
        self.busy, self.one, self.other = (
            checkpoint_of(tmp_path / name, chunks, seed)
            for seed, (name, chunks) in enumerate({"busy": 300, "one": 20, "other": 20}.items())
        )

    async def took_s(self, *orders: tuple[Checkpoint, int]) -> list[float]:
        """Give how long each order's load took, all of them begun while the thread was busy."""
        for _ in range(100):
            async with opened(chunks=400, reading_threads=1) as loader:
                held: list[bool] = []

                def look(mover: Any, held: list[bool]) -> None:
                    status = mover.status(1)
                    held.append(status.page_cache_bytes + status.ssd_bytes < self.busy.size_bytes - 2 * CHUNK)

                leases = await asyncio.gather(
                    loader.lease(self.busy, priority=9),
                    *(loader.lease(checkpoint, priority=priority) for checkpoint, priority in orders[:-1]),
                    loader.lease(
                        orders[-1][0],
                        priority=orders[-1][1],
                        on_placed=lambda _, mover=loader._mover, held=held: look(mover, held),  # type: ignore[misc]
                    ),
                )
                if held == [True]:
                    return [lease.report.duration_s for lease in leases[1:]]
        raise AssertionError("the thread was never found busy")


async def test_the_most_urgent_load_is_read_first(tmp_path: Path) -> None:
    queue = await asyncio.to_thread(Queue, tmp_path)
    late_s, urgent_s = await queue.took_s((queue.one, 0), (queue.other, 1))
    assert urgent_s < late_s, "it came later and ended sooner"


async def test_who_joins_a_load_makes_it_as_urgent_as_himself(tmp_path: Path) -> None:
    queue = await asyncio.to_thread(Queue, tmp_path)
    other_s, joined_s, _ = await queue.took_s((queue.one, 1), (queue.other, 0), (queue.other, 5))
    assert joined_s < other_s, "it came later and ended sooner"


# ---- where it lies ----


async def test_where_the_bytes_will_lie_is_known_before_they_are_there(place: Path) -> None:
    checkpoint = checkpoint_of(place / "model", chunks=4)
    placed: list[tuple[HostFile, ...]] = []
    async with opened() as loader:
        mapped = []

        def on_placed(files: tuple[HostFile, ...]) -> None:
            placed.append(files)
            mapped.append(map_files(loader.pool_fd, loader.chunk_bytes, files, populate=2))
            assert loader.residents() == [], "nothing has come yet"

        lease = await loader.lease(checkpoint, on_placed=on_placed)
        assert placed == [lease.files]
        assert [bytes(buffer) for buffer in mapped[0].buffers] == on_disk(checkpoint)
        mapped[0].close()
        again = await loader.lease(checkpoint, on_placed=placed.append)
        assert placed[1:] == [again.files] == [lease.files]


async def test_a_placement_that_nobody_can_use_is_not_loaded(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "a", chunks=20)
    drop_page_cache(checkpoint.path)

    def dead(_: tuple[HostFile, ...]) -> None:
        raise EngineDied("it has just left")

    async with opened(chunks=20) as loader:
        with pytest.raises(EngineDied):
            await loader.lease(checkpoint, on_placed=dead)
        other = checkpoint_of(tmp_path / "b", chunks=20, seed=1)
        assert bytes_of(loader, await loader.lease(other)) == on_disk(other), "its room is to be had"


# ---- closing ----


async def test_a_closed_loader_loads_nothing_and_still_tells_what_it_did(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, chunks=2)
    async with opened() as loader:
        await loader.lease(checkpoint)
        paths = loader.paths()
        await loader.close()
        for in_place in (False, True):
            with pytest.raises(Draining):
                await loader.lease(checkpoint, in_place=in_place)
        assert loader.paths() == paths
        assert loader.observe()["paths"]


async def test_what_is_still_to_be_checked_when_the_loader_closes_ends(tmp_path: Path) -> None:
    checkpoint = with_digests(checkpoint_of(tmp_path / "model", chunks=4))
    scope = TaskScope("loads")
    async with opened() as loader:

        async def load_and_close() -> None:
            await loader.lease(checkpoint)
            await loader.close()

        first = scope.spawn(load_and_close(), "first")
        second = scope.spawn(loader.lease(checkpoint, verify=True), "second")
        async with asyncio.timeout(LIMIT_S):
            await first
            with pytest.raises(Draining):
                await second


async def test_damage_that_is_evicted_in_the_turn_in_which_it_is_found_is_still_damage(tmp_path: Path) -> None:
    checkpoint = with_digests(checkpoint_of(tmp_path / "model", chunks=4))
    damage(checkpoint.file_path(checkpoint.files[0]), 2 * CHUNK)
    async with opened(chunks=8) as loader:
        (await loader.lease(checkpoint)).release()
        (found,) = loader._memory._held.values()
        with pytest.raises(CheckpointCorrupt):
            await loader.lease(checkpoint, verify=True)
        assert found.forgotten
        assert loader.residents() == []
        assert loader.free_bytes == loader.pool_bytes


def page_cache_tells(path: Path, mover: str) -> bool:
    found: int = (native if mover == "native" else libc).cached_bytes(str(path))
    return found > 0


async def test_what_the_page_cache_holds_is_mapped_as_it_lies_there(tmp_path: Path, mover: str) -> None:
    checkpoint = read_folder(folder_of(tmp_path, 3 * CHUNK + 5, 4096))
    expected = on_disk(checkpoint)
    if not page_cache_tells(checkpoint.file_path(checkpoint.files[0]), mover):
        pytest.skip("this kernel does not tell what it has cached (Linux 6.5)")
    with kept_in_page_cache(checkpoint):
        async with opened() as loader:
            placed: list[tuple[HostFile, ...]] = []
            lease = await loader.lease(checkpoint, in_place=True, on_placed=placed.append)
            assert placed == [lease.files]
            assert lease.report.in_place_bytes == checkpoint.size_bytes == lease.report.total_bytes
            assert loader.free_bytes == loader.pool_bytes
            for populate in (0, 2):
                with map_files(loader.pool_fd, loader.chunk_bytes, lease.files, populate=populate) as mapped:
                    assert [bytes(buffer) for buffer in mapped.buffers] == expected
                    mapped.buffers[0][:4] = b"mine"
            assert on_disk(checkpoint) == expected
            lease.release()
            lease.release()


async def test_what_is_not_cached_or_is_to_be_compared_or_is_in_the_pool_is_not_mapped_in_place(
    tmp_path: Path,
) -> None:
    dropped, compared, pooled = (checkpoint_of(tmp_path / name, chunks=3, seed=k) for k, name in enumerate("abc"))
    drop_page_cache(dropped.path)
    async with opened() as loader:
        await loader.lease(pooled)
        for checkpoint, verify in ((dropped, False), (with_digests(compared), True), (pooled, False)):
            lease = await loader.lease(checkpoint, verify=verify, in_place=True)
            assert lease.report.in_place_bytes == 0
            assert all(file.in_place is None for file in lease.files)


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(1, 1))


def swap(path: Path) -> None:
    path.rename(path.with_name("old"))
    path.write_bytes(path.with_name("old").read_bytes())


@pytest.mark.parametrize("change", [Path.unlink, rewrite, swap, lambda path: os.truncate(path, 5)])
async def test_a_file_that_changed_before_it_was_mapped_in_place_is_refused(tmp_path: Path, change: object) -> None:
    checkpoint = checkpoint_of(tmp_path, chunks=2)
    checkpoint.file_path(checkpoint.files[0]).read_bytes()
    async with opened() as loader:
        lease = await loader.lease(checkpoint, in_place=True)
        if not lease.report.in_place_bytes:
            pytest.skip("this kernel does not tell what it has cached (Linux 6.5)")
        assert callable(change)
        change(tmp_path / "model.safetensors")
        with pytest.raises(CheckpointChanged, match=r"model\.safetensors"):
            map_files(loader.pool_fd, loader.chunk_bytes, lease.files)


# ---- what was observed ----


async def test_paths_count_what_went_which_way_and_how_long_that_took(tmp_path: Path, mover: str) -> None:
    cached = checkpoint_of(tmp_path / "cached", chunks=3)
    on_disk(cached)
    async with opened() as loader:
        assert loader.paths().ssd.bytes_per_s == loader.paths().page_cache.bytes_per_s == 0.0
        reports, size_bytes = [(await loader.lease(cached)).report], cached.size_bytes
        for k in range(LOADS_MAX):
            # Asked for what is cached alone, a kernel begins to read; a quick disk may have done so by its answer.
            dropped = checkpoint_of(tmp_path / f"dropped-{k}", chunks=1, seed=k)
            drop_page_cache(dropped.path)
            lease = await loader.lease(dropped)
            reports.append(lease.report)
            lease.release()
            size_bytes += dropped.size_bytes
            if loader.paths().ssd.size_bytes:
                break
        paths = loader.paths()
        assert paths.page_cache.size_bytes == sum(report.page_cache_bytes for report in reports)
        assert paths.ssd.size_bytes == sum(report.ssd_bytes for report in reports)
        assert paths.page_cache.size_bytes + paths.ssd.size_bytes == size_bytes
        assert paths.ssd.busy_s > 0
        assert paths.ssd.bytes_per_s > 0
        assert paths.device.size_bytes == 0


async def test_a_pool_without_huge_pages_to_be_had_works_and_says_so(mover: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, chunks=2)
    for asked in (True, False):
        async with opened(huge_pages=asked) as loader:
            facts = loader.facts()
            assert facts.huge_bytes in (0, loader.pool_bytes)
            assert not facts.reserved, "a chunk of 64 KiB is no huge page"
            assert bytes_of(loader, await loader.lease(checkpoint)) == on_disk(checkpoint)


async def test_two_loaders_of_one_checkpoint_do_not_disturb_each_other(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, chunks=6)
    async with opened() as one, opened() as other:
        leases: tuple[HostLease, HostLease] = await asyncio.gather(one.lease(checkpoint), other.lease(checkpoint))
        assert bytes_of(one, leases[0]) == bytes_of(other, leases[1]) == on_disk(checkpoint)
