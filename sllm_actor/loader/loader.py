"""Bring checkpoints into the host pool and lease them from there.

Owns the pool and decides what stays in it. Knows nothing of engines, models or requests, and never touches a
byte: a byte mover does. Tiers and pooled chunks: ServerlessLLM (OSDI '24).
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
from collections.abc import Callable
from typing import Self

import msgspec

from sllm_actor.checkpoint.folder import Checkpoint
from sllm_actor.errors import ConfigInvalid, Draining, ModelTooLarge, NoCapacity, SllmError
from sllm_actor.loader.choice import use_native
from sllm_actor.loader.mapping import HostFile
from sllm_actor.loader.memory import available_bytes
from sllm_actor.loader.mover import ByteMover, FilePlan, LoadState, LoadStatus, MoverOptions, SlabFacts
from sllm_actor.loader.native import NativeMover
from sllm_actor.loader.pool import HostPool
from sllm_actor.loader.portable import PortableMover
from sllm_actor.runtime.clock import Clock
from sllm_actor.units import MIB, format_bytes

OnProgress = Callable[[int, int], None]
"""Called on the loop with the bytes that have arrived and the bytes of the whole checkpoint."""

_ALIGNMENT = 4096
_MAX_THREADS = 256
_Key = tuple[str, str]


class LoadReport(msgspec.Struct, frozen=True):
    """Where the bytes of a lease came from and how long that took; the three sources add up to the total."""

    pool_bytes: int
    page_cache_bytes: int
    ssd_bytes: int
    total_bytes: int
    duration_s: float


class Resident(msgspec.Struct, frozen=True):
    """One checkpoint in the pool, as `residents` reports it."""

    fingerprint: str
    path: str
    size_bytes: int
    leases: int
    last_used_s: float


class _Held:
    """A checkpoint whose bytes are all in the pool."""

    def __init__(self, key: _Key, files: tuple[HostFile, ...], size_bytes: int, now_s: float) -> None:
        self.key = key
        self.files = files
        self.size_bytes = size_bytes
        self.leases = 0
        self.last_used_s = now_s


class _Load:
    """A checkpoint on its way in, and those who wait for it."""

    def __init__(self, key: _Key, load_id: int, files: tuple[HostFile, ...], size_bytes: int) -> None:
        self.key = key
        self.load_id = load_id
        self.files = files
        self.size_bytes = size_bytes
        self.arrived_bytes = 0
        self.waiters: dict[asyncio.Future[HostLease], OnProgress | None] = {}


class HostLease:
    """The right to use a checkpoint's chunks: they stay where they are until `release`."""

    def __init__(self, loader: Loader, held: _Held, report: LoadReport) -> None:
        self.files = held.files
        self.report = report
        self._loader = loader
        self._held: _Held | None = held

    def release(self) -> None:
        """Give the chunks back to the pool's judgement; doing it twice does nothing."""
        held, self._held = self._held, None
        if held is not None:
            self._loader._release(held)


