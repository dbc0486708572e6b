"""Bring a checkpoint from its sources to the SSD alone: what is asked for before anybody wants to load it."""

from __future__ import annotations

import asyncio
import mmap
from collections import deque
from collections.abc import Callable

from sllm_actor.checkpoint.folder import Checkpoint
from sllm_actor.loader.chunk_place import ChunkPlace
from sllm_actor.loader.fetch import Read, read_and_settle
from sllm_actor.loader.ssd_partial import SsdPartial
from sllm_actor.loader.suppliers import Suppliers
from sllm_actor.runtime.tasks import TaskScope


class Pull:
    """One download, through a few chunks of its own memory. Cancelling it keeps what has been stored."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        suppliers: Suppliers,
        partial: SsdPartial,
        chunk_bytes: int,
        reads: int,
        on_arrived: Callable[[int], None],
    ) -> None:
        self._checkpoint = checkpoint
        self._suppliers = suppliers
        self._partial = partial
        self._chunk_bytes = chunk_bytes
        self._reads = reads
        self._on_arrived = on_arrived
        self._todo: deque[ChunkPlace] = deque(partial.missing())

    async def run(self) -> None:
        """Return when every chunk is stored.

        Raises:
            SourceError, SourceInvalid, CheckpointCorrupt: no source is left that gives what is missing.
            WriteFailed: the disk refused something.
        """
        scope = TaskScope("pull")
        try:
            count = min(self._reads, self._suppliers.parallel, len(self._todo))
            workers = [scope.spawn(self._work(), f"worker-{k}", on_failure=lambda _: None) for k in range(count)]
            await asyncio.gather(*workers)
        finally:
            await scope.close()

    async def _work(self) -> None:
        buffer = memoryview(mmap.mmap(-1, self._chunk_bytes))
        while self._todo:
            file, index = self._todo.popleft()
            described, at = self._checkpoint.files[file], index * self._chunk_bytes
            into = buffer[: min(self._chunk_bytes, described.size_bytes - at)]
            await self._one(file, index, into)
            self._on_arrived(len(into))

    async def _one(self, file: int, index: int, into: memoryview) -> None:
        async def settle() -> None:
            await self._partial.write(file, index, into)

        name = self._checkpoint.files[file].name
        await read_and_settle(self._suppliers, [Read(name, index * self._chunk_bytes, into)], settle)
