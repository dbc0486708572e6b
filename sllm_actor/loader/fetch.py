"""Bring a checkpoint from its sources into the host pool, and from there on to devices and to the SSD, all at once.

A chunk goes on as soon as it has arrived, whatever the others are doing; who waits for the checkpoint does not wait
for the SSD. What the SSD has of an earlier, interrupted fetch is read from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from sllm_actor.checkpoint.folder import Checkpoint
from sllm_actor.errors import (
    CheckpointCorrupt,
    CheckpointTruncated,
    Draining,
    ReadFailed,
    TargetBusy,
    WriteFailed,
)
from sllm_actor.loader.chunk_place import ChunkPlace
from sllm_actor.loader.copying import Copying
from sllm_actor.loader.lease import HostLease, LoadReport
from sllm_actor.loader.reservation import Reservation
from sllm_actor.loader.ssd_partial import SsdPartial
from sllm_actor.loader.storing import Storing
from sllm_actor.loader.suppliers import Suppliers
from sllm_actor.runtime.clock import Clock
from sllm_actor.runtime.tasks import TaskScope

log = logging.getLogger(__name__)

MAX_READS = 8

Views = Mapping[ChunkPlace, memoryview]


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
        self._todo = deque(reserved.groups())
        every = {chunk for group in self._todo for chunk in group}
        self._missing: Collection[ChunkPlace] = (
            every if partial is None else {ChunkPlace(*place) for place in partial.missing()}
        )
        self._copies: list[Copying] = []
        self._arrived: list[ChunkPlace] = []
        self._remote_bytes = 0
        self._ssd_bytes = 0

    def follow(self, copying: Copying) -> None:
        """Have what has arrived and what will arrive copied, too, unless that is not all there any more."""
        if self._reserved.open and not (self._reserved.goes_through and self._arrived):
            copying.begin(self._reserved)
            self._copies.append(copying)
            for chunk in self._arrived:
                copying.put(chunk)

    def leave(self) -> None:
        """Give nothing more to those who copy: the load has failed."""
        for copying in self._copies:
            copying.give_up()

    async def run(self) -> HostLease:
        """Return the checkpoint's lease once every chunk has been in the pool.

        Raises:
            SourceError, SourceInvalid: no source is left that gives what is missing.
            CheckpointCorrupt: none of them has what was written; the message names file and chunk.
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
            remote_bytes=self._remote_bytes,
            ssd_bytes=self._ssd_bytes,
            total_bytes=self._checkpoint.size_bytes,
            duration_s=self._clock.monotonic_s() - begun_s,
        )
        return self._reserved.commit(report)

    async def _read(self) -> None:
        while self._todo:
            group = self._todo.popleft()
            await self._reserved.take(group)
            with contextlib.ExitStack() as stack:
                into = {chunk: stack.enter_context(self._reserved.chunk(chunk)) for chunk in group}
                fresh = await self._bring(group, into)
                sizes_bytes = {chunk: len(view) for chunk, view in into.items()}
            for chunk, size_bytes in sizes_bytes.items():
                self._go_on(chunk, size_bytes, is_fresh=chunk in fresh)

    async def _bring(
        self, group: Sequence[ChunkPlace], into: Mapping[ChunkPlace, memoryview]
    ) -> Collection[ChunkPlace]:
        """Fill a group of chunks; return those that did not come from the SSD."""
        kept = [chunk for chunk in group if chunk not in self._missing and await self._from_ssd(chunk, into[chunk])]
        fresh = [chunk for chunk in group if chunk not in kept]
        if kept:
            for chunk in fresh:
                await self._suppliers.read(*self._read_of(chunk, into))
            try:
                await self._reserved.settle(group)
            except CheckpointCorrupt as wrong:
                log.warning("fetched again: %s", wrong.message)
            else:
                return fresh
            for chunk in kept:
                await self._discard(chunk)
        reads = [self._read_of(chunk, into) for chunk in group]
        await read_and_settle(self._suppliers, reads, lambda: self._reserved.settle(group))
        return group

    def _read_of(self, chunk: ChunkPlace, into: Views) -> Read:
        name = self._checkpoint.files[chunk.file].name
        return Read(name, chunk.chunk * self._reserved.chunk_bytes, into[chunk])

    async def _from_ssd(self, chunk: ChunkPlace, into: memoryview) -> bool:
        """Read what an earlier fetch has stored; false where that is of no use any more."""
        assert self.storing is not None, "what is not missing has been stored"
        try:
            await self.storing.partial.read(*chunk, into)
        except (CheckpointCorrupt, CheckpointTruncated, ReadFailed, WriteFailed, TargetBusy) as wrong:
            log.warning("%s is fetched again: %s", self._checkpoint.files[chunk.file].name, wrong.message)
        else:
            return True
        await self._discard(chunk)
        return False

    async def _discard(self, chunk: ChunkPlace) -> None:
        assert self.storing is not None, "what is not missing has been stored"
        # A disk that fails costs the copy, not the load.
        with contextlib.suppress(WriteFailed, TargetBusy, Draining):
            await self.storing.partial.discard(*chunk)

    def _go_on(self, chunk: ChunkPlace, size_bytes: int, *, is_fresh: bool) -> None:
        """Give a chunk that has arrived to all who take it further."""
        stores = is_fresh and self.storing is not None and self.storing.takes_more
        copies = [copying for copying in self._copies if copying.takes_more]
        self._reserved.share(chunk, stores + len(copies))
        self._arrived.append(chunk)
        if stores and self.storing is not None:
            self.storing.put(chunk)
        for copying in copies:
            copying.put(chunk)
        self._remote_bytes += size_bytes if is_fresh else 0
        self._ssd_bytes += 0 if is_fresh else size_bytes
        self._on_arrived(size_bytes)


class Read(NamedTuple):
    """Bytes of a file, by its name, and the memory that they go to."""

    name: str
    offset: int
    into: memoryview


async def read_and_settle(suppliers: Suppliers, reads: Sequence[Read], settle: Callable[[], Awaitable[None]]) -> None:
    """Read these until `settle` finds them to be what was written.

    Raises:
        SourceError, SourceInvalid, CheckpointCorrupt: no source is left; this is what came of the last one.
    """
    mixed = True
    while True:
        given = [await suppliers.read(*read, mixed=mixed) for read in reads]
        try:
            await settle()
        except CheckpointCorrupt as wrong:
            if mixed and any(len(givers) > 1 for givers in given):
                log.warning("fetched again, from one source alone: %s", wrong.message)
                mixed = False  # It could not be told which of them was wrong.
                continue
            for supplier in dict.fromkeys(itertools.chain.from_iterable(given)):
                log.warning("%s sent something else: %s", supplier.source.url, wrong.message)
                suppliers.blame(supplier, wrong)
        else:
            return
