"""Room in the host pool that whoever reserved it fills, chunk by chunk, in any order and from anywhere.

The loader reads files by itself; what comes through a network is read by others, into chunks that are reserved here.
Each is then checked, and copied on to devices, by the byte mover, as one that it has read.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Callable, Iterator, Sequence

from sllm_actor.checkpoint.digests import DIGEST_BYTES, ChunkDigests, chunk_count
from sllm_actor.errors import CheckpointCorrupt, Draining
from sllm_actor.loader.chunk_place import ChunkPlace
from sllm_actor.loader.holder import COPY, LOAD
from sllm_actor.loader.lease import DeviceTarget, HostLease, LoadReport
from sllm_actor.loader.loads import Grant, Loads
from sllm_actor.loader.mapping import HostFile
from sllm_actor.loader.mover import FilePlan, LoadPlan, LoadStatus
from sllm_actor.loader.order import Order
from sllm_actor.loader.window import Window
from sllm_actor.runtime.threads import on_thread

Commit = Callable[[LoadReport], Callable[[str], HostLease]]
"""Note that the checkpoint is in the pool; what it returns leases it for somebody."""


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
    """Room for a checkpoint, empty at first: a chunk for each of its own, or a window that all of them go through.

    Ends with `commit` or `abandon`, once. Who reads the chunks after `commit` says so by `use` and `forget`; who made
    the reservation is the first of them.
    """

    def __init__(
        self,
        order: Order,
        room: tuple[HostFile, ...] | Window,
        memory: memoryview,
        chunk_bytes: int,
        loads: Loads,
        commit: Commit,
        give_back: Callable[[], None],
    ) -> None:
        self.chunk_bytes = chunk_bytes
        self._room = room
        self._checkpoint = order.checkpoint
        self._memory = memory
        self._loads = loads
        self._commit = commit
        self._give_back = give_back
        self._users = 1
        self._under_way = 0
        self._ended = False

    @property
    def goes_through(self) -> bool:
        """Whether the checkpoint only goes through: nothing of it is in the pool at the end."""
        return isinstance(self._room, Window)

    @property
    def open(self) -> bool:
        """Whether it is neither committed nor abandoned."""
        return not self._ended

    def groups(self) -> Iterator[tuple[ChunkPlace, ...]]:
        """Give all chunks, together those that one digest covers: they are filled and settled together."""
        span = max(1, self._checkpoint.digest_bytes // self.chunk_bytes)
        for number, file in enumerate(self._checkpoint.files):
            count = chunk_count(file.size_bytes, self.chunk_bytes)
            for first in range(0, count, span):
                yield tuple(ChunkPlace(number, index) for index in range(first, min(first + span, count)))

    async def take(self, group: Sequence[ChunkPlace]) -> None:
        """Wait for room for a group of chunks: of a window, they have it until all those who share them have left."""
        if isinstance(self._room, Window):
            await self._room.take(group)

    def share(self, chunk: ChunkPlace, users: int) -> None:
        """Say how many need a settled chunk, each until it calls `leave`."""
        if isinstance(self._room, Window):
            self._room.share(chunk, users)

    def leave(self, chunk: ChunkPlace) -> None:
        """Say that one who needed a chunk is done with it."""
        if isinstance(self._room, Window):
            self._room.leave(chunk)

    def chunk(self, chunk: ChunkPlace) -> memoryview:
        """Give a chunk's memory: as many bytes as its file has there.

        After `commit` it is only read.
        """
        begin = self._slot(chunk) * self.chunk_bytes
        return self._memory[begin : begin + self._length(chunk)]

    def _slot(self, chunk: ChunkPlace) -> int:
        if isinstance(self._room, Window):
            return self._room.slot(chunk)
        return self._room[chunk.file].chunks[chunk.chunk]

    def _length(self, chunk: ChunkPlace) -> int:
        return min(self.chunk_bytes, self._checkpoint.files[chunk.file].size_bytes - chunk.chunk * self.chunk_bytes)

    async def settle(self, group: Sequence[ChunkPlace]) -> None:
        """Compare a group of chunks that have been filled with their digests, where there are any.

        Raises:
            CheckpointCorrupt: they are not what they should be, and can be filled again; the message names file and
                chunks.
        """
        digests = self._digests(group)
        if not digests:
            return
        if len(group) > 1 or self._checkpoint.digest_bytes > self.chunk_bytes:
            right = await on_thread(self._has_digest, group, digests)
        else:
            right = await self._check(group[0], digests)
        if not right:
            first, at = group[0], group[0].chunk * self.chunk_bytes
            chunks = f"chunk {first.chunk}" if len(group) == 1 else f"chunks {first.chunk} to {group[-1].chunk}"
            raise CheckpointCorrupt(
                f"{self._checkpoint.files[first.file].name} of {self._checkpoint.path}: {chunks}, of "
                f"{sum(map(self._length, group))} bytes from byte {at} on, is not what was written"
            )

    async def _check(self, chunk: ChunkPlace, digests: bytes) -> bool:
        try:
            await self._move(chunk, digests=digests)
        except CheckpointCorrupt:
            return False
        return True

    def _has_digest(self, group: Sequence[ChunkPlace], expected: bytes) -> bool:
        found = ChunkDigests(self._checkpoint.digest_bytes)
        for chunk in group:
            with self.chunk(chunk) as data:
                found.update(data)
        return b"".join(found.finish()) == expected

    def _digests(self, group: Sequence[ChunkPlace]) -> bytes:
        digests, digest_bytes = self._checkpoint.files[group[0].file].digests, self._checkpoint.digest_bytes
        if not digests:
            return b""
        begin = group[0].chunk * self.chunk_bytes // digest_bytes
        end = chunk_count((group[-1].chunk + 1) * self.chunk_bytes, digest_bytes)
        return digests[begin * DIGEST_BYTES : end * DIGEST_BYTES]

    async def copy(self, chunk: ChunkPlace, target: DeviceTarget, priority: int) -> int:
        """Copy a settled chunk to where its file goes, and `leave` it; return how many bytes that were.

        Raises:
            DeviceError: the copy failed.
            ConfigInvalid: the byte mover has no devices.
        """
        return (await self._move(chunk, target=target, priority=priority)).report.device_bytes

    async def _move(
        self, chunk: ChunkPlace, *, digests: bytes = b"", target: DeviceTarget | None = None, priority: int = 0
    ) -> HostLease:
        """Have the mover look at one chunk. Until it has ended, however that is, the chunk stays where it is."""
        described = self._checkpoint.files[chunk.file]

        def plan() -> LoadPlan:
            file = FilePlan(
                path=str(self._checkpoint.path / described.name),
                size_bytes=self._length(chunk),
                mtime_ns=0,
                inode=0,
                chunks=(self._slot(chunk),),
                digests=digests,
                target=None if target is None else target.buffer.target,
                target_offset=0 if target is None else target.offset + chunk.chunk * self.chunk_bytes,
            )
            digest_bytes = self._checkpoint.digest_bytes if digests else 0
            return LoadPlan((file,), priority, resident=True, digest_bytes=digest_bytes)

        def ended(_: LoadStatus | None) -> None:
            if target is not None:
                self.leave(chunk)
            self._under_way -= 1
            self._leave_if_quiet()

        def whole(status: LoadStatus) -> Grant:
            ended(status)
            return lambda: HostLease((), LoadReport(device_bytes=status.device_bytes), lambda: None)

        self._under_way += 1
        try:
            await self._loads.until_few()
        except BaseException:
            ended(None)
            raise
        return await self._loads.wait(self._loads.begin(plan, files=(), chunks=0, whole=whole, undo=ended), None)

    def commit(self, report: LoadReport) -> HostLease:
        """Say that every chunk was filled and right: the checkpoint is in the pool, if it has room, and leased."""
        assert not self._ended, "it ends once"
        self._ended = True
        grant = self._commit(report)
        if not self.goes_through:
            self._give_back = grant(COPY).release
        return grant(LOAD)

    def use(self) -> None:
        """Be one more of those for whom the chunks are kept after `commit`."""
        self._users += 1

    def forget(self) -> None:
        """Be no more of those for whom the chunks are kept."""
        self._users -= 1
        self._leave_if_quiet()

    def abandon(self) -> None:
        """Give the chunks back, as soon as no thread looks at them any more, whoever uses them."""
        if not self._ended:
            self._ended = True
            self._users = 0
            self._leave_if_quiet()

    def _leave_if_quiet(self) -> None:
        if self._ended and self._users <= 0 and not self._under_way:
            # An error that somebody keeps would keep the pool mapped.
            self._memory.release()
            give_back, self._give_back = self._give_back, _nothing
            give_back()


def _nothing() -> None:
    pass
