"""A checkpoint from a source to host memory, to the SSD and to devices at once, over the fake driver."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from device_houses import Held, copied, given_back, is_there, loading, registered, stored_bytes
from device_houses import buffer as buffer
from fake_cuda import FakeCuda
from fake_cuda import fake_cuda as fake_cuda
from fake_cuda import fake_cuda_library as fake_cuda_library
from fault_proxy import Fault, FaultProxy
from houses import WEIGHTS, House, house, spoiled, tiers_at
from houses import origin as origin
from houses import stock as stock
from loaders import CHUNK, LIMIT_S, bytes_of, until
from test_device import ask, owner
from test_device_loads import device as device
from test_device_loads import on_device
from web_server import WebServer

from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.errors import (
    CheckpointCorrupt,
    ConfigInvalid,
    DeviceError,
    DeviceFailed,
    Draining,
    InvalidInput,
    SourceChanged,
)
from sllm_actor.loader.device import Device, DeviceBuffer
from sllm_actor.loader.lease import DeviceTarget
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.sources.local import FolderSource
from sllm_actor.sources.open import open_source
from sllm_actor.sources.source import Source, SourceFile, SourceOptions

CHUNKS = 17  # Of `origin`.
ILLEGAL_ADDRESS, OUT_OF_MEMORY = 700, 2


def over_http(url: str) -> Source:
    return open_source(url, SourceOptions(), {}, FolderSource)


# ---- three ways at once ----


@pytest.mark.parametrize("kind", ["origin", "stock"])
async def test_a_checkpoint_goes_to_the_device_to_memory_and_to_the_ssd(
    request: pytest.FixtureRequest, kind: str, device: Device, buffer: DeviceBuffer, fake_cuda: FakeCuda
) -> None:
    progress: list[tuple[int, int]] = []
    async with registered(request.getfixturevalue(kind), device) as node:
        lease = await loading(node, buffer, on_progress=lambda *seen: progress.append(seen))
        assert is_there(node, buffer)
        assert node.bytes_of(lease) == node.expected()
        size_bytes = node.card.checkpoint.size_bytes
        assert lease.report.device_bytes == lease.report.remote_bytes == lease.report.total_bytes == size_bytes
        assert fake_cuda.get("bytes_copied") == size_bytes
        await until(lambda: progress[-1:] == [(size_bytes, size_bytes)])
        assert progress == sorted(progress)
        assert fake_cuda.get("synchronous") == 0, "the pool is page-locked"
        lease.release()
        await node.stored()
        await given_back(node)


async def test_chunks_go_up_while_others_are_still_to_come(
    origin: Path, device: Device, buffer: DeviceBuffer, fake_cuda: FakeCuda
) -> None:
    async with registered(origin, device) as node:
        source, scope = Held(node, 9 * CHUNK), TaskScope("test")
        load = scope.spawn(loading(node, buffer), "load")
        await copied(fake_cuda, 9, "copies_done")
        await until(lambda: stored_bytes(node) == 9 * CHUNK)
        assert not load.done()
        source.give()
        lease = await load
        assert is_there(node, buffer)
        lease.release()
        await node.stored()


async def test_what_arrives_damaged_does_not_go_up(
    origin: Path, device: Device, buffer: DeviceBuffer, fake_cuda: FakeCuda
) -> None:
    async with registered(origin, device) as node:
        node.source.after = spoiled(WEIGHTS, 3 * CHUNK, times=2)
        lease = await loading(node, buffer)
        assert is_there(node, buffer)
        assert fake_cuda.get("copies_enqueued") == CHUNKS, "each went up once, and right"
        lease.release()
        await node.stored()


async def test_a_load_is_done_when_the_device_has_all_of_it_and_nobody_else_waits_for_that(
    origin: Path, device: Device, buffer: DeviceBuffer, fake_cuda: FakeCuda
) -> None:
    async with registered(origin, device) as node:
        fake_cuda.set("hold", 1)
        scope = TaskScope("test")
        load = scope.spawn(loading(node, buffer), "load")
        await copied(fake_cuda, 4)
        lease = await node.lease()
        assert node.bytes_of(lease) == node.expected(), "the network did not wait for the device"
        await node.stored()
        lease.release()
        assert not load.done()
        assert [resident.leases for resident in node.tiers.loader.residents()] != [0], "the device still reads it"
        assert fake_cuda.get("max_outstanding") <= 2, "each stream has few on their way"
        fake_cuda.set("hold", 0)
        lease = await load
        assert is_there(node, buffer)
        lease.release()
        await given_back(node)


async def test_partitions_go_to_several_devices(stock: Path, fake_cuda: FakeCuda) -> None:
    fake_cuda.set("devices", 2)
    with Device.open(0, driver=fake_cuda.path) as one, Device.open(1, driver=fake_cuda.path) as other:
        buffers = [device.create_buffer(11 * CHUNK) for device in (one, other)]
        async with registered(stock, one) as node:
            await node.tiers.loader.register(other)
            checkpoint = node.card.checkpoint
            targets = {file.name: DeviceTarget(buffer) for file, buffer in zip(checkpoint.files, buffers, strict=True)}
            lease = await node.tiers.load_to_device(node.card, targets)
            assert on_device(checkpoint, targets) == node.expected()
            assert (fake_cuda.get("copies_done_0"), fake_cuda.get("copies_done_1")) == (11, 7)
            assert lease.report.device_bytes == checkpoint.size_bytes
            lease.release()
            await node.stored()


async def test_one_partition_alone_goes_up_and_all_of_it_is_stored(
    stock: Path, device: Device, buffer: DeviceBuffer
) -> None:
    async with registered(stock, device) as node:
        second = node.card.checkpoint.files[1]
        lease = await node.tiers.load_to_device(node.card, {second.name: DeviceTarget(buffer, 512)})
        assert buffer.read(512, second.size_bytes) == node.expected()[1]
        assert lease.report.device_bytes == second.size_bytes
        assert node.bytes_of(lease) == node.expected()
        lease.release()
        await node.stored()


@pytest.mark.parametrize("chunks", [40, 9], ids=["in the pool", "through a window"])
async def test_a_web_server_s_model_goes_to_the_device_of_another_process_and_is_then_on_the_ssd(
    origin: Path, web: WebServer, tmp_path: Path, device: Device, fake_cuda: FakeCuda, chunks: int
) -> None:
    folder = web.folder / tmp_path.name
    folder.symlink_to(origin)
    content = (origin / WEIGHTS).read_bytes()
    broken = [Fault(corrupt_byte=99), Fault(cut_after_bytes=CHUNK // 2, reset=True)]

    def choose(request: Any) -> Fault | None:
        first = int(request.headers.get("range", "bytes=0-")[6:].partition("-")[0])
        return broken.pop() if WEIGHTS in request.path and first > 2 * CHUNK and broken else None

    with FaultProxy(web.port, choose=choose) as proxy, owner(fake_cuda.path, len(content)) as (process, handle):
        async with tiers_at(
            tmp_path / "node", lambda url: open_source(url, SourceOptions(), {}, FolderSource), chunks=chunks
        ) as tiers:
            await tiers.loader.register(device)
            card = await tiers.describe(f"{proxy.url}/ranges/{folder.name}/")
            with device.open_buffer(handle, len(content)) as buffer:
                lease = await tiers.load_to_device(card, {WEIGHTS: DeviceTarget(buffer)})
            assert broken == []
            assert ask(process, 0, len(content)) == content
            assert bytes_of(tiers.loader, lease) == ([content] if chunks == 40 else [])
            assert lease.report.remote_bytes == lease.report.device_bytes == len(content)
            lease.release()
            await until(lambda: tiers.is_on_ssd(card))
    folder.unlink()


async def test_what_a_higher_tier_has_goes_up_from_there(origin: Path, device: Device, buffer: DeviceBuffer) -> None:
    async with registered(origin, device) as node:
        await node.tiers.pull(node.card)
        asked = len(node.source.reads)
        lease = await loading(node, buffer, verify=True)
        assert is_there(node, buffer)
        assert lease.report.remote_bytes == 0 < lease.report.page_cache_bytes + lease.report.ssd_bytes
        lease.release()
        lease = await loading(node, buffer)
        assert lease.report.pool_bytes == lease.report.total_bytes == lease.report.device_bytes
        lease.release()
        assert len(node.source.reads) == asked


# ---- together with others ----


async def test_who_joins_a_load_with_a_device_gets_what_is_there_and_what_is_still_to_come(
    origin: Path, device: Device, buffer: DeviceBuffer, fake_cuda: FakeCuda
) -> None:
    async with registered(origin, device) as node:
        source, scope = Held(node, 9 * CHUNK), TaskScope("test")
        asked = len(node.source.reads)
        plain = scope.spawn(node.lease(), "lease")
        await until(lambda: node.tiers.arriving(node.card) == (9 * CHUNK, node.card.checkpoint.size_bytes))
        assert fake_cuda.get("copies_enqueued") == 0
        load = scope.spawn(loading(node, buffer), "load")
        await copied(fake_cuda, 9, "copies_done")
        source.give()
        leases = await asyncio.gather(plain, load)
        assert is_there(node, buffer)
        assert all(node.bytes_of(lease) == node.expected() for lease in leases)
        assert [lease.report.device_bytes for lease in leases] == [0, node.card.checkpoint.size_bytes]
        assert len(node.source.reads) - asked == fake_cuda.get("copies_enqueued") == CHUNKS
        for lease in leases:
            lease.release()
        await node.stored()
        await given_back(node)


async def test_two_devices_share_one_load_and_the_failure_of_one_is_its_own(origin: Path, fake_cuda: FakeCuda) -> None:
    fake_cuda.set("devices", 2)
    with Device.open(0, driver=fake_cuda.path) as well, Device.open(1, driver=fake_cuda.path) as lost:
        buffers = [device.create_buffer(20 * CHUNK) for device in (well, lost)]
        async with registered(origin, well) as node:
            await node.tiers.loader.register(lost)
            source, scope = Held(node, 9 * CHUNK), TaskScope("test")
            asked = len(node.source.reads)
            loads = [scope.spawn(loading(node, each), "load") for each in buffers]
            await copied(fake_cuda, 9, "copies_done_1")
            fake_cuda.lose(1, ILLEGAL_ADDRESS)
            source.give()
            with pytest.raises(DeviceFailed, match="ILLEGAL_ADDRESS"):
                await loads[1]
            lease = await loads[0]
            assert is_there(node, buffers[0])
            assert len(node.source.reads) - asked == CHUNKS
            lease.release()
            await node.stored()
            await given_back(node)


async def test_who_leaves_may_close_his_buffer_at_once_and_the_others_go_on(
    origin: Path, device: Device, fake_cuda: FakeCuda
) -> None:
    async with registered(origin, device) as node:
        buffer = device.create_buffer(20 * CHUNK)
        fake_cuda.set("hold", 1)
        source, scope = Held(node, 9 * CHUNK), TaskScope("test")
        load = scope.spawn(loading(node, buffer), "load")
        await copied(fake_cuda, 4)
        plain = scope.spawn(node.lease(), "lease")
        await until(lambda: len(node.tiers._remote._running[node.card.checkpoint.identity]._waiters) == 2)
        load.cancel()
        await asyncio.wait([load])
        closing = scope.spawn(asyncio.to_thread(buffer.close), "close")
        fake_cuda.set("hold", 0)
        await closing
        enqueued = fake_cuda.get("copies_enqueued")
        source.give()
        lease = await plain
        assert node.bytes_of(lease) == node.expected()
        assert fake_cuda.get("copies_enqueued") == enqueued <= 5, "nothing goes where nobody wants it"
        lease.release()
        await node.stored()
        await given_back(node)


# ---- devices that fail ----


@pytest.mark.parametrize(
    ("how", "result", "says"),
    [
        ("fail_enqueue_at", 0, "INVALID_VALUE"),
        ("fail_enqueue_at", OUT_OF_MEMORY, "OUT_OF_MEMORY"),
        ("fail_async_at", 0, "ILLEGAL_ADDRESS"),
    ],
)
async def test_a_device_that_fails_ends_its_load_and_leaves_the_ssd_what_it_has(
    origin: Path, fake_cuda: FakeCuda, how: str, result: int, says: str
) -> None:
    with Device.open(0, driver=fake_cuda.path) as device, device.create_buffer(20 * CHUNK) as buffer:
        async with registered(origin, device) as node:
            source, scope = Held(node, 6 * CHUNK), TaskScope("test")
            fake_cuda.set("fail_result", result)
            fake_cuda.set(how, 7)
            load = scope.spawn(loading(node, buffer), "load")
            await until(lambda: stored_bytes(node) == 6 * CHUNK)
            source.give(9 * CHUNK)
            with pytest.raises(DeviceError, match=says):
                await load
            await given_back(node)
            assert node.source.under_way == 0
            (entry,) = node.tiers.ssd.entries()
            assert entry.done_bytes >= 6 * CHUNK
            assert not entry.leases
            node.source.before = None
            lease = await node.lease()
            assert node.bytes_of(lease) == node.expected()
            assert lease.report.ssd_bytes >= 6 * CHUNK
            lease.release()
            await node.stored()
            if how == "fail_enqueue_at":  # Such a device can be used again; the other has lost its context.
                (await loading(node, buffer)).release()
                assert is_there(node, buffer)
            else:
                with pytest.raises(DeviceError):
                    await loading(node, buffer)


async def test_a_device_that_fails_when_all_has_arrived_costs_nobody_the_copy_on_the_ssd(
    origin: Path, fake_cuda: FakeCuda
) -> None:
    with Device.open(0, driver=fake_cuda.path) as device, device.create_buffer(20 * CHUNK) as buffer:
        async with registered(origin, device) as node:
            fake_cuda.set("hold", 1)
            scope = TaskScope("test")
            load = scope.spawn(loading(node, buffer), "load")
            await node.stored()
            fake_cuda.lose(0, ILLEGAL_ADDRESS)
            fake_cuda.set("hold", 0)
            with pytest.raises(DeviceFailed):
                await load
            await given_back(node)
            assert len(node.tiers.loader.residents()) == 1
            assert node.tiers.is_on_ssd(node.card)


async def test_memory_whose_owner_dies_ends_the_load_and_no_handle_of_it_is_taken_after(
    origin: Path, device: Device, fake_cuda: FakeCuda
) -> None:
    async with registered(origin, device) as node:
        source, scope = Held(node, 9 * CHUNK), TaskScope("test")
        with owner(fake_cuda.path, 20 * CHUNK) as (process, handle):
            buffer = device.open_buffer(handle, 20 * CHUNK)
            load = scope.spawn(loading(node, buffer), "load")
            await copied(fake_cuda, 2)
            process.kill()
            process.wait(LIMIT_S)
        source.give()
        await asyncio.wait([load])
        if load.exception() is None:
            load.result().release()
        else:
            assert isinstance(load.exception(), DeviceError)
        buffer.close()
        fake_cuda.refusals += 1
        with pytest.raises(InvalidInput, match="no handle of living device memory"):
            device.open_buffer(handle, 20 * CHUNK)
        lease = await node.lease()
        lease.release()
        await node.stored()
        await given_back(node)


async def test_targets_that_do_not_fit_are_refused_before_the_source_is_asked(
    origin: Path, device: Device, buffer: DeviceBuffer
) -> None:
    async with registered(origin, device) as node:
        asked = len(node.source.reads)
        for targets in ({}, {"other": DeviceTarget(buffer)}, {WEIGHTS: DeviceTarget(buffer, 4 * CHUNK)}):
            with pytest.raises(InvalidInput):
                await node.tiers.load_to_device(node.card, targets)
        assert len(node.source.reads) == asked
        assert node.tiers.ssd.entries() == []


async def test_a_closed_buffer_takes_nothing_and_leaves_nothing(origin: Path, device: Device) -> None:
    async with registered(origin, device) as node:
        buffer = device.create_buffer(20 * CHUNK)
        buffer.close()
        with pytest.raises(AssertionError, match="closed"):
            await loading(node, buffer)
        await given_back(node)


async def test_the_portable_mover_says_that_it_has_no_devices(
    origin: Path, buffer: DeviceBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLLM_NO_NATIVE", "1")
    async with house(origin) as node:
        with pytest.raises(ConfigInvalid, match="SLLM_NO_NATIVE"):
            await loading(node, buffer)
        await given_back(node)


# ---- leaving ----


async def in_the_queue(node: House, fake: FakeCuda, stack: contextlib.AsyncExitStack) -> None:
    for _ in range(4):
        await stack.enter_async_context(node.tiers._remote_queue.turn(1))


async def before_the_first_byte(node: House, fake: FakeCuda, stack: contextlib.AsyncExitStack) -> None:
    Held(node, 0)


async def in_the_middle(node: House, fake: FakeCuda, stack: contextlib.AsyncExitStack) -> None:
    Held(node, 9 * CHUNK)


async def when_all_but_the_copies_are_done(node: House, fake: FakeCuda, stack: contextlib.AsyncExitStack) -> None:
    fake.set("hold", 1)


def waits(node: House, fake: FakeCuda) -> bool:
    """Whether a load has come as far as each of these stages lets it."""
    arrived = node.tiers.arriving(node.card)
    return (
        node.tiers._remote_queue.waiting == 1
        or (arrived is not None and arrived[0] == 0 and node.source.under_way == 4)
        or (arrived is not None and arrived[0] == 9 * CHUNK and fake.get("copies_done") == 9)
        or (arrived is None and bool(node.tiers.loader.residents()) and fake.get("copies_enqueued") == 4)
    )


@pytest.mark.parametrize(
    "stage", [in_the_queue, before_the_first_byte, in_the_middle, when_all_but_the_copies_are_done]
)
async def test_who_leaves_at_any_stage_leaves_nothing_behind(
    origin: Path,
    device: Device,
    fake_cuda: FakeCuda,
    stage: Callable[[House, FakeCuda, contextlib.AsyncExitStack], Awaitable[None]],
) -> None:
    async with registered(origin, device) as node, contextlib.AsyncExitStack() as stack:
        await stage(node, fake_cuda, stack)
        scope, buffer = TaskScope("test"), device.create_buffer(20 * CHUNK)
        load = scope.spawn(loading(node, buffer), "load")
        await until(lambda: waits(node, fake_cuda))
        load.cancel()
        await asyncio.wait([load])
        assert load.cancelled()
        closing = scope.spawn(asyncio.to_thread(buffer.close), "close")
        fake_cuda.set("hold", 0)
        await closing
        node.source.before = None
        await stack.aclose()
        await until(lambda: node.source.under_way == 0 and node.tiers.arriving(node.card) is None)
        await given_back(node)
        with device.create_buffer(20 * CHUNK) as other:
            lease = await loading(node, other)
            assert is_there(node, other)
            lease.release()
        await node.stored()
        await given_back(node)


async def test_closing_ends_a_load_to_a_device(
    origin: Path, device: Device, buffer: DeviceBuffer, fake_cuda: FakeCuda
) -> None:
    async with registered(origin, device) as node:
        Held(node, 9 * CHUNK)
        scope = TaskScope("test")
        load = scope.spawn(loading(node, buffer), "load")
        await copied(fake_cuda, 9, "copies_done")
        await node.tiers.close()
        with pytest.raises(Draining):
            await load


async def test_a_source_that_fails_ends_the_copies_too(origin: Path, device: Device, fake_cuda: FakeCuda) -> None:
    async with registered(origin, device) as node:

        async def fail(file: SourceFile, at: int, into: memoryview) -> None:
            if at >= 5 * CHUNK:
                raise SourceChanged("another one")

        node.source.before = fail
        buffer = device.create_buffer(20 * CHUNK)
        with pytest.raises(SourceChanged):
            await loading(node, buffer)
        buffer.close()
        await given_back(node)
        node.source.before, node.source.after = None, spoiled(WEIGHTS, 7 * CHUNK)
        with device.create_buffer(20 * CHUNK) as other, pytest.raises(CheckpointCorrupt, match="chunk 7"):
            await loading(node, other)
        await given_back(node)


async def test_chunks_on_their_way_leave_other_loads_room(
    origin: Path, stock: Path, device: Device, buffer: DeviceBuffer, fake_cuda: FakeCuda
) -> None:
    async with registered(origin, device, max_loads=4) as node:
        fake_cuda.set("hold", 1)
        scope = TaskScope("test")
        load = scope.spawn(loading(node, buffer), "load")
        await copied(fake_cuda, 2)
        other = await node.tiers.lease(read_folder(stock))
        fake_cuda.set("hold", 0)
        lease = await load
        assert is_there(node, buffer)
        for held in (lease, other):
            held.release()
        await node.stored()