class Loader:
    """Leases checkpoints out of one host pool. Belongs to the event loop that opened it.

    Concurrent leases of one checkpoint are one load. What nobody leases stays until its room is needed; the
    least recently used goes first.
    """

    def __init__(self, mover: ByteMover, pool: HostPool, clock: Clock) -> None:
        self._mover = mover
        self._pool = pool
        self._clock = clock
        self._held: dict[_Key, _Held] = {}
        self._loads: dict[_Key, _Load] = {}
        self._draining: list[_Load] = []  # Abandoned, with a chunk perhaps still being written.
        self._drained: list[asyncio.Future[None]] = []
        self._closing: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(mover.event_fd, self._on_event)

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
    ) -> Self:
        """Make the pool and its threads, off the loop: faulting in the memory takes about 1 s for some GB.

        Raises:
            ConfigInvalid: a size is out of bounds, the memory can't be had, or the native library is missing.
        """
        _check_sizes(pool_bytes, chunk_bytes, reading_threads, max_loads)
        chunks = pool_bytes // chunk_bytes
        options = MoverOptions(chunk_bytes, chunks, reading_threads, max_loads, lock)
        native = use_native()
        loop = asyncio.get_running_loop()
        made: asyncio.Future[ByteMover] = loop.run_in_executor(
            None, lambda: NativeMover(options) if native else PortableMover(options, clock)
        )
        try:
            mover = await asyncio.shield(made)
        except asyncio.CancelledError:
            made.add_done_callback(lambda late: _close_late(loop, late))
            raise
        return cls(mover, HostPool(chunk_bytes, chunks), clock)

    @property
    def pool_fd(self) -> int:
        """The memfd that engines map; hand it over as a duplicate (fork, SCM_RIGHTS), never close it."""
        assert self._closing is None, "the loader is closed"
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

    def residents(self) -> list[Resident]:
        """List the checkpoints that are whole in the pool, the least recently used first."""
        return [
            Resident(*held.key, held.size_bytes, held.leases, held.last_used_s)
            for held in sorted(self._held.values(), key=lambda held: held.last_used_s)
        ]

    async def lease(self, checkpoint: Checkpoint, *, on_progress: OnProgress | None = None) -> HostLease:
        """Bring every file of `checkpoint` into the pool, if it is not there, and hold it until release.

        Tensors lie at their offsets from the beginning of their file; each file begins on a chunk of its own.
        Cancelling the last of those who wait for a load cancels the load.

        Raises:
            ModelTooLarge: larger than the whole pool.
            NoCapacity: the room is leased or being loaded into, or too many loads run.
            CheckpointChanged: the files are no longer those that were described.
            ReadFailed: a file can't be read.
            Draining: the loader is closing.
        """
        # Folders share a fingerprint where a tool has set every mtime alike: the path is part of the key.
        key = (checkpoint.fingerprint, str(checkpoint.path))
        needed = self._chunks_needed(checkpoint)
        while self._closing is None:
            held = self._held.get(key)
            if held is not None:
                size = held.size_bytes
                return self._grant(held, LoadReport(size, 0, 0, size, 0.0))
            if key in self._loads:
                return await self._wait(self._loads[key], on_progress)
            if self._make_room(needed, checkpoint):
                return await self._wait(self._begin(key, checkpoint), on_progress)
            await self._until_drained()
        raise Draining("the loader is closing")

    async def close(self) -> None:
        """End every load, the threads and the pool. What engines have mapped stays theirs."""
        if self._closing is None:
            self._loop.remove_reader(self._mover.event_fd)
            self._closing = self._loop.run_in_executor(None, self._mover.close)
            for load in self._loads.values():
                for waiter in load.waiters:
                    if not waiter.done():
                        waiter.set_exception(Draining("the loader is closing"))
            self._wake_drained()
        await asyncio.shield(self._closing)

    def _chunks_needed(self, checkpoint: Checkpoint) -> int:
        needed = sum(self._pool.chunks_for(file.size_bytes) for file in checkpoint.files)
        if needed > self._pool.chunks:
            raise ModelTooLarge(
                f"{checkpoint.path} takes {format_bytes(needed * self.chunk_bytes)} of host memory "
                f"and the host pool has {format_bytes(self.pool_bytes)}"
            )
        return needed

    def _make_room(self, needed: int, checkpoint: Checkpoint) -> bool:
        """Evict until `needed` chunks are free; False where abandoned loads will soon give back enough."""
        idle = sorted((held for held in self._held.values() if held.leases == 0), key=lambda held: held.last_used_s)
        obtainable = self._pool.free_chunks + sum(_chunk_count(held.files) for held in idle)
        if obtainable < needed:
            if obtainable + sum(_chunk_count(load.files) for load in self._draining) >= needed:
                return False
            raise NoCapacity(
                f"{checkpoint.path} takes {format_bytes(needed * self.chunk_bytes)} of host memory; "
                f"{format_bytes(obtainable * self.chunk_bytes)} of {format_bytes(self.pool_bytes)} can be had"
            )
        for held in idle:
            if self._pool.free_chunks >= needed:
                break
            del self._held[held.key]
            self._give_back(held.files)
        return True

    def _begin(self, key: _Key, checkpoint: Checkpoint) -> _Load:
        files = tuple(
            HostFile(file.name, file.size_bytes, self._pool.take(self._pool.chunks_for(file.size_bytes)))
            for file in checkpoint.files
        )
        plans = [
            FilePlan(str(checkpoint.file_path(file)), file.size_bytes, file.mtime_ns, file.inode, host.chunks)
            for file, host in zip(checkpoint.files, files, strict=True)
        ]
        try:
            load_id = self._mover.start(plans)
        except SllmError:
            self._give_back(files)
            raise
        load = self._loads[key] = _Load(key, load_id, files, checkpoint.size_bytes)
        return load

    async def _wait(self, load: _Load, on_progress: OnProgress | None) -> HostLease:
        waiter: asyncio.Future[HostLease] = self._loop.create_future()
        load.waiters[waiter] = on_progress
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                self._abandon(load, waiter)
            elif waiter.exception() is None:
                waiter.result().release()  # Granted and cancelled in the same turn of the loop.
            raise

    def _abandon(self, load: _Load, waiter: asyncio.Future[HostLease]) -> None:
        del load.waiters[waiter]
        if load.waiters or self._loads.get(load.key) is not load or self._closing is not None:
            return
        del self._loads[load.key]
        self._draining.append(load)
        self._mover.cancel(load.load_id)

    async def _until_drained(self) -> None:
        drained = self._loop.create_future()
        self._drained.append(drained)
        await drained

    def _wake_drained(self) -> None:
        for drained in self._drained:
            if not drained.done():
                drained.set_result(None)
        self._drained.clear()

    def _on_event(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._mover.event_fd)
        for load in [*self._loads.values(), *self._draining]:
            status = self._mover.status(load.load_id)
            self._progress(load, status)
            if status.state is not LoadState.LOADING:
                self._mover.forget(load.load_id)
                self._end(load, status)

    def _progress(self, load: _Load, status: LoadStatus) -> None:
        arrived_bytes = status.page_cache_bytes + status.ssd_bytes
        if arrived_bytes == load.arrived_bytes:
            return
        load.arrived_bytes = arrived_bytes
        for on_progress in load.waiters.values():
            if on_progress is not None:
                # On its own turn of the loop, so that its failure is not ours.
                self._loop.call_soon(on_progress, arrived_bytes, load.size_bytes)

    def _end(self, load: _Load, status: LoadStatus) -> None:
        if load in self._draining:
            self._draining.remove(load)
            self._give_back(load.files)
            self._wake_drained()
            return
        del self._loads[load.key]
        waiters = [waiter for waiter in load.waiters if not waiter.done()]
        if status.state is LoadState.DONE:
            held = self._held[load.key] = _Held(load.key, load.files, load.size_bytes, self._clock.monotonic_s())
            report = LoadReport(0, status.page_cache_bytes, status.ssd_bytes, load.size_bytes, status.duration_s)
            for waiter in waiters:
                waiter.set_result(self._grant(held, report))
            return
        assert status.error is not None, "only an abandoned load is cancelled"
        self._give_back(load.files)
        for waiter in waiters:
            waiter.set_exception(status.error(status.message))

    def _grant(self, held: _Held, report: LoadReport) -> HostLease:
        held.leases += 1
        held.last_used_s = self._clock.monotonic_s()
        return HostLease(self, held, report)

    def _release(self, held: _Held) -> None:
        assert held.leases > 0, "a lease is released once"
        held.leases -= 1
        held.last_used_s = self._clock.monotonic_s()

    def _give_back(self, files: tuple[HostFile, ...]) -> None:
        for file in files:
            self._pool.give_back(file.chunks)


