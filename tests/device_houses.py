"""A node's tiers over one source beside a device of the fake driver; and loads to that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda
from houses import House, house
from loaders import CHUNK, until
from test_device_loads import on_device, targets_in

from sllm_actor.loader.device import Device, DeviceBuffer
from sllm_actor.loader.lease import HostLease
from sllm_actor.sources.source import SourceFile


class Held:
    """A source that gives what comes before byte `after` of a file, until it is told to give more."""

    def __init__(self, node: House, after: int) -> None:
        self._after = after
        self._moved = asyncio.Event()
        node.source.before = self._wait

    def give(self, after: int = 2**60) -> None:
        self._after = after
        self._moved.set()
        self._moved = asyncio.Event()

    async def _wait(self, file: SourceFile, at: int, into: memoryview) -> None:
        while at >= self._after:
            await self._moved.wait()


@asynccontextmanager
async def registered(origin: Path, device: Device, **options: Any) -> AsyncIterator[House]:
    async with house(origin, **options) as node:
        await node.tiers.loader.register(device)
        yield node


@pytest.fixture
def buffer(device: Device) -> Iterator[DeviceBuffer]:
    """Room on the device for `origin` and for `stock`."""
    with device.create_buffer(20 * CHUNK) as made:
        yield made


async def loading(node: House, buffer: DeviceBuffer, **options: Any) -> HostLease:
    return await node.tiers.load_to_device(node.card, targets_in(buffer, node.card.checkpoint), **options)


def is_there(node: House, buffer: DeviceBuffer) -> bool:
    return on_device(node.card.checkpoint, targets_in(buffer, node.card.checkpoint)) == node.expected()


async def copied(fake: FakeCuda, chunks: int, counter: str = "copies_enqueued") -> None:
    await asyncio.to_thread(fake.wait, counter, chunks)


async def given_back(node: House) -> None:
    """Wait until nobody has anything of the pool; the SSD may still be reading what it has."""
    loader = node.tiers.loader
    await until(lambda: not node.tiers._remote.copies())
    await until(lambda: all(resident.leases == 0 for resident in loader.residents()))
    chunks = sum(-(-file.size_bytes // CHUNK) for file in node.card.checkpoint.files)
    await until(lambda: loader.free_bytes == loader.pool_bytes - chunks * CHUNK * len(loader.residents()))


def stored_bytes(node: House) -> int:
    return sum(entry.done_bytes for entry in node.tiers.ssd.entries())
