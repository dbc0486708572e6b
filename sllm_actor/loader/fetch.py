"""Bring a checkpoint from its sources into the host pool, and from there on to devices and to the SSD, all at once.

A chunk goes on as soon as it has arrived, whatever the others are doing; who waits for the checkpoint does not wait
for the SSD. What the SSD has of an earlier, interrupted fetch is read from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable

from sllm_actor.checkpoint.folder import Checkpoint
from sllm_actor.errors import (
    CheckpointCorrupt,
    CheckpointTruncated,
    Draining,
    ReadFailed,
    SllmError,
    TargetBusy,
    WriteFailed,
)
from sllm_actor.loader.lease import HostLease, LoadReport
from sllm_actor.loader.reservation import Reservation
from sllm_actor.loader.ssd_partial import SsdPartial
from sllm_actor.loader.suppliers import Suppliers
from sllm_actor.runtime.clock import Clock
from sllm_actor.runtime.tasks import TaskScope

log = logging.getLogger(__name__)

MAX_READS = 8
_SSD_WRITERS = 2

Chunk = tuple[int, int]
"""The number of a file of the checkpoint, and that of a chunk in it."""


class Storing:
    """Chunks on their way from the pool to the SSD, in the order of their arrival.

    Nobody waits for it but the memory that it reads from. What fails here costs the copy, not the load.
    """

    def __init__(self, partial: SsdPartial, reserved: Reservation) -> None:
        self.partial = partial
        self._reserved = reserved
        self._arrived: deque[Chunk] = deque()
        self._more = asyncio.Event()
        self._complete = False
        self.failed: SllmError | None = None

    def put(self, chunk: Chunk) -> None:
        """Write a chunk that has arrived and been checked."""
        if self.failed is None:
            self._arrived.append(chunk)
            self._more.set()

    def end(self, *, at_once: bool = False) -> None:
        """Say that no more will come; `at_once`: nor are those to be written that have not been begun with."""
        if at_once:
            self._arrived.clear()
        self._complete = True
        self._more.set()

    async def run(self) -> None:
        """Write until the end, or until the disk has refused something. Not to be cancelled: `end` it."""
        scope = TaskScope("ssd-writers")
        writers = [scope.spawn(self._write(), f"writer-{k}") for k in range(_SSD_WRITERS)]
        await asyncio.gather(*writers)
        await scope.close()

    async def _write(self) -> None:
        try:
            await self._write_all()
        except SllmError as wrong:
            self.failed = self.failed or wrong
            self.end(at_once=True)

    async def _write_all(self) -> None:
        while True:
            while not self._arrived:
                if self._complete:
                    return
                self._more.clear()
                await self._more.wait()
            file, index = self._arrived.popleft()
            with self._reserved.chunk(file, index) as data:
                await self.partial.write(file, index, data)


class Fetch:
    """One checkpoint on its way. `run` once; whoever cancels it keeps what has been stored."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        reserved: Reservation,
        suppliers: Suppliers,
        partial: SsdPartial | None,
        clock: Clock,
        on_arrived: Callable[[int], None],
    ) -> None:
        self._checkpoint = checkpoint
        self._reserved = reserved
        self._suppliers = suppliers
        self._clock = clock
        self._on_arrived = on_arrived
        self.storing = Storing(partial, reserved) if partial is not None else None
        self._missing = set(partial.missing()) if partial is not None else set(self._chunks())
        self._todo = deque(self._chunks())
        self.remote_bytes = 0
        self.ssd_bytes = 0
        self.device_bytes = 0

    def _chunks(self) -> list[Chunk]:
        return [
            (file, index) for file, placed in enumerate(self._reserved.files) for index in range(len(placed.chunks))
        ]

    async def run(self) -> HostLease:
        """Return the checkpoint's lease once every chunk is in the pool, and where it has targets, on its device.

        Raises:
            SourceError, SourceInvalid: no source is left that gives what is missing.
            CheckpointCorrupt: none of them has what was written; the message names file and chunk.
            DeviceError: a copy failed.
        """
        begun_s = self._clock.monotonic_s()
        scope = TaskScope("fetch")
        try:
            count = max(1, min(MAX_READS, self._suppliers.parallel, len(self._todo)))
            readers = [scope.spawn(self._read(), f"reader-{k}", on_failure=lambda _: None) for k in range(count)]
            await asyncio.gather(*readers)
        except BaseException:
            await scope.close()
            raise
        await scope.close()
        report = LoadReport(
            remote_bytes=self.remote_bytes,
            ssd_bytes=self.ssd_bytes,
            total_bytes=self._checkpoint.size_bytes,
            duration_s=self._clock.monotonic_s() - begun_s,
            device_bytes=self.device_bytes,
        )
        return self._reserved.commit(report)

    async def _read(self) -> None:
        while self._todo:
            file, index = self._todo.popleft()
            with self._reserved.chunk(file, index) as into:
                if (file, index) in self._missing or not await self._from_ssd(file, index, into):
                    await self._from_sources(file, index, into)
                    self.remote_bytes += len(into)
                else:
                    self.ssd_bytes += len(into)
                self._on_arrived(len(into))

    async def _from_ssd(self, file: int, index: int, into: memoryview) -> bool:
        """Read what an earlier fetch has stored; false where that is of no use any more."""
        assert self.storing is not None, "what is not missing has been stored"
        partial = self.storing.partial
        try:
            await partial.read(file, index, into)
            self.device_bytes += await self._reserved.settle(file, index)
            return True
        except (CheckpointCorrupt, CheckpointTruncated, ReadFailed, WriteFailed, TargetBusy) as wrong:
            log.warning("%s is fetched again: %s", self._checkpoint.files[file].name, wrong.message)
        # A disk that fails costs the copy, not the load.
        with contextlib.suppress(WriteFailed, TargetBusy, Draining):
            await partial.discard(file, index)
        return False

    async def _from_sources(self, file: int, index: int, into: memoryview) -> None:
        async def settle() -> None:
            self.device_bytes += await self._reserved.settle(file, index)

        name = self._checkpoint.files[file].name
        await read_and_settle(self._suppliers, name, index * self._reserved.chunk_bytes, into, settle)
        if self.storing is not None:
            self.storing.put((file, index))


async def read_and_settle(
    suppliers: Suppliers, name: str, offset: int, into: memoryview, settle: Callable[[], Awaitable[None]]
) -> None:
    """Read a chunk until `settle` finds it to be what was written.

    Raises:
        SourceError, SourceInvalid, CheckpointCorrupt: no source is left; this is what came of the last one.
    """
    while True:
        supplier = await suppliers.read(name, offset, into)
        try:
            await settle()
        except CheckpointCorrupt as wrong:
            log.warning("%s sent something else: %s", supplier.source.url, wrong.message)
            suppliers.blame(supplier, wrong)
        else:
            return
