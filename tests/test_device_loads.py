"""Loads that go on to a device: over the fake driver, which waits, fails and counts as the real one does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from checkpoints import drop_page_cache, folder_of
from fake_cuda import FakeCuda
from fake_cuda import fake_cuda as fake_cuda
from fake_cuda import fake_cuda_library as fake_cuda_library
from loaders import CHUNK, bytes_of, checkpoint_of, on_disk, opened, until
from loaders import place as place

from sllm_actor.checkpoint.convert import convert
from sllm_actor.checkpoint.folder import Checkpoint, read_folder
from sllm_actor.errors import (
    CheckpointChanged,
    CheckpointCorrupt,
    ConfigInvalid,
    DeviceFailed,
    InvalidInput,
    NoCapacity,
)
from sllm_actor.loader.device import Device, DeviceBuffer
from sllm_actor.loader.lease import DeviceTarget
from sllm_actor.loader.loader import Loader
from sllm_actor.runtime.tasks import TaskScope

ILLEGAL_ADDRESS = 700


@pytest.fixture
def device(fake_cuda: FakeCuda) -> Iterator[Device]:
    with Device.open(0, streams=2, driver=fake_cuda.path) as opened_device:
        yield opened_device


@asynccontextmanager
async def registered(device: Device, chunks: int = 32, **options: Any) -> AsyncIterator[Loader]:
    async with opened(chunks, **options) as loader:
        await loader.register(device)
        yield loader


def targets_in(buffer: DeviceBuffer, checkpoint: Checkpoint) -> dict[str, DeviceTarget]:
    """Files one after another in one buffer, each aligned as an engine would have it."""
    targets, at = {}, 0
    for file in checkpoint.files:
        targets[file.name] = DeviceTarget(buffer, at)
        at += -(-file.size_bytes // 512) * 512
    return targets


def room_for(checkpoint: Checkpoint) -> int:
    return sum(-(-file.size_bytes // 512) * 512 for file in checkpoint.files)


def on_device(checkpoint: Checkpoint, targets: dict[str, DeviceTarget]) -> list[bytes]:
    return [targets[file.name].buffer.read(targets[file.name].offset, file.size_bytes) for file in checkpoint.files]


# ---- bytes ----


@pytest.mark.parametrize("sizes", [[200], [CHUNK], [5 * CHUNK + 4097], [300, 2 * CHUNK + 511, 4096]], ids=str)
async def test_every_byte_goes_up_and_stays_in_the_pool_too(
    place: Path, sizes: list[int], device: Device, fake_cuda: FakeCuda
) -> None:
    checkpoint = read_folder(folder_of(place / "model", *sizes))
    drop_page_cache(checkpoint.path)
    with device.create_buffer(room_for(checkpoint)) as buffer:
        targets = targets_in(buffer, checkpoint)
        async with registered(device) as loader:
            lease = await loader.load_to_device(checkpoint, targets)
            assert on_device(checkpoint, targets) == bytes_of(loader, lease) == on_disk(checkpoint)
            assert lease.report.device_bytes == lease.report.total_bytes == checkpoint.size_bytes
            assert loader.paths().device.size_bytes == checkpoint.size_bytes
            assert fake_cuda.get("synchronous") == 0, "the pool is page-locked"
            lease.release()
            assert [resident.leases for resident in loader.residents()] == [0]


async def test_what_is_in_the_pool_goes_up_without_its_files(
    tmp_path: Path, device: Device, fake_cuda: FakeCuda
) -> None:
    checkpoint = checkpoint_of(tmp_path, chunks=4)
    expected = on_disk(checkpoint)
    with device.create_buffer(room_for(checkpoint)) as buffer:
        targets = targets_in(buffer, checkpoint)
        async with registered(device) as loader:
            (await loader.lease(checkpoint)).release()
            (tmp_path / "model.safetensors").unlink()
            lease = await loader.load_to_device(checkpoint, targets)
            assert on_device(checkpoint, targets) == expected
            assert (lease.report.pool_bytes, lease.report.ssd_bytes) == (checkpoint.size_bytes, 0)


async def test_partitions_go_to_several_devices_at_once(tmp_path: Path, fake_cuda: FakeCuda) -> None:
    fake_cuda.set("devices", 2)
    checkpoint = read_folder(folder_of(tmp_path, 5 * CHUNK, 4 * CHUNK + 9))
    with Device.open(0, driver=fake_cuda.path) as one, Device.open(1, driver=fake_cuda.path) as other:
        targets = {
            file.name: DeviceTarget(device.create_buffer(file.size_bytes))
            for file, device in zip(checkpoint.files, (one, other), strict=True)
        }
        async with registered(one) as loader:
            await loader.register(other)
            await loader.load_to_device(checkpoint, targets)
            assert on_device(checkpoint, targets) == on_disk(checkpoint)
            assert (fake_cuda.get("copies_done_0"), fake_cuda.get("copies_done_1")) == (5, 5)


async def test_a_pool_that_is_not_page_locked_serves_too(tmp_path: Path, device: Device, fake_cuda: FakeCuda) -> None:
    checkpoint = checkpoint_of(tmp_path, chunks=3)
    with device.create_buffer(room_for(checkpoint)) as buffer:
        targets = targets_in(buffer, checkpoint)
        async with opened() as loader:
            await loader.load_to_device(checkpoint, targets)
            assert on_device(checkpoint, targets) == on_disk(checkpoint)
            assert fake_cuda.get("synchronous") == 3


@pytest.mark.parametrize("in_pool", [0, 9], ids=["empty", "leased"])
async def test_a_model_larger_than_the_room_goes_through_what_room_there_is(
    tmp_path: Path, device: Device, in_pool: int
) -> None:
    big = read_folder(folder_of(tmp_path / "big", 20 * CHUNK + 1, 3 * CHUNK))
    other = checkpoint_of(tmp_path / "other", chunks=9, seed=5)
    with device.create_buffer(room_for(big)) as buffer:
        targets = targets_in(buffer, big)
        async with registered(device, chunks=10) as loader:
            if in_pool:
                await loader.lease(other)
            free_bytes = loader.free_bytes
            lease = await loader.load_to_device(big, targets)
            assert lease.files == ()
            assert on_device(big, targets) == on_disk(big)
            assert loader.free_bytes == free_bytes
            lease.release()
            if not in_pool:
                return
            await loader.lease(checkpoint_of(tmp_path / "last", chunks=1, seed=6))
            with pytest.raises(NoCapacity):
                await loader.load_to_device(big, targets)


# ---- waiting, leaving, failing ----


async def test_a_load_is_done_when_the_device_has_it_and_not_before(
    tmp_path: Path, device: Device, fake_cuda: FakeCuda
) -> None:
    checkpoint = checkpoint_of(tmp_path, chunks=8)
    progress: list[tuple[int, int]] = []
    with device.create_buffer(room_for(checkpoint)) as buffer:
        targets = targets_in(buffer, checkpoint)
        async with registered(device) as loader:
            fake_cuda.set("hold", 1)
            scope = TaskScope("load")
            load = loader.load_to_device(checkpoint, targets, on_progress=lambda *seen: progress.append(seen))
            loading = scope.spawn(load, "load")
            await asyncio.to_thread(fake_cuda.wait, "copies_enqueued", 4)
            await until(lambda: loader.paths().page_cache.size_bytes == checkpoint.size_bytes)
            assert not loading.done()
            assert progress == []
            assert fake_cuda.get("max_outstanding") <= 2, "each stream has few on their way"
            fake_cuda.set("hold", 0)
            await loading
            assert progress[-1] == (checkpoint.size_bytes, checkpoint.size_bytes)


async def test_a_cancelled_load_gives_its_chunks_back_when_the_device_is_done_with_them(
    tmp_path: Path, device: Device, fake_cuda: FakeCuda
) -> None:
    checkpoint, other = checkpoint_of(tmp_path / "a", chunks=8), checkpoint_of(tmp_path / "b", chunks=8, seed=1)
    with device.create_buffer(room_for(checkpoint)) as buffer:
        async with registered(device, chunks=8) as loader:
            fake_cuda.set("hold", 1)
            scope = TaskScope("load")
            loading = scope.spawn(loader.load_to_device(checkpoint, targets_in(buffer, checkpoint)), "load")
            await asyncio.to_thread(fake_cuda.wait, "copies_enqueued", 4)
            loading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await loading
            assert loader.free_bytes == 0, "the device may still read them"
            waiting = scope.spawn(loader.lease(other), "lease")
            fake_cuda.set("hold", 0)
            assert bytes_of(loader, await waiting) == on_disk(other)
            assert fake_cuda.get("copies_enqueued") == 4, "what was not begun was dropped"


async def test_closing_waits_for_what_the_device_has(tmp_path: Path, device: Device, fake_cuda: FakeCuda) -> None:
    checkpoint = checkpoint_of(tmp_path, chunks=8)
    with device.create_buffer(room_for(checkpoint)) as buffer:
        async with registered(device) as loader:
            fake_cuda.set("hold", 1)
            scope = TaskScope("load")
            loading = scope.spawn(loader.load_to_device(checkpoint, targets_in(buffer, checkpoint)), "load")
            await asyncio.to_thread(fake_cuda.wait, "copies_enqueued", 4)
            closing = scope.spawn(loader.close(), "close")
            with pytest.raises(Exception, match="closing"):
                await loading
            assert not closing.done()
            fake_cuda.set("hold", 0)
            await closing


@pytest.mark.parametrize("how", ["fail_enqueue_at", "fail_async_at"])
async def test_a_copy_that_fails_fails_its_load_alone(
    tmp_path: Path, device: Device, fake_cuda: FakeCuda, how: str
) -> None:
    checkpoint = checkpoint_of(tmp_path, chunks=6)
    with device.create_buffer(room_for(checkpoint)) as buffer:
        targets = targets_in(buffer, checkpoint)
        async with registered(device) as loader:
            fake_cuda.set(how, 3)
            with pytest.raises(DeviceFailed):
                await loader.load_to_device(checkpoint, targets)
            assert loader.free_bytes == loader.pool_bytes
            assert bytes_of(loader, await loader.lease(checkpoint)) == on_disk(checkpoint)
            if how == "fail_enqueue_at":
                await loader.load_to_device(checkpoint, targets)
                assert on_device(checkpoint, targets) == on_disk(checkpoint)
            else:
                with pytest.raises(DeviceFailed):
                    await loader.load_to_device(checkpoint, targets)
                assert [resident.leases for resident in loader.residents()] == [1]


async def test_who_joins_a_load_does_not_share_the_fate_of_its_device(
    tmp_path: Path, device: Device, fake_cuda: FakeCuda
) -> None:
    checkpoint = checkpoint_of(tmp_path, chunks=6)
    with device.create_buffer(room_for(checkpoint)) as buffer:
        async with registered(device) as loader:
            fake_cuda.set("hold", 1)
            scope = TaskScope("load")
            load = scope.spawn(loader.load_to_device(checkpoint, targets_in(buffer, checkpoint)), "load")
            await asyncio.to_thread(fake_cuda.wait, "copies_enqueued", 1)
            joined = scope.spawn(loader.lease(checkpoint), "lease")
            await until(lambda: len(next(iter(loader._filling._shared.values())).waiters) == 2)
            fake_cuda.lose(0, ILLEGAL_ADDRESS)
            fake_cuda.set("hold", 0)
            with pytest.raises(DeviceFailed):
                await load
            assert bytes_of(loader, await joined) == on_disk(checkpoint)


async def test_who_leaves_a_load_that_others_wait_for_may_give_his_device_memory_back(
    tmp_path: Path, device: Device, fake_cuda: FakeCuda
) -> None:
    checkpoint = checkpoint_of(tmp_path, chunks=12)
    async with registered(device) as loader:
        buffer = device.create_buffer(room_for(checkpoint))
        fake_cuda.set("hold", 1)
        scope = TaskScope("load")
        load = scope.spawn(loader.load_to_device(checkpoint, targets_in(buffer, checkpoint)), "load")
        await asyncio.to_thread(fake_cuda.wait, "copies_enqueued", 4)
        joined = scope.spawn(loader.lease(checkpoint), "lease")
        await until(lambda: len(next(iter(loader._filling._shared.values())).waiters) == 2)
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
        closing = scope.spawn(asyncio.to_thread(buffer.close), "close")
        fake_cuda.set("hold", 0)
        assert bytes_of(loader, await joined) == on_disk(checkpoint)
        await closing
        assert fake_cuda.get("copies_enqueued") == 4, "nothing goes where nobody wants it"


async def test_a_load_of_a_closed_buffer_takes_nothing(tmp_path: Path, device: Device) -> None:
    checkpoint = checkpoint_of(tmp_path, chunks=2)
    async with registered(device) as loader:
        buffer = device.create_buffer(room_for(checkpoint))
        targets = targets_in(buffer, checkpoint)
        buffer.close()
        with pytest.raises(AssertionError, match="closed"):
            await loader.load_to_device(checkpoint, targets)
        assert loader.free_bytes == loader.pool_bytes
        (await loader.lease(checkpoint)).release()
        with pytest.raises(AssertionError, match="closed"):
            await loader.load_to_device(checkpoint, targets)
        assert [resident.leases for resident in loader.residents()] == [0]


async def test_registering_twice_is_undone_once(tmp_path: Path, device: Device) -> None:
    async with registered(device) as loader:
        await loader.register(device)


async def test_a_file_that_changed_ends_the_load_with_its_reason(tmp_path: Path, device: Device) -> None:
    checkpoint = checkpoint_of(tmp_path, chunks=6)
    (tmp_path / "model.safetensors").write_bytes(b"other")
    with device.create_buffer(room_for(checkpoint)) as buffer:
        async with registered(device) as loader:
            with pytest.raises(CheckpointChanged):
                await loader.load_to_device(checkpoint, targets_in(buffer, checkpoint))
            assert loader.free_bytes == loader.pool_bytes


async def test_a_damaged_chunk_does_not_go_up(tmp_path: Path, device: Device, fake_cuda: FakeCuda) -> None:
    convert(checkpoint_of(tmp_path / "model").path, tmp_path / "converted", chunk_bytes=CHUNK)
    checkpoint = read_folder(tmp_path / "converted")
    wrong = msgspec.structs.replace(checkpoint.files[0], digests=bytes(len(checkpoint.files[0].digests)))
    checkpoint = msgspec.structs.replace(checkpoint, files=(wrong,))
    with device.create_buffer(room_for(checkpoint)) as buffer:
        async with registered(device) as loader:
            with pytest.raises(CheckpointCorrupt):
                await loader.load_to_device(checkpoint, targets_in(buffer, checkpoint), verify=True)
            assert fake_cuda.get("copies_enqueued") == 0


# ---- wrong wishes ----


async def test_targets_that_do_not_fit_are_refused_and_take_nothing(tmp_path: Path, device: Device) -> None:
    checkpoint = checkpoint_of(tmp_path, chunks=2)
    with device.create_buffer(checkpoint.size_bytes) as buffer:
        async with registered(device) as loader:
            for targets in (
                {},
                {"other.safetensors": DeviceTarget(buffer)},
                {"model.safetensors": DeviceTarget(buffer, 1)},
                {"model.safetensors": DeviceTarget(buffer, 2**63)},
            ):
                with pytest.raises(InvalidInput):
                    await loader.load_to_device(checkpoint, targets)
                assert loader.free_bytes == loader.pool_bytes


async def test_the_portable_mover_has_no_devices(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = checkpoint_of(tmp_path)
    with device.create_buffer(room_for(checkpoint)) as buffer:
        monkeypatch.setenv("SLLM_NO_NATIVE", "1")
        async with opened() as loader:
            with pytest.raises(ConfigInvalid, match="SLLM_NO_NATIVE"):
                await loader.register(device)
            with pytest.raises(ConfigInvalid, match="SLLM_NO_NATIVE"):
                await loader.load_to_device(checkpoint, targets_in(buffer, checkpoint))
            assert loader.free_bytes == loader.pool_bytes


async def test_a_device_may_leave_before_the_loader(tmp_path: Path, fake_cuda: FakeCuda) -> None:
    checkpoint = checkpoint_of(tmp_path)
    async with opened() as loader:
        for _ in range(2):
            with Device.open(0, driver=fake_cuda.path) as device:
                await loader.register(device)
                buffer = device.create_buffer(room_for(checkpoint))
                await loader.load_to_device(checkpoint, targets_in(buffer, checkpoint))
