"""Bring checkpoints into the host pool, and on to devices, and lease them from there.

Decides what is loaded where and what makes room. Knows nothing of engines, models or requests, and never touches
a byte: a byte mover does. Tiers and pooled chunks: ServerlessLLM (OSDI '24).
"""

from __future__ import annotations

import asyncio
import mmap
import threading
from collections.abc import Mapping
from functools import partial
from typing import NoReturn, Self

import msgspec

from sllm_actor.checkpoint.folder import Checkpoint
from sllm_actor.errors import (
    CheckpointCorrupt,
    ConfigInvalid,
    DeviceError,
    Draining,
    InvalidInput,
    ModelTooLarge,
    NoCapacity,
)
from sllm_actor.loader.choice import use_native
from sllm_actor.loader.device import Device
from sllm_actor.loader.host_memory import Held, HostMemory, Key, chunk_count
from sllm_actor.loader.lease import DeviceTarget, HostLease, LoadReport, Resident
from sllm_actor.loader.loads import Grant, Load, Loads, OnProgress, OnReading
from sllm_actor.loader.mapping import HostFile
from sllm_actor.loader.memory import available_bytes, reserved_bytes
from sllm_actor.loader.mover import ByteMover, LoadStatus, MoverOptions, Paths, SlabFacts
from sllm_actor.loader.native import NativeMover
from sllm_actor.loader.order import OnPlaced, Order, bytes_in_page_cache, files_in_place
from sllm_actor.loader.pool import HostPool
from sllm_actor.loader.portable import PortableMover
from sllm_actor.runtime.clock import Clock
from sllm_actor.units import MIB, format_bytes

