"""Who waits for whom: loads on one disk or device go one after another, those on others do not wait for them."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, cast

import pytest
from checkpoints import folder_of
from device_houses import registered
from fake_cuda import FakeCuda
from fake_cuda import fake_cuda as fake_cuda
from fake_cuda import fake_cuda_library as fake_cuda_library
from houses import house
from houses import origin as origin
from loaders import CHUNK
from test_instance_faults import OneModel, model_of

from sllm_actor.actors.registry import Registry
from sllm_actor.checkpoint.folder import Checkpoint, read_folder
from sllm_actor.loader.device import Device
from sllm_actor.loader.lease import DeviceTarget
from sllm_actor.loader.load_queue import LoadQueue
from sllm_actor.loader.tiers import Tiers, _disk_way
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.runtime.tasks import TaskScope

A, B, BOTH = frozenset({"a"}), frozenset({"b"}), frozenset({"a", "b"})


async def settled() -> None:
    """Let everything run that can."""
    for _ in range(5):
        await asyncio.sleep(0)


class Queued:
    """Loads of a queue by name: when each has begun, and when it may end."""

    def __init__(self, queue: LoadQueue) -> None:
        self._queue = queue
        self._scope = TaskScope("test")
        self._ends: dict[str, asyncio.Event] = {}
        self.running: list[str] = []

    async def begin(self, name: str, ways: frozenset[str], size_bytes: int = 1, priority: int = 0) -> None:
        end = self._ends[name] = asyncio.Event()

        async def load() -> None:
            async with self._queue.turn(size_bytes, priority, ways=ways):
                self.running.append(name)
                await end.wait()
                self.running.remove(name)

        self._scope.spawn(load(), name)
        await settled()

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await settled()


async def test_loads_on_one_way_go_one_after_another_and_those_on_another_do_not_wait() -> None:
    loads = Queued(LoadQueue(1, lambda _: 1.0))
    for name, way in (("a1", A), ("a2", A), ("b1", B)):
        await loads.begin(name, way)
    assert loads.running == ["a1", "b1"]
    await loads.end("a1")
    assert loads.running == ["b1", "a2"]
    await loads.end("a2")
    await loads.end("b1")


async def test_a_load_on_two_ways_waits_for_both_and_nobody_overtakes_it_there() -> None:
    loads = Queued(LoadQueue(1, lambda _: 1.0))
    for name, ways in (("a", A), ("both", BOTH), ("b", B)):
        await loads.begin(name, ways)
    assert loads.running == ["a"]
    await loads.begin("urgent", B, priority=1)
    assert loads.running == ["a", "urgent"]
    await loads.end("a")
    await loads.end("urgent")
    assert loads.running == ["both"]
    await loads.end("both")
    assert loads.running == ["b"]
    await loads.end("b")


async def test_each_way_knows_when_it_is_through_at_its_own_bandwidth() -> None:
    queue = LoadQueue(1, {"a": 10.0, "b": 2.0}.__getitem__)
    async with queue.turn(100, ways=BOTH) as turn, queue.turn(50, ways=frozenset()):
        turn.arrive(40)
        assert (queue.remaining_s("a"), queue.remaining_s("b")) == (6.0, 30.0)
        assert queue.ways == {"a", "b"}
    assert (queue.remaining_s("a"), queue.ways) == (0.0, set())


@pytest.fixture
def in_memory() -> Iterator[Checkpoint]:
    """A checkpoint on another file system than that of the other folders."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield read_folder(folder_of(Path(folder) / "model", 3 * CHUNK))


def on_disks_of(tiers: Tiers, checkpoint: Checkpoint) -> Any:
    """Have the disks of a checkpoint to oneself."""
    return tiers._local_queue.turn(9000, ways=frozenset(map(_disk_way, checkpoint.disks)))


async def test_folders_on_two_disks_do_not_wait_for_each_other(
    origin: Path, tmp_path: Path, in_memory: Checkpoint
) -> None:
    near, far = read_folder(folder_of(tmp_path / "near", 3 * CHUNK)), in_memory
    if near.disks == far.disks:
        pytest.skip("all folders are on one file system")
    async with house(origin) as node:
        async with on_disks_of(node.tiers, near):
            (await node.tiers.lease(far)).release()
            scope = TaskScope("test")
            waiting = scope.spawn(node.tiers.lease(near), "near")
            while not node.tiers._local_queue.waiting:
                await asyncio.sleep(0)
            assert not waiting.done()
            assert node.tiers.disk_queue_s(near) > 0.0 == node.tiers.disk_queue_s(far)
            (busy,) = node.tiers.queues().local_s
            assert busy.startswith("disk ")
        (await waiting).release()
        assert node.tiers.queues().local_s == {}


async def test_the_report_has_the_queue_of_the_disk_that_a_checkpoint_lies_on(
    origin: Path, tmp_path: Path, in_memory: Checkpoint
) -> None:
    near, far = read_folder(folder_of(tmp_path / "near", 3 * CHUNK)), in_memory
    if near.disks == far.disks:
        pytest.skip("all folders are on one file system")
    async with house(origin) as node:
        found: dict[str, float] = {}
        for checkpoint in (near, far):
            registry = Registry(cast(Any, OneModel(model_of(checkpoint))), cast(Any, None), node.tiers, SystemClock())
            await registry.open()
            (model,) = registry.models()
            await registry.wanted(model)
            async with on_disks_of(node.tiers, near):
                found |= registry.on_disk.queues_s()
            assert registry.on_disk.queues_s() == {}
            await registry.close()
        assert found.keys() == {near.fingerprint}


async def test_loads_to_one_device_wait_for_each_other_and_those_to_another_do_not(
    origin: Path, tmp_path: Path, fake_cuda: FakeCuda
) -> None:
    fake_cuda.set("devices", 2)
    stock = read_folder(folder_of(tmp_path / "near", 3 * CHUNK))
    async with AsyncExitStack() as stack:
        one, other = (stack.enter_context(Device.open(k, driver=fake_cuda.path)) for k in range(2))
        node = await stack.enter_async_context(registered(origin, one))
        await node.tiers.loader.register(other)

        async def loaded(device: Device) -> None:
            with device.create_buffer(3 * CHUNK) as buffer:
                targets = {stock.files[0].name: DeviceTarget(buffer, 0)}
                (await node.tiers.load_to_device(stock, targets)).release()

        scope = TaskScope("test")
        async with node.tiers._local_queue.turn(9000, ways=frozenset({"device 0"})):
            waiting = scope.spawn(loaded(one), "one")
            while not node.tiers._local_queue.waiting:
                await asyncio.sleep(0)
            # What is in host memory needs no disk; what waits for device 0 keeps the disk for itself.
            (await node.tiers.loader.lease(stock)).release()
            await loaded(other)
            assert not waiting.done()
            assert node.tiers.queues().local_s["device 0"] > 0.0
        await waiting
        assert node.tiers.queues().local_s == {}
