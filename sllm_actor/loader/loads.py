"""Loads on their way through the byte mover, and those who wait for them.

Knows nothing of the pool or of what a load is for: it is told what to do when the bytes are there, and when they
never will be. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable

from sllm_actor.errors import Draining, NoCapacity
from sllm_actor.loader.lease import HostLease
from sllm_actor.loader.mapping import HostFile
from sllm_actor.loader.mover import ByteMover, LoadPlan, LoadState, LoadStatus

OnProgress = Callable[[int, int], None]
"""Called on the loop with the bytes that have arrived and the bytes of the whole checkpoint."""
OnReading = Callable[[bool], None]
"""Called on the loop with true when loads begin to read files, and with false when none does any more."""
Grant = Callable[[], HostLease]


class Load:
    """Bytes on their way into `files`. When it fails, so many `chunks` are free again."""

    def __init__(self, load_id: int, plan: LoadPlan, files: tuple[HostFile, ...], chunks: int) -> None:
        self.load_id = load_id
        self.files = files
        self.chunks = chunks
        self.priority = plan.priority
        self.reads = not plan.resident
        self.to_device = any(file.target is not None for file in plan.files)
        self.size_bytes = sum(file.size_bytes for file in plan.files if file.target is not None or not self.to_device)
        self.arrived_bytes = 0
        self.abandoned = False
        self.waiters: dict[asyncio.Future[HostLease], OnProgress | None] = {}
        self.owner: asyncio.Future[HostLease] | None = None  # Who began it: its targets are his.
        # Set by whoever begins it: the bytes are there, and each waiter is granted a lease; or they never will be.
        self.whole: Callable[[LoadStatus], Grant]
        self.undo: Callable[[LoadStatus | None], None]


class Loads:
    """Begins loads, follows them by the mover's event, and ends them."""

    def __init__(self, mover: ByteMover, max_loads: int, on_reading: OnReading | None = None) -> None:
        self._mover = mover
        self._max_loads = max_loads
        self._on_reading = on_reading
        self._told_reading = False
        self._running: list[Load] = []
        self._changed: list[asyncio.Future[None]] = []
        self._closing: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(mover.event_fd, self._on_event)

    @property
    def closing(self) -> bool:
        """Whether no load begins any more."""
        return self._closing is not None

    def check_room(self) -> None:
        """See that one more load may begin, before anything is given up for it.

        Raises:
            NoCapacity: too many run.
        """
        if len(self._running) >= self._max_loads:
            raise NoCapacity(f"{len(self._running)} loads run, which is as many as may")

    async def until_few(self) -> None:
        """Wait until at most half of the loads that may run do so: small ones of a larger whole leave others room."""
        while not self.closing and len(self._running) > self._max_loads // 2:
            await self.until_one_ends()

    def begin(
        self,
        make_plan: Callable[[], LoadPlan],
        *,
        files: tuple[HostFile, ...],
        chunks: int,
        whole: Callable[[LoadStatus], Grant],
        undo: Callable[[LoadStatus | None], None],
    ) -> Load:
        """Begin a load. `whole` or `undo` is called once, whatever ends it; and `undo` where it can't even begin.

        Raises:
            NoCapacity: too many run.
            Draining: the loader is closing.
        """
        try:
            if self.closing:
                raise Draining("the loader is closing")
            plan = make_plan()
            load = Load(self._mover.start(plan), plan, files, chunks)
        except BaseException:
            undo(None)
            raise
        load.whole, load.undo = whole, undo
        self._running.append(load)
        self._tell_reading()
        return load

    async def wait(self, load: Load, on_progress: OnProgress | None) -> HostLease:
        """Wait for a load; cancelling the last who waits cancels the load."""
        waiter: asyncio.Future[HostLease] = self._loop.create_future()
        load.waiters[waiter] = on_progress
        load.owner = load.owner or waiter
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                self._leave(load, waiter)
            elif waiter.exception() is None:
                waiter.result().release()  # Granted and cancelled in the same turn of the loop.
            raise

    def urge(self, load: Load, priority: int) -> None:
        """Make a load at least so urgent."""
        if priority > load.priority:
            load.priority = priority
            self._mover.set_priority(load.load_id, priority)

    def abandoned_chunks(self) -> int:
        """How many chunks will soon be free, because nobody waits for their loads any more."""
        return sum(load.chunks for load in self._running if load.abandoned)

    async def until_one_ends(self) -> None:
        """Wait until some load has ended, or all are to."""
        changed = self._loop.create_future()
        self._changed.append(changed)
        await changed

    async def close(self) -> None:
        """End every load, the threads and the slab."""
        if self._closing is None:
            self._loop.remove_reader(self._mover.event_fd)
            self._closing = self._loop.run_in_executor(None, self._mover.close)
            for load in self._running:
                for waiter in load.waiters:
                    if not waiter.done():
                        waiter.set_exception(Draining("the loader is closing"))
            self._wake()
            self._tell_reading()
        await asyncio.shield(self._closing)

    def _leave(self, load: Load, waiter: asyncio.Future[HostLease]) -> None:
        del load.waiters[waiter]
        if not load.waiters:
            self.abandon(load)
        elif load.to_device and waiter is load.owner and load in self._running and not self.closing:
            # Whoever stays waits for host memory; who has left may give his device memory back.
            self._mover.drop_targets(load.load_id)

    def abandon(self, load: Load) -> None:
        """Cancel a load that nobody waits for."""
        if load in self._running and not self.closing:
            load.abandoned = True
            self._mover.cancel(load.load_id)

    def _wake(self) -> None:
        for changed in self._changed:
            if not changed.done():
                changed.set_result(None)
        self._changed.clear()

    def _on_event(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._mover.event_fd)
        for load in list(self._running):
            status = self._mover.status(load.load_id)
            self._progress(load, status)
            if status.state is not LoadState.LOADING:
                self._mover.forget(load.load_id)
                self._running.remove(load)
                self._end(load, status)
        self._tell_reading()

    def _tell_reading(self) -> None:
        reading = not self.closing and any(load.reads for load in self._running)
        if self._on_reading is not None and reading != self._told_reading:
            self._told_reading = reading
            self._on_reading(reading)

    def _progress(self, load: Load, status: LoadStatus) -> None:
        arrived_bytes = status.device_bytes if load.to_device else status.page_cache_bytes + status.ssd_bytes
        if arrived_bytes == load.arrived_bytes:
            return
        load.arrived_bytes = arrived_bytes
        for on_progress in load.waiters.values():
            if on_progress is not None:
                # On its own turn of the loop, so that its failure is not ours.
                self._loop.call_soon(on_progress, arrived_bytes, load.size_bytes)

    def _end(self, load: Load, status: LoadStatus) -> None:
        waiters = [waiter for waiter in load.waiters if not waiter.done()]
        if status.state is LoadState.DONE and not load.abandoned:
            grant = load.whole(status)
            for waiter in waiters:
                waiter.set_result(grant())
        else:
            load.undo(status)
            for waiter in waiters:
                assert status.error is not None, "only an abandoned load is cancelled"
                waiter.set_exception(status.error(status.message))
        self._wake()
