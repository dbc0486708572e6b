"""Room in the host pool that whoever reserved it fills, chunk by chunk, in any order and from anywhere.

The loader reads files by itself; what comes through a network is read by others, into chunks that are reserved here.
Each is then checked and copied on to devices by the byte mover, as one that it has read.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Callable

from sllm_actor.checkpoint.digests import DIGEST_BYTES
from sllm_actor.errors import CheckpointCorrupt, Draining
from sllm_actor.loader.lease import HostLease, LoadReport
from sllm_actor.loader.loads import Grant, Loads
from sllm_actor.loader.mapping import HostFile
from sllm_actor.loader.mover import FilePlan, LoadPlan, LoadStatus
from sllm_actor.loader.order import Order

Commit = Callable[[LoadReport], HostLease]


class PoolMemory:
    """The pool's memory in this process, mapped when it is first asked for."""

    def __init__(self, pool_fd: int, chunk_bytes: int) -> None:
        self._pool_fd = pool_fd
        self._chunk_bytes = chunk_bytes
        self._mapped: asyncio.Future[mmap.mmap] | None = None
        self._closed = False

    async def open(self) -> memoryview:
        """Map it, off the loop: its pages are there already, and a page table for them takes a while.

        Raises:
            Draining: the loader is closing.
        """
        if self._closed:
            raise Draining("the loader is closing")
        if self._mapped is None:
            self._mapped = asyncio.get_running_loop().run_in_executor(None, self._map)
        return memoryview(await asyncio.shield(self._mapped))

    def _map(self) -> mmap.mmap:
        return mmap.mmap(self._pool_fd, os.fstat(self._pool_fd).st_size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)

    async def close(self) -> None:
        """Give the mapping up; views of it that are still held keep it."""
        self._closed = True
        mapped, self._mapped = self._mapped, None
        if mapped is not None:
            try:
                (await mapped).close()
            except BufferError:
                return


class Reservation:
    """Chunks for every file of a checkpoint, empty at first. Ends with `commit` or `abandon`, once."""

    def __init__(
        self,
        order: Order,
        files: tuple[HostFile, ...],
        memory: memoryview,
        chunk_bytes: int,
        loads: Loads,
        commit: Commit,
        give_back: Callable[[], None],
    ) -> None:
        self.files = files
        self.chunk_bytes = chunk_bytes
        self._checkpoint = order.checkpoint
        self._memory = memory
        self._loads = loads
        self._targets = order.targets
        self._commit = commit
        self._give_back = give_back
        self._under_way = 0
        self._ended = False

    def chunk(self, file: int, index: int) -> memoryview:
        """Give the memory of chunk `index` of the file of number `file`: as many bytes as the file has there.

        After `commit` it is the lease that keeps them there, and they are only read.
        """
        begin = self.files[file].chunks[index] * self.chunk_bytes
        return self._memory[begin : begin + self._length(file, index)]

    def _length(self, file: int, index: int) -> int:
        return min(self.chunk_bytes, self.files[file].size_bytes - index * self.chunk_bytes)

    async def settle(self, file: int, index: int) -> int:
        """Compare a chunk that has been filled with its digests and copy it on; return the bytes that were copied.

        Raises:
            CheckpointCorrupt: it is not what it should be; it can be filled again. The message names file and chunk.
            DeviceError: the copy failed.
        """
        described = self._checkpoint.files[file]
        target = self._targets.get(described.name)
        digests = self._digests(file, index)
        if target is None and not digests:
            return 0
        at = index * self.chunk_bytes
        plan = LoadPlan(
            files=(
                FilePlan(
                    path=str(self._checkpoint.path / described.name),
                    size_bytes=self._length(file, index),
                    mtime_ns=0,
                    inode=0,
                    chunks=(self.files[file].chunks[index],),
                    digests=digests,
                    target=None if target is None else target.buffer.target,
                    target_offset=0 if target is None else target.offset + at,
                ),
            ),
            resident=True,
            digest_bytes=self._checkpoint.digest_bytes if digests else 0,
        )
        self._under_way += 1
        load = self._loads.begin(lambda: plan, files=(), chunks=0, whole=self._settled, undo=self._unsettled)
        try:
            lease = await self._loads.wait(load, None)
        except CheckpointCorrupt:
            raise CheckpointCorrupt(
                f"{described.name} of {self._checkpoint.path}: chunk {index}, of {plan.files[0].size_bytes} bytes from "
                f"byte {at} on, is not what was written"
            ) from None
        return lease.report.device_bytes

    def _digests(self, file: int, index: int) -> bytes:
        digests, digest_bytes = self._checkpoint.files[file].digests, self._checkpoint.digest_bytes
        if not digests:
            return b""
        per_chunk = self.chunk_bytes // digest_bytes * DIGEST_BYTES
        return digests[index * per_chunk : (index + 1) * per_chunk]

    def _settled(self, status: LoadStatus) -> Grant:
        self._end_one()
        return lambda: HostLease((), LoadReport(device_bytes=status.device_bytes), lambda: None)

    def _unsettled(self, _: LoadStatus | None) -> None:
        self._end_one()

    def _end_one(self) -> None:
        self._under_way -= 1
        self._leave_if_quiet()

    def commit(self, report: LoadReport) -> HostLease:
        """Say that every chunk is filled and right: the checkpoint is in the pool, and leased."""
        assert not self._ended and not self._under_way, "chunks are still being settled"
        self._ended = True
        return self._commit(report)

    def forget(self) -> None:
        """Look at the memory no more: after `commit`, when nobody reads the chunks from here."""
        self._memory.release()

    def abandon(self) -> None:
        """Give the chunks back, as soon as no thread looks at them any more."""
        if not self._ended:
            self._ended = True
            self._leave_if_quiet()

    def _leave_if_quiet(self) -> None:
        if self._ended and not self._under_way:
            # An error that somebody keeps would keep the pool mapped.
            self._memory.release()
            self._give_back()
