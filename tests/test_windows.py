"""Checkpoints that the host pool has no room for, from a source to a device; and digests that cover several chunks."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from device_houses import Held, copied, given_back, is_there, loading, registered, stored_bytes
from device_houses import buffer as buffer
from fake_cuda import FakeCuda
from fake_cuda import fake_cuda as fake_cuda
from fake_cuda import fake_cuda_library as fake_cuda_library
from houses import WEIGHTS, house, spoiled
from houses import origin as origin
from houses import stock as stock
from loaders import CHUNK, checkpoint_of, until
from scripted_source import ScriptedSource
from test_device_loads import device as device

from sllm_actor.checkpoint.convert import convert
from sllm_actor.errors import CheckpointCorrupt, DeviceError, ModelTooLarge, NoCapacity, WriteFailed
from sllm_actor.loader.device import Device, DeviceBuffer
from sllm_actor.loader.ssd_partial import SsdPartial
from sllm_actor.runtime.tasks import TaskScope

CHUNKS = 17  # Of `origin`.


@pytest.fixture
def coarse(tmp_path: Path, stock: Path) -> Path:
    """The checkpoint of `origin` with digests of four chunks each, the last of one."""
    convert(stock, tmp_path / "coarse", chunk_bytes=4 * CHUNK)
    return tmp_path / "coarse"


# ---- larger than the pool ----


@pytest.mark.parametrize("chunks", [1, 9])
@pytest.mark.parametrize("kind", ["origin", "stock"])
async def test_a_checkpoint_larger_than_the_pool_goes_through_it_to_the_device_and_to_the_ssd(
    request: pytest.FixtureRequest, kind: str, chunks: int, device: Device, buffer: DeviceBuffer
) -> None:
    progress: list[tuple[int, int]] = []
    async with registered(request.getfixturevalue(kind), device, chunks=chunks) as node:
        lease = await loading(node, buffer, on_progress=lambda *seen: progress.append(seen))
        size_bytes = node.card.checkpoint.size_bytes
        assert is_there(node, buffer)
        assert lease.files == ()
        assert lease.report.remote_bytes == lease.report.device_bytes == lease.report.total_bytes == size_bytes
        lease.release()
        await node.stored()
        await given_back(node)
        assert node.tiers.loader.residents() == []
        assert progress[-1] == (size_bytes, size_bytes)
        # And once more, from the SSD.
        asked = len(node.source.reads)
        lease = await loading(node, buffer)
        assert (lease.files, lease.report.remote_bytes) == ((), 0)
        assert is_there(node, buffer)
        assert len(node.source.reads) == asked
        assert node.tiers.loader.free_bytes == node.tiers.loader.pool_bytes


async def test_on_a_processor_such_a_checkpoint_is_refused_with_both_sizes(
    origin: Path, device: Device, buffer: DeviceBuffer
) -> None:
    async with registered(origin, device, chunks=9) as node:
        asked, scope = len(node.source.reads), TaskScope("test")
        with pytest.raises(ModelTooLarge, match=r"takes 1\.1 MB of host memory and the host pool has 589\.8 kB"):
            await node.lease()
        assert len(node.source.reads) == asked
        source = Held(node, 3 * CHUNK)
        load = scope.spawn(loading(node, buffer), "load")
        await until(lambda: node.tiers.arriving(node.card) == (3 * CHUNK, node.card.checkpoint.size_bytes))
        with pytest.raises(ModelTooLarge):
            await node.lease()
        source.give()
        (await load).release()
        assert is_there(node, buffer)
        await node.stored()
        with pytest.raises(ModelTooLarge):
            await node.lease()


async def test_a_device_that_does_not_come_along_holds_the_source_up_when_the_window_is_full(
    origin: Path, device: Device, buffer: DeviceBuffer, fake_cuda: FakeCuda
) -> None:
    async with registered(origin, device, chunks=9) as node:
        fake_cuda.set("hold", 1)
        asked, scope = len(node.source.reads), TaskScope("test")
        load = scope.spawn(loading(node, buffer), "load")
        await until(lambda: stored_bytes(node) == 9 * CHUNK)
        assert node.source.under_way == 0
        assert len(node.source.reads) - asked == 9
        assert fake_cuda.get("copies_enqueued") == 4
        fake_cuda.set("hold", 0)
        (await load).release()
        assert is_there(node, buffer)
        await node.stored()


async def test_a_full_window_lets_the_writes_to_the_ssd_go_at_full_speed(
    origin: Path, device: Device, buffer: DeviceBuffer
) -> None:
    pressed = asyncio.Event()

    @contextmanager
    def pressing() -> Iterator[None]:
        pressed.set()
        yield
        pressed.clear()

    async def gate(_: int) -> None:
        await pressed.wait()

    async with registered(origin, device, chunks=9, gate=gate, pressing=pressing) as node:
        (await loading(node, buffer)).release()
        assert is_there(node, buffer)
        pressed.set()
        await node.stored()


@pytest.mark.parametrize("how", ["no room", "fails in the middle"])
async def test_without_a_copy_on_the_ssd_it_goes_through_all_the_same(
    origin: Path, device: Device, buffer: DeviceBuffer, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, written = SsdPartial.write, 0

    async def write(partial: SsdPartial, file: int, chunk: int, data: memoryview) -> None:
        nonlocal written
        written += 1
        if written > 5:
            raise WriteFailed("the disk is full")
        await plain(partial, file, chunk, data)

    monkeypatch.setattr(SsdPartial, "write", write)
    quota_bytes = 5 * CHUNK if how == "no room" else 10**9
    async with registered(origin, device, chunks=9, quota_bytes=quota_bytes) as node:
        (await loading(node, buffer)).release()
        assert is_there(node, buffer)
        assert written == (0 if how == "no room" else 6) or written == 7  # Two write at once.
        await given_back(node)
        assert not node.tiers.is_on_ssd(node.card)


async def test_a_device_that_fails_leaves_the_ssd_what_it_has_and_the_next_goes_on_from_there(
    origin: Path, device: Device, buffer: DeviceBuffer, fake_cuda: FakeCuda
) -> None:
    async with registered(origin, device, chunks=9) as node:
        source, scope = Held(node, 9 * CHUNK), TaskScope("test")
        load = scope.spawn(loading(node, buffer), "load")
        await until(lambda: stored_bytes(node) == 9 * CHUNK)
        fake_cuda.set("fail_enqueue_at", 1)
        source.give(11 * CHUNK)
        with pytest.raises(DeviceError):
            await load
        await given_back(node)
        assert node.source.under_way == 0
        (entry,) = node.tiers.ssd.entries()
        assert entry.partial
        source.give()
        lease = await loading(node, buffer)
        assert lease.report.ssd_bytes >= 9 * CHUNK
        assert lease.report.ssd_bytes + lease.report.remote_bytes == lease.report.total_bytes
        assert is_there(node, buffer)
        await node.stored()


@pytest.mark.parametrize("held", [False, True], ids=["in the middle", "while it copies"])
async def test_who_leaves_gives_the_window_back(origin: Path, device: Device, fake_cuda: FakeCuda, held: bool) -> None:
    async with registered(origin, device, chunks=9) as node:
        source, scope = Held(node, 2**60 if held else 5 * CHUNK), TaskScope("test")
        fake_cuda.set("hold", int(held))
        buffer = device.create_buffer(20 * CHUNK)
        load = scope.spawn(loading(node, buffer), "load")
        await until(lambda: stored_bytes(node) == (9 if held else 5) * CHUNK)
        load.cancel()
        await asyncio.wait([load])
        closing = scope.spawn(asyncio.to_thread(buffer.close), "close")
        fake_cuda.set("hold", 0)
        await closing
        await given_back(node)
        assert node.source.under_way == 0
        source.give()
        with device.create_buffer(20 * CHUNK) as other:
            lease = await loading(node, other)
            assert lease.report.ssd_bytes >= 5 * CHUNK
            assert is_there(node, other)
        await node.stored()


async def test_two_devices_that_ask_at_once_share_the_window_and_one_that_comes_late_goes_after(
    origin: Path, device: Device, fake_cuda: FakeCuda
) -> None:
    with contextlib.ExitStack() as stack:
        buffers = [stack.enter_context(device.create_buffer(20 * CHUNK)) for _ in range(3)]
        async with registered(origin, device, chunks=9) as node:
            source, scope = Held(node, 3 * CHUNK), TaskScope("test")
            asked = len(node.source.reads)
            loads = [scope.spawn(loading(node, each), "load") for each in buffers[:2]]
            await copied(fake_cuda, 6, "copies_done")
            loads.append(scope.spawn(loading(node, buffers[2]), "late"))
            await until(lambda: len(node.tiers._remote._running[node.card.checkpoint.identity]._waiters) == 3)
            source.give()
            leases = await asyncio.gather(*loads)
            assert [is_there(node, each) for each in buffers] == [True] * 3
            # The late one reads what the SSD has by then, whole or not.
            assert [lease.report.remote_bytes == lease.report.total_bytes for lease in leases] == [True, True, False]
            assert len(node.source.reads) - asked == CHUNKS
            await node.stored()


async def test_one_of_two_leaves_and_the_other_gets_all_through_the_window(
    origin: Path, device: Device, buffer: DeviceBuffer, fake_cuda: FakeCuda
) -> None:
    async with registered(origin, device, chunks=9) as node:
        other = device.create_buffer(20 * CHUNK)
        source, scope = Held(node, 3 * CHUNK), TaskScope("test")
        loads = [scope.spawn(loading(node, each), "load") for each in (other, buffer)]
        await copied(fake_cuda, 6, "copies_done")
        fake_cuda.set("hold", 1)
        source.give(6 * CHUNK)
        await copied(fake_cuda, 6 + 4)
        loads[0].cancel()
        await asyncio.wait([loads[0]])
        closing = scope.spawn(asyncio.to_thread(other.close), "close")
        fake_cuda.set("hold", 0)
        await closing
        source.give()
        (await loads[1]).release()
        assert is_there(node, buffer)
        await node.stored()
        await given_back(node)


async def test_who_wants_it_in_memory_beside_one_whom_a_window_serves_asks_for_room_of_his_own(
    origin: Path, tmp_path: Path, device: Device, buffer: DeviceBuffer
) -> None:
    async with registered(origin, device, chunks=20) as node:
        reserved = await node.tiers.loader.reserve(checkpoint_of(tmp_path / "other", chunks=9))
        source, scope = Held(node, 3 * CHUNK), TaskScope("test")
        load = scope.spawn(loading(node, buffer), "load")
        await until(lambda: stored_bytes(node) == 3 * CHUNK)
        full, later = (scope.spawn(node.lease(), name) for name in ("full", "later"))
        await until(lambda: len(node.tiers._remote._running[node.card.checkpoint.identity]._waiters) == 3)
        later.cancel()
        source.give()
        (await load).release()
        with pytest.raises(NoCapacity, match=r"takes 1\.1 MB of host memory; 720\.9 kB of 1\.3 MB can be had"):
            await full
        reserved.abandon()
        assert is_there(node, buffer)
        lease = await node.lease()
        assert node.bytes_of(lease) == node.expected()
        assert lease.report.remote_bytes == 0


async def test_when_those_have_left_whom_a_window_serves_the_others_begin_anew(
    origin: Path, tmp_path: Path, device: Device, buffer: DeviceBuffer
) -> None:
    async with registered(origin, device, chunks=20) as node:
        reserved = await node.tiers.loader.reserve(checkpoint_of(tmp_path / "other", chunks=9))
        source, scope = Held(node, 3 * CHUNK), TaskScope("test")
        load = scope.spawn(loading(node, buffer), "load")
        await until(lambda: stored_bytes(node) == 3 * CHUNK)
        plain = scope.spawn(node.lease(), "lease")
        await until(lambda: len(node.tiers._remote._running[node.card.checkpoint.identity]._waiters) == 2)
        reserved.abandon()
        load.cancel()
        source.give()
        lease = await plain
        assert node.bytes_of(lease) == node.expected()
        assert lease.report.ssd_bytes >= 3 * CHUNK
        lease.release()
        await node.stored()
        await given_back(node)


# ---- digests that cover several chunks ----


@pytest.mark.parametrize("chunks", [40, 8, 4], ids=["in the pool", "window", "smallest window"])
async def test_digests_of_several_chunks_are_compared_when_all_of_these_have_come(
    coarse: Path, device: Device, buffer: DeviceBuffer, chunks: int, fake_cuda: FakeCuda
) -> None:
    async with registered(coarse, device, chunks=chunks) as node:
        source, scope = Held(node, 15 * CHUNK), TaskScope("test")
        load = scope.spawn(loading(node, buffer), "load")
        await copied(fake_cuda, 12, "copies_done")
        await until(lambda: stored_bytes(node) == 12 * CHUNK)
        assert fake_cuda.get("copies_enqueued") == 12, "of the fourth digest's chunks one is missing"
        source.give()
        lease = await load
        assert is_there(node, buffer)
        if chunks == 40:
            assert node.bytes_of(lease) == node.expected()
        lease.release()
        await node.stored()
        await given_back(node)
        assert node.tiers.ssd.holds(node.card.model_id)


async def test_a_chunk_that_spoils_such_a_digest_is_fetched_again_with_its_neighbours(coarse: Path) -> None:
    async with house(coarse) as node:
        node.source.after = spoiled(WEIGHTS, 6 * CHUNK, times=2)
        asked = len(node.source.reads)
        lease = await node.lease()
        assert node.bytes_of(lease) == node.expected()
        assert len(node.source.reads) - asked == CHUNKS + 2 * 4
        lease.release()
        await node.stored()


async def test_a_digest_that_is_never_right_is_named_with_its_chunks(coarse: Path) -> None:
    async with house(coarse) as node:
        node.source.after = spoiled(WEIGHTS, 6 * CHUNK)
        with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors of .*: chunks 4 to 7, of 262144 bytes from"):
            await node.lease()
        await given_back(node)
        assert not node.tiers.is_on_ssd(node.card)


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
async def test_what_the_ssd_has_of_such_a_digest_is_taken_if_the_whole_is_right(coarse: Path, wrong: bool) -> None:
    async with house(coarse) as node:
        # A pull stores such chunks as they come: whether they are right is seen at its end.
        if wrong:
            node.source.after = spoiled(WEIGHTS, 5 * CHUNK, times=1)
        source, scope = Held(node, 6 * CHUNK), TaskScope("test")
        pulling = scope.spawn(node.tiers.pull(node.card), "pull")
        await until(lambda: stored_bytes(node) == 6 * CHUNK)
        pulling.cancel()
        await asyncio.wait([pulling])
        source.give()
        asked = len(node.source.reads)
        lease = await node.lease()
        assert node.bytes_of(lease) == node.expected()
        # Chunks 6 and 7 were read beside the wrong one, and then all four again.
        assert len(node.source.reads) - asked == (CHUNKS - 6) + (4 if wrong else 0)
        assert lease.report.ssd_bytes == (4 if wrong else 6) * CHUNK
        lease.release()
        await node.stored()


async def test_such_a_checkpoint_is_read_from_its_own_source_alone(coarse: Path, tmp_path: Path) -> None:
    shutil.copytree(coarse, tmp_path / "mirror")
    async with house(coarse) as node:
        mirror = ScriptedSource(tmp_path / "mirror", "test://mirror")
        plain = node.tiers._remote._open_source
        node.tiers._remote._mirrors = lambda model_id: ["test://mirror"]
        node.tiers._remote._open_source = lambda url: mirror if url == "test://mirror" else plain(url)
        (await node.lease()).release()
        assert mirror.reads == []
        await node.stored()


async def test_a_window_that_holds_less_than_one_digest_covers_is_refused(
    coarse: Path, device: Device, buffer: DeviceBuffer
) -> None:
    async with registered(coarse, device, chunks=3) as node:
        with pytest.raises(ModelTooLarge, match=r"covers 262\.1 kB .* has 196\.6 kB"):
            await loading(node, buffer)
        await given_back(node)
        await node.tiers.pull(node.card)
        (await loading(node, buffer)).release()
        assert is_there(node, buffer)
