"""The loader: the same bytes, leases and cancellations from the native and the portable byte mover."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import drop_page_cache, folder_of
from loaders import (
    CHUNK,
    bytes_of,
    checkpoint_of,
    descriptors,
    held,
    kept_in_page_cache,
    on_disk,
    opened,
    until,
)
from loaders import mover as mover
from loaders import place as place

from sllm_actor.checkpoint.folder import Checkpoint, read_folder
from sllm_actor.errors import (
    Draining,
    ModelTooLarge,
    NoCapacity,
)
from sllm_actor.loader.lease import HostLease
from sllm_actor.loader.loader import Loader
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.units import MIB

pytestmark = pytest.mark.usefixtures("mover")


# ---- bytes ----


@pytest.mark.parametrize(
    "sizes",
    [
        [200],
        [4095],
        [4096],
        [4097],
        [CHUNK - 1],
        [CHUNK],
        [CHUNK + 1],
        [3 * CHUNK - 4097],
        [5 * CHUNK + 4096],
        [300, CHUNK, 2 * CHUNK + 511, 4096],
    ],
    ids=str,
)
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "dropped"])
async def test_every_byte_of_every_file_arrives(place: Path, sizes: list[int], cached: bool) -> None:
    checkpoint = read_folder(folder_of(place / "model", *sizes))
    expected = on_disk(checkpoint)
    if not cached:
        drop_page_cache(checkpoint.path)
    async with opened() as loader:
        lease = await loader.lease(checkpoint)
        assert [file.size_bytes for file in lease.files] == sizes
        assert bytes_of(loader, lease) == expected
        report = lease.report
        assert report.total_bytes == sum(sizes) == report.page_cache_bytes + report.ssd_bytes
        assert report.pool_bytes == 0 and report.duration_s > 0


async def test_a_load_of_many_files_holds_few_of_them_open(tmp_path: Path) -> None:
    checkpoint = read_folder(folder_of(tmp_path, *[300] * 100))
    async with opened(chunks=100, reading_threads=2) as loader:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, descriptors())) + 32, limits[1]))
        try:
            lease = await loader.lease(checkpoint)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert bytes_of(loader, lease) == on_disk(checkpoint)


async def test_a_cached_file_comes_from_the_page_cache_and_a_dropped_one_from_the_device(
    tmp_path: Path,
) -> None:
    folder_of(tmp_path, 2 * MIB + 5)
    drop_page_cache(tmp_path)
    checkpoint = read_folder(tmp_path)
    async with opened(chunks=33) as loader:
        cold = (await loader.lease(checkpoint)).report
        assert cold.ssd_bytes > 0
    with kept_in_page_cache(checkpoint):
        async with opened(chunks=33) as loader:
            warm = (await loader.lease(checkpoint)).report
            assert (warm.page_cache_bytes, warm.ssd_bytes) == (2 * MIB + 5, 0)


async def test_native_reads_of_a_dropped_file_leave_the_page_cache_as_it_was(tmp_path: Path, mover: str) -> None:
    if mover != "native":
        pytest.skip("the portable mover reads through the cache")
    checkpoint = read_folder(folder_of(tmp_path, 128 * CHUNK - 3))
    drop_page_cache(tmp_path)
    for _ in range(2):
        async with opened(chunks=128) as loader:
            assert (await loader.lease(checkpoint)).report.ssd_bytes == checkpoint.size_bytes


# ---- leases, residents and room ----


async def test_a_resident_checkpoint_is_leased_without_its_files(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "a", chunks=2)
    expected = on_disk(checkpoint)
    async with opened() as loader:
        (await loader.lease(checkpoint)).release()
        shutil.rmtree(tmp_path / "a")
        lease = await loader.lease(checkpoint)
        assert lease.report.pool_bytes == lease.report.total_bytes == 2 * CHUNK
        assert (lease.report.page_cache_bytes, lease.report.ssd_bytes) == (0, 0)
        assert bytes_of(loader, lease) == expected


async def test_two_leases_at_once_are_one_load(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, chunks=20)
    async with opened(chunks=32) as loader:
        first, second = await asyncio.gather(loader.lease(checkpoint), loader.lease(checkpoint))
        assert first.files == second.files and first.report == second.report
        assert loader.free_bytes == 12 * CHUNK
        assert [resident.leases for resident in loader.residents()] == [2]


async def test_different_checkpoints_load_at_the_same_time(tmp_path: Path) -> None:
    checkpoints = [checkpoint_of(tmp_path / str(k), chunks=4, seed=k) for k in range(6)]
    async with opened(chunks=24) as loader:
        leases = await asyncio.gather(*(loader.lease(checkpoint) for checkpoint in checkpoints))
        assert loader.free_bytes == 0
        for checkpoint, lease in zip(checkpoints, leases, strict=True):
            assert bytes_of(loader, lease) == on_disk(checkpoint)


async def test_twin_folders_of_one_fingerprint_are_not_mistaken_for_each_other(tmp_path: Path) -> None:
    twins: list[Checkpoint] = []
    for name in ("a", "b"):
        folder = folder_of(tmp_path / name, CHUNK, seed=len(twins))
        os.utime(folder / "model.safetensors", ns=(0, 0))
        twins.append(read_folder(folder))
    assert twins[0].fingerprint == twins[1].fingerprint
    async with opened() as loader:
        for twin in twins:
            assert bytes_of(loader, await loader.lease(twin)) == on_disk(twin)


async def test_the_least_recently_used_checkpoint_makes_room(tmp_path: Path) -> None:
    a, b, c = (checkpoint_of(tmp_path / name, chunks=2, seed=ord(name)) for name in "abc")
    async with opened(chunks=4) as loader:
        for checkpoint in (a, b, a):
            (await loader.lease(checkpoint)).release()
        (await loader.lease(c)).release()
        assert [resident.fingerprint for resident in loader.residents()] == [a.fingerprint, c.fingerprint]


async def test_a_lease_is_a_use(tmp_path: Path) -> None:
    a, b = (checkpoint_of(tmp_path / name, seed=ord(name)) for name in "ab")
    async with opened() as loader:
        for checkpoint in (a, b, a):
            await loader.lease(checkpoint)
        assert [resident.fingerprint for resident in loader.residents()] == [b.fingerprint, a.fingerprint]
        assert loader.fingerprints() == [(b.fingerprint, False), (a.fingerprint, False)]


async def test_what_is_leased_is_not_evicted(tmp_path: Path) -> None:
    a, b, c = (checkpoint_of(tmp_path / name, chunks=2, seed=ord(name)) for name in "abc")
    async with opened(chunks=4) as loader:
        kept = await loader.lease(a)
        (await loader.lease(b)).release()
        (await loader.lease(c)).release()
        assert {resident.fingerprint for resident in loader.residents()} == {a.fingerprint, c.fingerprint}
        assert bytes_of(loader, kept) == on_disk(a)


async def test_a_checkpoint_larger_than_the_pool_is_told_both_sizes(tmp_path: Path) -> None:
    exact, larger = checkpoint_of(tmp_path / "a", chunks=4), checkpoint_of(tmp_path / "b", chunks=5)
    async with opened(chunks=4) as loader:
        (await loader.lease(exact)).release()
        with pytest.raises(ModelTooLarge, match=r"takes 327\.7 kB .* pool has 262\.1 kB"):
            await loader.lease(larger)
        assert len(loader.residents()) == 1


async def test_no_room_beside_leases_is_no_capacity_and_evicts_nothing(tmp_path: Path) -> None:
    a, b, c = (checkpoint_of(tmp_path / name, chunks=n, seed=n) for name, n in zip("abc", (3, 1, 2), strict=True))
    async with opened(chunks=4) as loader:
        lease = await loader.lease(a)
        (await loader.lease(b)).release()
        with pytest.raises(NoCapacity):
            await loader.lease(c)
        assert len(loader.residents()) == 2
        lease.release()
        (await loader.lease(c)).release()


async def test_room_that_another_load_is_filling_is_not_to_be_had(tmp_path: Path) -> None:
    a, b = checkpoint_of(tmp_path / "a", chunks=3), checkpoint_of(tmp_path / "b", chunks=3, seed=1)
    async with opened(chunks=4) as loader:
        first, second = await asyncio.gather(loader.lease(a), loader.lease(b), return_exceptions=True)
        assert isinstance(first, HostLease)
        assert isinstance(second, NoCapacity)


async def test_more_loads_than_allowed_are_no_capacity_and_take_no_chunk(tmp_path: Path) -> None:
    a, b = checkpoint_of(tmp_path / "a", chunks=2), checkpoint_of(tmp_path / "b", chunks=2, seed=1)
    async with opened(chunks=8, max_loads=1) as loader:
        first, second = await asyncio.gather(loader.lease(a), loader.lease(b), return_exceptions=True)
        assert isinstance(first, HostLease)
        assert isinstance(second, NoCapacity)
        assert loader.free_bytes == 6 * CHUNK
        (await loader.lease(b)).release()


async def test_a_load_that_too_many_others_keep_from_beginning_evicts_nothing(tmp_path: Path) -> None:
    kept, a, b = (checkpoint_of(tmp_path / f"{seed}", chunks=3, seed=seed) for seed in range(3))
    async with opened(chunks=6, max_loads=1) as loader:
        (await loader.lease(kept)).release()
        first, second = await asyncio.gather(loader.lease(a), loader.lease(b), return_exceptions=True)
        assert isinstance(first, HostLease)
        assert isinstance(second, NoCapacity)
        assert len(loader.residents()) == 2, "what is in the pool is still of use"
        assert second.message == "1 loads run, which is as many as may"
        (await loader.lease(b)).release()
        assert len(loader.residents()) == 2


async def test_release_counts_once(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path)
    async with opened() as loader:
        first, second = await loader.lease(checkpoint), await loader.lease(checkpoint)
        first.release()
        first.release()
        assert [resident.leases for resident in loader.residents()] == [1]
        second.release()
        assert [resident.leases for resident in loader.residents()] == [0]


async def test_progress_grows_up_to_the_whole(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, chunks=16)
    seen: list[tuple[int, int]] = []
    async with opened() as loader:
        await loader.lease(checkpoint, on_progress=lambda arrived, total: seen.append((arrived, total)))
    arrived = [bytes_now for bytes_now, _ in seen]
    assert arrived == sorted(set(arrived))
    assert seen[-1] == (16 * CHUNK, 16 * CHUNK)


# ---- cancellation ----


async def test_cancelling_the_only_waiter_gives_back_every_chunk(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, chunks=30)
    async with opened(reading_threads=2) as loader:
        scope = TaskScope("test")
        waiting = scope.spawn(loader.lease(checkpoint), "lease")
        await asyncio.sleep(0)
        assert loader.free_bytes == 2 * CHUNK
        await scope.close()
        assert waiting.cancelled()
        await until(lambda: loader.free_bytes == loader.pool_bytes)
        assert loader.residents() == []
        assert bytes_of(loader, await loader.lease(checkpoint)) == on_disk(checkpoint)


async def test_cancelling_one_of_two_waiters_leaves_the_load_to_the_other(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, chunks=30)
    async with opened() as loader:
        first, second = TaskScope("first"), TaskScope("second")
        gone = first.spawn(loader.lease(checkpoint), "lease")
        stays = second.spawn(loader.lease(checkpoint), "lease")
        await asyncio.sleep(0)
        await first.close()
        lease = await stays
        assert gone.cancelled()
        assert bytes_of(loader, lease) == on_disk(checkpoint)
        assert [resident.leases for resident in loader.residents()] == [1]


async def test_a_waiter_cancelled_in_the_turn_that_grants_it_keeps_no_lease(tmp_path: Path) -> None:
    async with opened() as loader:
        scope = TaskScope("test")

        def cancel_when_whole(arrived_bytes: int, total_bytes: int) -> None:
            if arrived_bytes == total_bytes:
                waiting.cancel()

        # The last bytes may be told a turn before the end of the load is: then it is cancelled before it was granted.
        for seed in range(200):
            checkpoint = checkpoint_of(tmp_path / str(seed), chunks=2, seed=seed)
            waiting = scope.spawn(loader.lease(checkpoint, on_progress=cancel_when_whole), "lease")
            with pytest.raises(asyncio.CancelledError):
                await waiting
            if residents := loader.residents():
                assert [resident.leases for resident in residents] == [0]
                break
        else:
            pytest.fail("no load ended in the turn in which its last bytes were told")
        await scope.close()


async def test_a_load_waits_for_the_room_of_one_that_was_cancelled(tmp_path: Path) -> None:
    a, b = checkpoint_of(tmp_path / "a", chunks=30), checkpoint_of(tmp_path / "b", chunks=30, seed=1)
    async with opened(reading_threads=2) as loader:
        scope = TaskScope("test")
        scope.spawn(loader.lease(a), "lease")
        await asyncio.sleep(0)
        await scope.close()
        lease = await loader.lease(b)
        assert bytes_of(loader, lease) == on_disk(b)


async def test_closing_in_the_middle_of_a_load_ends_it_and_those_who_wait(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, chunks=30)
    async with opened() as loader:
        scope = TaskScope("test")
        waiting = scope.spawn(loader.lease(checkpoint), "lease", on_failure=lambda error: None)
        await asyncio.sleep(0)
        await loader.close()
        with pytest.raises(Draining):
            await waiting
        with pytest.raises(Draining):
            await loader.lease(checkpoint)


async def test_opening_that_is_cancelled_gives_the_pool_back() -> None:
    await asyncio.to_thread(gc.collect)
    before = held()
    scope = TaskScope("test")
    options: dict[str, Any] = {"pool_bytes": 64 * MIB, "chunk_bytes": MIB, "clock": SystemClock()}
    scope.spawn(Loader.open(**options), "open")
    await asyncio.sleep(0)
    await scope.close()
    await until(lambda: held() == before)