_ALIGNMENT = 4096
_HUGE_PAGE_BYTES = 2 * MIB
_MAX_THREADS = 256
_MAX_LOADS = 65536
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
        self, mover: ByteMover, pool: HostPool, threads: int, clock: Clock, on_reading: OnReading | None
    ) -> None:
        self._mover = mover
        self._pool = pool
        self._memory = HostMemory(pool, clock)
        self._loads = Loads(mover, on_reading)
        self._paths_at_close: Paths | None = None
        self._shared: dict[Key, Load] = {}
        self._window_chunks = _WINDOW_CHUNKS_PER_THREAD * threads
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
        _check_sizes(pool_bytes, chunk_bytes, reading_threads, max_loads, huge_pages)
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
        return cls(mover, HostPool(chunk_bytes, chunks), reading_threads, clock, on_reading)

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
        known = order.key in self._shared or self._memory.find(order.key) is not None
        if in_place and not verify and not known and await self._is_better_in_place(checkpoint):
            self._check_open()
            files = files_in_place(checkpoint)
            self._placed(order, files)
            report = LoadReport(in_place_bytes=checkpoint.size_bytes, total_bytes=checkpoint.size_bytes)
            return HostLease(files, report, lambda: None)
        if (needed := self._chunks_needed(checkpoint)) > self._pool.chunks:
            raise ModelTooLarge(
                f"{checkpoint.path} takes {format_bytes(needed * self.chunk_bytes)} of host memory "
                f"and the host pool has {format_bytes(self.pool_bytes)}"
            )
        return await self._obtain(order, needed)

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
        if not targets:
            raise InvalidInput(f"{checkpoint.path}: no file is to be loaded")
        sizes = {file.name: file.size_bytes for file in checkpoint.files}
        for name, target in targets.items():
            if name not in sizes:
                raise InvalidInput(f"{checkpoint.path} has no file {name}")
            if not 0 <= target.offset <= target.buffer.size_bytes - sizes[name]:
                raise InvalidInput(
                    f"{name} of {sizes[name]} bytes does not fit at {target.offset} of a device buffer of "
                    f"{target.buffer.size_bytes}"
                )
        order = Order(checkpoint, targets, priority, verify, None, on_progress)
        self._check(order)
        return await self._obtain(order, self._chunks_needed(checkpoint))

    async def close(self) -> None:
        """End every load, the threads and the pool. What engines have mapped stays theirs."""
        self._paths_at_close = self.paths()
        await self._loads.close()

    async def _obtain(self, order: Order, needed: int) -> HostLease:
        while not self._loads.closing:
            held = self._memory.find(order.key)
            if held is not None:
                self._placed(order, held.files)
                report = LoadReport(pool_bytes=held.size_bytes, total_bytes=held.size_bytes)
                return await self._finish(order, held, self._memory.grant(held, report))
            load = self._shared.get(order.key)
            if load is not None and not load.abandoned:
                # What joins a load is then held, and copied or checked from there.
                self._loads.urge(load, order.priority)
                self._placed(order, load.files)
                try:
                    lease = await self._loads.wait(load, None if order.targets else order.on_progress)
                except DeviceError:
                    continue  # The device of who began it, and not ours.
                held = self._memory.find(order.key)
                if held is not None:
                    return await self._finish(order, held, lease)
                lease.release()  # Found to be damaged, in this very turn of the loop.
                continue
            if self._memory.obtainable_chunks >= needed:
                self._memory.make_room(needed)
                return await self._loads.wait(self._begin(order), order.on_progress)
            if self._memory.obtainable_chunks + self._loads.abandoned_chunks() < needed:
                if order.targets and self._memory.obtainable_chunks:
                    return await self._loads.wait(self._begin_window(order), order.on_progress)
                self._refuse(order, needed)
            await self._loads.until_one_ends()
        raise Draining("the loader is closing")

    async def _finish(self, order: Order, held: Held, lease: HostLease) -> HostLease:
        """Check and copy what is in the pool, as far as that is asked for and not done."""
        if not order.targets and (held.verified or not order.checks):
            return lease
        files = tuple(file for file in held.files if file.name in order.targets or order.checks)

        def undo(status: LoadStatus | None) -> None:
            if status is not None and status.error is CheckpointCorrupt:
                self._memory.forget(held)
            lease.release()

        def whole(status: LoadStatus) -> Grant:
            held.verified = held.verified or order.checks
            moved = {"device_bytes": status.device_bytes, "duration_s": lease.report.duration_s + status.duration_s}
            report = msgspec.structs.replace(lease.report, **moved)
            return lambda: HostLease(lease.files, report, lease.release)

        load = self._loads.begin(lambda: order.plan(files, resident=True), files=(), chunks=0, whole=whole, undo=undo)
        return await self._loads.wait(load, order.on_progress)

    def _begin(self, order: Order) -> Load:
        """Load into chunks that are then held."""
        files = tuple(
            HostFile(file.name, file.size_bytes, self._memory.take(file.size_bytes)) for file in order.checkpoint.files
        )

        def whole(status: LoadStatus) -> Grant:
            self._shared.pop(order.key, None)
            held = self._memory.hold(order.key, files, order.checkpoint.size_bytes)
            held.verified = order.checks
            return partial(self._memory.grant, held, order.report(status))

        def undo(_: LoadStatus | None) -> None:
            self._memory.give_back(files)
            if load is not None and self._shared.get(order.key) is load:
                del self._shared[order.key]

        load: Load | None = None
        load = self._loads.begin(
            lambda: order.plan(files), files=files, chunks=chunk_count(files), whole=whole, undo=undo
        )
        self._shared[order.key] = load
        try:
            self._placed(order, files)
        except BaseException:
            self._loads.abandon(load)
            raise
        return load

    def _begin_window(self, order: Order) -> Load:
        """Load through a few chunks that are free again after."""
        count = min(self._window_chunks, self._memory.obtainable_chunks)
        self._memory.make_room(count)
        window = self._pool.take(count)

        def whole(status: LoadStatus) -> Grant:
            self._pool.give_back(window)
            return lambda: HostLease((), order.report(status), lambda: None)

        return self._loads.begin(
            lambda: order.plan((), window),
            files=(),
            chunks=count,
            whole=whole,
            undo=lambda _: self._pool.give_back(window),
        )

    def _placed(self, order: Order, files: tuple[HostFile, ...]) -> None:
        if order.on_placed is not None:
            order.on_placed(files)

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

    def _chunks_needed(self, checkpoint: Checkpoint) -> int:
        return sum(self._pool.chunks_for(file.size_bytes) for file in checkpoint.files)

    def _refuse(self, order: Order, needed: int) -> NoReturn:
        raise NoCapacity(
            f"{order.checkpoint.path} takes {format_bytes(needed * self.chunk_bytes)} of host memory; "
            f"{format_bytes(self._memory.obtainable_chunks * self.chunk_bytes)} of {format_bytes(self.pool_bytes)} "
            "can be had"
        )


def _check_sizes(pool_bytes: int, chunk_bytes: int, reading_threads: int, max_loads: int, huge_pages: bool) -> None:
    alignment = max(_ALIGNMENT, mmap.PAGESIZE)
    if chunk_bytes <= 0 or chunk_bytes % alignment:
        raise ConfigInvalid(f"a chunk of {chunk_bytes} bytes is not a multiple of {alignment}")
    if pool_bytes < chunk_bytes:
        raise ConfigInvalid(f"a host pool of {pool_bytes} bytes holds no chunk of {chunk_bytes}")
    may_reserve = huge_pages and use_native() and chunk_bytes % _HUGE_PAGE_BYTES == 0
    fits_reserved = may_reserve and pool_bytes <= reserved_bytes()
    if pool_bytes > (available := available_bytes()) and not fits_reserved:
        # Every page is taken at once, and for one too many the kernel would end some process.
        raise ConfigInvalid(
            f"a host pool of {format_bytes(pool_bytes)} is more than {format_bytes(available)} of free memory"
        )
    if not 1 <= reading_threads <= _MAX_THREADS or not 1 <= max_loads <= _MAX_LOADS:
        raise ConfigInvalid(f"{reading_threads} reading threads or {max_loads} loads are out of bounds")


def _close_late(made: asyncio.Future[ByteMover]) -> None:
    """Give back the pool whose maker was cancelled while it was being made, perhaps as the loop ends."""
    if not made.cancelled() and made.exception() is None:
        threading.Thread(target=made.result().close, name="sllm-close").start()