def _chunk_count(files: tuple[HostFile, ...]) -> int:
    return sum(len(file.chunks) for file in files)


def _check_sizes(pool_bytes: int, chunk_bytes: int, reading_threads: int, max_loads: int) -> None:
    alignment = max(_ALIGNMENT, mmap.PAGESIZE)
    if chunk_bytes <= 0 or chunk_bytes % alignment:
        raise ConfigInvalid(f"a chunk of {chunk_bytes} bytes is not a multiple of {alignment}")
    if pool_bytes < chunk_bytes:
        raise ConfigInvalid(f"a host pool of {pool_bytes} bytes holds no chunk of {chunk_bytes}")
    if pool_bytes > (available := available_bytes()):
        # Every page is taken at once, and for one too many the kernel would end some process.
        raise ConfigInvalid(
            f"a host pool of {format_bytes(pool_bytes)} is more than {format_bytes(available)} of free memory"
        )
    if not 1 <= reading_threads <= _MAX_THREADS or max_loads < 1:
        raise ConfigInvalid(f"{reading_threads} reading threads or {max_loads} loads are out of bounds")


def _close_late(loop: asyncio.AbstractEventLoop, made: asyncio.Future[ByteMover]) -> None:
    """Give back the pool whose maker was cancelled while it was being made."""
    if not made.cancelled() and made.exception() is None:
        loop.run_in_executor(None, made.result().close)
