"""Chunks on their way from the host pool to the SSD, in the order of their arrival.

Nobody waits for it but the memory that it reads from. What fails here costs the copy, not the load.
"""

from __future__ import annotations

import asyncio
from collections import deque

from sllm_actor.errors import SllmError
from sllm_actor.loader.chunk_place import ChunkPlace
from sllm_actor.loader.reservation import Reservation
from sllm_actor.loader.ssd_partial import SsdPartial
from sllm_actor.runtime.tasks import TaskScope

_SSD_WRITERS = 2


class Storing:
    """The writers of one checkpoint's copy. `run` once, and `end` it."""

    def __init__(self, partial: SsdPartial, reserved: Reservation) -> None:
        self.partial = partial
        self._reserved = reserved
        self._arrived: deque[ChunkPlace] = deque()
        self._more = asyncio.Event()
        self._complete = False
        self.failed: SllmError | None = None

    @property
    def takes_more(self) -> bool:
        """Whether it still writes what arrives."""
        return not self._complete

    def put(self, chunk: ChunkPlace) -> None:
        """Write a chunk that has arrived and been checked, while it `takes_more`."""
        self._arrived.append(chunk)
        self._more.set()

    def end(self, *, at_once: bool = False) -> None:
        """Say that no more will come; `at_once`: nor are those to be written that have not been begun with."""
        if at_once:
            while self._arrived:
                self._reserved.leave(self._arrived.popleft())
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
            chunk = self._arrived.popleft()
            try:
                with self._reserved.chunk(chunk) as data:
                    await self.partial.write(*chunk, data)
            finally:
                self._reserved.leave(chunk)
