"""Bring checkpoints into the host pool, and on to devices, and lease them from there.

Decides what is loaded where and what makes room. Knows nothing of engines, models or requests, and never touches
a byte: a byte mover does. Tiers and pooled chunks: ServerlessLLM (OSDI '24).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Self

import msgspec

from sllm_actor.checkpoint.folder import Checkpoint
from sllm_actor.errors import ConfigInvalid, Draining, InvalidInput, ModelNotFound
from sllm_actor.loader.choice import use_native
from sllm_actor.loader.device import Device
from sllm_actor.loader.filling import Filling
from sllm_actor.loader.holder import LOAD
from sllm_actor.loader.host_memory import Held, HostMemory
from sllm_actor.loader.lease import DeviceTarget, HostLease, LoadReport, Resident
from sllm_actor.loader.loads import Loads, OnProgress, OnReading
from sllm_actor.loader.mover import ByteMover, MoverOptions, Paths, SlabFacts
from sllm_actor.loader.native import NativeMover
from sllm_actor.loader.order import OnPlaced, Order, bytes_in_page_cache, check_targets, files_in_place, key_of
from sllm_actor.loader.pool import HostPool
from sllm_actor.loader.portable import PortableMover
from sllm_actor.loader.reservation import PoolMemory, Reservation
from sllm_actor.loader.sizes import check_sizes
from sllm_actor.runtime.clock import Clock
from sllm_actor.units import MIB

_MAX_PRIORITY = 2**31 - 1
# What a model that is larger than the pool goes through: enough for every reading thread, and for the device.
_WINDOW_CHUNKS_PER_THREAD = 3
# What is believed before the first load has told; and how much of the disk's bandwidth page faults get.
_FIRST_SSD_BYTES_PER_S = 1e9
_FIRST_COPY_BYTES_PER_S = 5e9
_FAULTED_SHARE = 0.3


class Loader:
    """Leases checkpoints out of one host pool. Belongs to the event loop that opened it.

    Concurrent leases of one checkpoint are one load. What nobody leases stays until its room is needed; the
    least recently used goes first.
    """

    def __init__(
        self,
        mover: ByteMover,
        pool: HostPool,
        threads: int,
        max_loads: int,
        clock: Clock,
        on_reading: OnReading | None,
    ) -> None:
        self._mover = mover
        self._pool = pool
        self._memory = HostMemory(pool, clock)
        self._loads = Loads(mover, max_loads, on_reading)
        self._pool_memory = PoolMemory(mover.pool_fd, pool.chunk_bytes)
        self._paths_at_close: Paths | None = None
        self._filling = Filling(pool, self._memory, self._loads, _WINDOW_CHUNKS_PER_THREAD * threads)
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(
        cls,
        *,
        pool_bytes: int,
        clock: Clock,
        chunk_bytes: int = 16 * MIB,
        reading_threads: int = 4,
        max_loads: int = 64,
        lock: bool = False,
        huge_pages: bool = True,
        io_uring: bool = True,
        on_reading: OnReading | None = None,
    ) -> Self:
        """Make the pool and its threads, off the loop: faulting in the memory takes about 1 s for some GB.

        Raises:
            ConfigInvalid: a size is out of bounds, the memory can't be had, or the native library is missing.
        """
        check_sizes(pool_bytes, chunk_bytes, reading_threads, max_loads, huge_pages)
        chunks = pool_bytes // chunk_bytes
        options = MoverOptions(chunk_bytes, chunks, reading_threads, max_loads, lock, huge_pages, io_uring)
        native = use_native()
        loop = asyncio.get_running_loop()
        made: asyncio.Future[ByteMover] = loop.run_in_executor(
            None, lambda: NativeMover(options) if native else PortableMover(options, clock)
        )
        try:
            mover = await asyncio.shield(made)
        except asyncio.CancelledError:
            made.add_done_callback(_close_late)
            raise
        return cls(mover, HostPool(chunk_bytes, chunks), reading_threads, max_loads, clock, on_reading)

    @property
    def pool_fd(self) -> int:
        """The memfd that engines map; hand it over as a duplicate (fork, SCM_RIGHTS), never close it."""
        assert not self._loads.closing, "the loader is closed"
        return self._mover.pool_fd

    @property
    def chunk_bytes(self) -> int:
        """Size of every chunk of the pool."""
        return self._pool.chunk_bytes

    @property
    def pool_bytes(self) -> int:
        """Size of the whole pool."""
        return self._pool.chunks * self._pool.chunk_bytes

    @property
    def free_bytes(self) -> int:
        """Pool memory that holds nothing; what could be evicted is not counted."""
        return self._pool.free_chunks * self._pool.chunk_bytes

    def facts(self) -> SlabFacts:
        """Tell what the machine gave: native or portable, locked or not, how much in huge pages."""
        return self._mover.facts

    async def register(self, device: Device) -> None:
        """Page-lock the pool for a device's copies, until the loader or the device is closed.

        Raises:
            DeviceFailed, ConfigInvalid: the driver can't; copies work all the same, only slower.
        """
        self._check_open()
        await self._loop.run_in_executor(None, self._mover.register, device)

    def paths(self) -> Paths:
        """Tell what has gone which way so far, and at what bandwidth."""
        return self._paths_at_close or self._mover.paths()

    def residents(self) -> list[Resident]:
        """List the checkpoints that are whole in the pool, the least recently used first."""
        return self._memory.residents()

    def fingerprints(self) -> list[tuple[str, bool]]:
        """List these by their fingerprints, and whether each is pinned, in the same order."""
        return self._memory.fingerprints()

    def observe(self) -> dict[str, object]:
        """Show the pool, what is in it, and the bandwidth of each path, for people."""
        ways = msgspec.structs.asdict(self.paths())
        return {
            "pool": {"size_bytes": self.pool_bytes, "free_bytes": self.free_bytes, "facts": self.facts()},
            "residents": self.residents(),
            "paths": {
                name: {"size_bytes": way.size_bytes, "busy_s": way.busy_s, "bytes_per_s": way.bytes_per_s}
                for name, way in ways.items()
            },
        }

    async def lease(
        self,
        checkpoint: Checkpoint,
        *,
        priority: int = 0,
        verify: bool = False,
        in_place: bool = False,
        on_placed: OnPlaced | None = None,
        on_progress: OnProgress | None = None,
    ) -> HostLease:
        """Bring every file of `checkpoint` into the pool, if it is not there, and hold it until release.

        Tensors lie at their offsets from the beginning of their file; each file begins on a chunk of its own.
        Loads of a higher `priority` go first. With `verify`, digests are compared where the checkpoint has them.
        With `in_place`, files that the page cache holds are to be mapped as they lie there, where that is sooner:
        they take no room in the pool. Cancelling the last of those who wait for a load cancels the load.

        Raises:
            ModelTooLarge: larger than the whole pool.
            NoCapacity: the room is leased or being loaded into, or too many loads run.
            CheckpointChanged: the files are no longer those that were described.
            CheckpointCorrupt: their bytes are not those that were written.
            ReadFailed: a file can't be read.
            Draining: the loader is closing.
        """
        order = Order(checkpoint, {}, priority, verify, on_placed, on_progress)
        self._check(order)
        known = self._filling.knows(order)
        if in_place and not verify and not known and await self._is_better_in_place(checkpoint):
            self._check_open()
            files = files_in_place(checkpoint)
            order.placed(files)
            report = LoadReport(in_place_bytes=checkpoint.size_bytes, total_bytes=checkpoint.size_bytes)
            return HostLease(files, report, lambda: None)
        return await self._filling.obtain(order)

    async def load_to_device(
        self,
        checkpoint: Checkpoint,
        targets: Mapping[str, DeviceTarget],
        *,
        priority: int = 0,
        verify: bool = False,
        on_progress: OnProgress | None = None,
    ) -> HostLease:
        """Bring files of `checkpoint`, by name, into device memory: through the host pool, and to stay there, too.

        A chunk goes up as soon as it has arrived. Where the pool has no room for the whole checkpoint, its bytes
        only go through: the lease then has no files. While it loads, and when it fails, the targets hold anything.

        Raises:
            InvalidInput: a target names no file of the checkpoint, or has no room for it.
            DeviceError: the device has no room, or refused or lost a copy.
            NoCapacity, CheckpointChanged, CheckpointCorrupt, ReadFailed, Draining: as `lease` does.
        """
        check_targets(checkpoint, targets)
        order = Order(checkpoint, targets, priority, verify, None, on_progress)
        self._check(order)
        return await self._filling.obtain(order)

    async def memory(self) -> memoryview:
        """Give the whole pool as this process sees it; what is leased may be read there.

        Raises:
            Draining: the loader is closing.
        """
        return await self._pool_memory.open()

    def holds(self, checkpoint: Checkpoint) -> bool:
        """Tell whether a checkpoint is whole in the pool."""
        return self._memory.find(key_of(checkpoint)) is not None

    def resident(self, checkpoint: Checkpoint) -> Resident | None:
        """Describe a checkpoint that is whole in the pool; None where it is not."""
        held = self._memory.find(key_of(checkpoint))
        return None if held is None else held.describe()

    def pin(self, checkpoint: Checkpoint, pinned: bool = True) -> None:
        """Keep a checkpoint in the pool until it is unpinned, or the loader closed; or let it go again.

        Raises:
            ModelNotFound: it is not whole in the pool.
        """
        self._held(checkpoint).pinned = pinned

    def evict(self, checkpoint: Checkpoint) -> None:
        """Free the chunks of a checkpoint.

        Raises:
            ModelNotFound: it is not whole in the pool.
            Conflict: it is leased or pinned.
        """
        self._memory.evict(self._held(checkpoint))

    def forget(self, checkpoint: Checkpoint) -> None:
        """Grant a checkpoint to nobody any more, because its bytes are wrong; who has it leased keeps it."""
        held = self._memory.find(key_of(checkpoint))
        if held is not None:
            self._memory.forget(held)

    def _held(self, checkpoint: Checkpoint) -> Held:
        held = self._memory.find(key_of(checkpoint))
        if held is None:
            raise ModelNotFound(f"{checkpoint.path} is not in the host pool")
        return held

    def lease_resident(self, checkpoint: Checkpoint, who: str = LOAD) -> HostLease | None:
        """Lease a checkpoint, for `who`, if it is whole in the pool; None where it is not."""
        held = self._memory.find(key_of(checkpoint))
        if held is None or self._loads.closing:
            return None
        return self._memory.grant(held, LoadReport(pool_bytes=held.size_bytes, total_bytes=held.size_bytes), who)

    def check_fits(self, checkpoint: Checkpoint) -> None:
        """See that the pool is large enough for a checkpoint, whatever is in it now.

        Raises:
            ModelTooLarge: it is not; the message has both sizes.
        """
        self._filling.check_fits(Order(checkpoint, {}, 0, False, None, None))

    async def reserve(
        self, checkpoint: Checkpoint, *, on_placed: OnPlaced | None = None, window_chunks: int = 0
    ) -> Reservation:
        """Take room for every file of `checkpoint`, which the caller fills; it must not be in the pool already.

        Where there is no room for the whole, and `window_chunks` is not 0, it only goes through about so many.

        Raises:
            ModelTooLarge, NoCapacity, Draining: as `lease` does; through a window, no model is too large.
            AlreadyThere: it is in the pool.
            ConfigInvalid: its digests can't be compared in chunks of this pool.
        """
        order = Order(checkpoint, {}, 0, checkpoint.digest_bytes > 0, on_placed, None)
        self._check_open()
        if order.checks and checkpoint.digest_bytes % self.chunk_bytes:
            self._check(order)
        return await self._filling.reserve(order, await self._pool_memory.open(), window_chunks)

    async def close(self) -> None:
        """End every load, the threads and the pool. What engines have mapped stays theirs."""
        self._paths_at_close = self.paths()
        await self._loads.close()
        await self._pool_memory.close()

    async def _is_better_in_place(self, checkpoint: Checkpoint) -> bool:
        """Compare the time of mapping what the page cache holds, and faulting in the rest, with that of a load."""
        cached = await self._loop.run_in_executor(None, bytes_in_page_cache, checkpoint)
        missing, paths = checkpoint.size_bytes - cached, self.paths()
        ssd_bytes_per_s = paths.ssd.bytes_per_s or _FIRST_SSD_BYTES_PER_S
        load_s = cached / (paths.page_cache.bytes_per_s or _FIRST_COPY_BYTES_PER_S) + missing / ssd_bytes_per_s
        return missing / (ssd_bytes_per_s * _FAULTED_SHARE) < load_s

    def _check_open(self) -> None:
        if self._loads.closing:
            raise Draining("the loader is closing")

    def _check(self, order: Order) -> None:
        self._check_open()
        if abs(order.priority) > _MAX_PRIORITY:
            raise InvalidInput(f"a priority of {order.priority} is out of bounds")
        if order.checks and self.chunk_bytes % order.checkpoint.digest_bytes:
            raise ConfigInvalid(
                f"{order.checkpoint.path} has a digest for each {order.checkpoint.digest_bytes} bytes, which do not "
                f"divide the host pool's chunks of {self.chunk_bytes}"
            )


def _close_late(made: asyncio.Future[ByteMover]) -> None:
    """Give back the pool whose maker was cancelled while it was being made, perhaps as the loop ends."""
    if not made.cancelled() and made.exception() is None:
        threading.Thread(target=made.result().close, name="sllm-close").start()
