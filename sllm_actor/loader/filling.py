"""Fill room in the host pool with what is asked for: from what is there, by a load under way, or by a new one.

Concurrent orders of one checkpoint are one load. Knows nothing of engines; belongs to one event loop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NoReturn

import msgspec

from sllm_actor.errors import AlreadyThere, CheckpointCorrupt, DeviceError, Draining, ModelTooLarge, NoCapacity
from sllm_actor.loader.holder import LOAD
from sllm_actor.loader.host_memory import Held, HostMemory, Key, chunk_count
from sllm_actor.loader.lease import HostLease, LoadReport
from sllm_actor.loader.loads import Grant, Load, Loads
from sllm_actor.loader.mapping import HostFile
from sllm_actor.loader.mover import LoadStatus
from sllm_actor.loader.order import Order
from sllm_actor.loader.pool import HostPool
from sllm_actor.loader.reservation import Reservation
from sllm_actor.loader.window import Window
from sllm_actor.units import format_bytes


class Filling:
    """Decides for each order whether to read, to join or to wait."""

    def __init__(self, pool: HostPool, memory: HostMemory, loads: Loads, window_chunks: int) -> None:
        self._pool = pool
        self._memory = memory
        self._loads = loads
        self._window_chunks = window_chunks
        self._shared: dict[Key, Load] = {}

    def knows(self, order: Order) -> bool:
        """Tell whether the checkpoint is in the pool, or on its way to it."""
        return order.key in self._shared or self._memory.find(order.key) is not None

    async def obtain(self, order: Order) -> HostLease:
        """Lease what `order` asks for, once it is there.

        Raises:
            ModelTooLarge, NoCapacity, CheckpointChanged, CheckpointCorrupt, ReadFailed, DeviceError, Draining: as
                `Loader.lease` and `Loader.load_to_device` say.
        """
        needed = self._needed(order)
        while not self._loads.closing:
            held = self._memory.find(order.key)
            if held is not None:
                order.placed(held.files)
                report = LoadReport(pool_bytes=held.size_bytes, total_bytes=held.size_bytes)
                return await self._finish(order, held, self._memory.grant(held, report, LOAD))
            load = self._shared.get(order.key)
            if load is not None and not load.abandoned:
                # What joins a load is then held, and copied or checked from there.
                self._loads.urge(load, order.priority)
                order.placed(load.files)
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
                self._loads.check_room()
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
            return lambda: HostLease(lease.files, report, lease.release, lease.holder)

        load = self._loads.begin(lambda: order.plan(files, resident=True), files=(), chunks=0, whole=whole, undo=undo)
        return await self._loads.wait(load, order.on_progress)

    def _begin(self, order: Order) -> Load:
        """Load into chunks that are then held."""
        files = self._take(order)

        def whole(status: LoadStatus) -> Grant:
            self._shared.pop(order.key, None)
            held = self._memory.hold(order.key, files, order.checkpoint.size_bytes)
            held.verified = order.checks
            return partial(self._memory.grant, held, order.report(status), LOAD)

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
            order.placed(files)
        except BaseException:
            self._loads.abandon(load)
            raise
        return load

    def _begin_window(self, order: Order) -> Load:
        """Load through a few chunks that are free again after."""
        self._loads.check_room()
        window = self._take_window(self._window_chunks)

        def whole(status: LoadStatus) -> Grant:
            self._pool.give_back(window)
            return lambda: HostLease((), order.report(status), lambda: None)

        return self._loads.begin(
            lambda: order.plan((), window),
            files=(),
            chunks=len(window),
            whole=whole,
            undo=lambda _: self._pool.give_back(window),
        )

    async def reserve(self, order: Order, memory: memoryview, window_chunks: int) -> Reservation:
        """Take room that the caller fills; `memory` is the whole pool's.

        Raises:
            ModelTooLarge, NoCapacity, AlreadyThere, Draining: as `Loader.reserve` says.
        """
        needed = self._chunks_of(order) if window_chunks else self._needed(order)
        at_least = max(1, -(-order.checkpoint.digest_bytes // self._pool.chunk_bytes))
        if window_chunks and at_least > self._pool.chunks:
            raise ModelTooLarge(
                f"each digest of {order.checkpoint.path} covers {self._bytes(at_least)} and the host pool has "
                f"{self._bytes(self._pool.chunks)}"
            )
        while not self._loads.closing and self._memory.obtainable_chunks < needed:
            if self._memory.obtainable_chunks + self._loads.abandoned_chunks() < needed:
                if window_chunks and self._memory.obtainable_chunks >= at_least:
                    return self._reserve_window(order, memory, max(window_chunks, 2 * at_least))
                self._refuse(order, at_least if window_chunks else needed)
            await self._loads.until_one_ends()
        if self._loads.closing:
            raise Draining("the loader is closing")
        if self._memory.find(order.key) is not None:
            raise AlreadyThere(f"{order.checkpoint.path} is in the host pool already")
        self._memory.make_room(needed)
        return self._reserve_whole(order, memory)

    def _reserve_whole(self, order: Order, memory: memoryview) -> Reservation:
        files = self._take(order)

        def commit(report: LoadReport) -> Callable[[str], HostLease]:
            held = self._memory.hold(order.key, files, order.checkpoint.size_bytes)
            held.verified = order.checks
            return partial(self._memory.grant, held, report)

        give_back = partial(self._memory.give_back, files)
        reserved = Reservation(order, files, memory, self._pool.chunk_bytes, self._loads, commit, give_back)
        try:
            order.placed(files)
        except BaseException:
            reserved.abandon()
            raise
        return reserved

    def _reserve_window(self, order: Order, memory: memoryview, chunks: int) -> Reservation:
        window = self._take_window(chunks)

        def commit(report: LoadReport) -> Callable[[str], HostLease]:
            return lambda _: HostLease((), report, lambda: None)

        give_back = partial(self._pool.give_back, window)
        return Reservation(order, Window(window), memory, self._pool.chunk_bytes, self._loads, commit, give_back)

    def _take_window(self, chunks: int) -> tuple[int, ...]:
        """Take so many chunks, or as many as can be had."""
        count = min(chunks, self._memory.obtainable_chunks)
        self._memory.make_room(count)
        return self._pool.take(count)

    def _take(self, order: Order) -> tuple[HostFile, ...]:
        return tuple(
            HostFile(file.name, file.size_bytes, self._memory.take(file.size_bytes)) for file in order.checkpoint.files
        )

    def check_fits(self, order: Order) -> None:
        """See that the pool is large enough.

        Raises:
            ModelTooLarge: it is not; the message has both sizes.
        """
        self._needed(order)

    def _chunks_of(self, order: Order) -> int:
        return sum(self._pool.chunks_for(file.size_bytes) for file in order.checkpoint.files)

    def _needed(self, order: Order) -> int:
        """Count the chunks; only what goes on to a device may need more than the pool has."""
        needed = self._chunks_of(order)
        if needed > self._pool.chunks and not order.targets:
            raise ModelTooLarge(
                f"{order.checkpoint.path} takes {self._bytes(needed)} of host memory and the host pool has "
                f"{self._bytes(self._pool.chunks)}"
            )
        return needed

    def _refuse(self, order: Order, needed: int) -> NoReturn:
        raise NoCapacity(
            f"{order.checkpoint.path} takes {self._bytes(needed)} of host memory; "
            f"{self._bytes(self._memory.obtainable_chunks)} of {self._bytes(self._pool.chunks)} can be had"
        )

    def _bytes(self, chunks: int) -> str:
        return format_bytes(chunks * self._pool.chunk_bytes)
