"""Loads of checkpoints that are not on this node: one for all who want the same, and one copy for the SSD.

Who asks for a checkpoint while it is on its way joins; the last who leaves ends it, and what the SSD has of it stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, nullcontext

import msgspec

from sllm_actor.errors import CheckpointCorrupt, Draining, SllmError
from sllm_actor.loader.cards import Card
from sllm_actor.loader.fetch import MAX_READS, Fetch
from sllm_actor.loader.lease import HostLease
from sllm_actor.loader.load_queue import LoadQueue, Turn
from sllm_actor.loader.loader import Loader
from sllm_actor.loader.loads import OnProgress
from sllm_actor.loader.meter import Meter
from sllm_actor.loader.order import Order
from sllm_actor.loader.reservation import Reservation
from sllm_actor.loader.shared_load import SharedLoad, Waiter
from sllm_actor.loader.ssd_partial import SsdPartial
from sllm_actor.loader.ssd_tier import SsdTier
from sllm_actor.loader.storing import Storing
from sllm_actor.loader.suppliers import Supplier, Suppliers
from sllm_actor.runtime.clock import Clock
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.runtime.threads import to_the_end
from sllm_actor.sources.source import Source

log = logging.getLogger(__name__)

# What a checkpoint goes through where the pool has no room for it: chunks that arrive, and as many that go on.
_WINDOW_CHUNKS = 2 * MAX_READS

OpenSource = Callable[[str], Source]
Mirrors = Callable[[str], Sequence[str]]
"""Where else a model may be, by its id: URLs of places that are asked beside its own source."""


class RemoteLoads:
    """Runs fetches and pulls. Belongs to one event loop."""

    def __init__(
        self,
        loader: Loader,
        ssd: SsdTier,
        open_source: OpenSource,
        queue: LoadQueue,
        clock: Clock,
        chance: Callable[[], float],
        mirrors: Mirrors,
        pressing: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._mirrors = mirrors
        self._pressing = pressing
        self._loader = loader
        self._ssd = ssd
        self._open_source = open_source
        self._queue = queue
        self._clock = clock
        self._chance = chance
        self._scope = TaskScope("remote-loads")
        self._writers = TaskScope("remote-loads/writers")
        self._running: dict[str, SharedLoad] = {}
        self._closed = False
        # Ends a pull of an identity, for a load that goes on with what it has stored.
        self.take_over: Callable[[str], Awaitable[None]] | None = None
        # Called when the SSD has a checkpoint more.
        self.on_stored: Callable[[], None] = lambda: None
        self.meter = Meter(clock)
        self._copies: dict[str, asyncio.Task[None]] = {}

    def progress(self, identity: str) -> tuple[int, int] | None:
        """Tell how many bytes of a checkpoint have arrived, and of how many; None where none is on its way."""
        load = self._running.get(identity)
        return None if load is None else (load.arrived_bytes, load.size_bytes)

    def copies(self) -> list[asyncio.Task[None]]:
        """List the copies that are being written to the SSD from the pool, which holds their bytes until then."""
        return list(self._copies.values())

    @property
    def chunk_bytes(self) -> int:
        """The size of the chunks that are fetched and stored."""
        return self._loader.chunk_bytes

    def is_stored(self, card: Card) -> bool:
        """Tell whether the SSD has a checkpoint whole."""
        return self._ssd.holds(card.model_id)

    def under_way(
        self, card: Card, on_progress: OnProgress | None
    ) -> tuple[asyncio.Task[HostLease | None] | None, asyncio.Task[None] | None]:
        """Give the load of a checkpoint, and the writing of its copy to the SSD, as far as there is one."""
        load = self._running.get(card.checkpoint.identity)
        if load is not None and on_progress is not None:
            load.watch(on_progress)
        return (None if load is None else load.task), self._copies.get(card.checkpoint.identity)

    async def lease(self, card: Card, order: Order) -> HostLease | None:
        """Bring the checkpoint of `card` into the pool from its sources, and to the targets of `order`.

        Where there are targets, and the pool has no room for the whole, its bytes only go through, as with
        `Loader.load_to_device`. None: it could not share what is there by now, in a higher tier or on its way, or
        that was not for it; it is to be asked for again.

        Raises:
            SourceError, SourceInvalid, CheckpointCorrupt: no source gives it.
            DeviceError: a copy to one of the targets failed.
            ModelTooLarge, NoCapacity, Draining: as `Loader.lease` does.
        """
        if not order.targets:
            self._loader.check_fits(card.checkpoint)
        load = await self._join(card, order.priority)
        waiter = load.join(order)
        try:
            await load.wait(waiter)
            return self._granted(card, load, waiter)
        finally:
            try:
                if waiter.copying is not None:
                    await waiter.copying.close()
            finally:
                load.leave(waiter)

    def _granted(self, card: Card, load: SharedLoad, waiter: Waiter) -> HostLease | None:
        copied_bytes = 0
        if load.task.done():
            if load.task.cancelled():
                if load.abandoned:  # It went through to the devices of others, who have left.
                    return None
                raise Draining("the loader is closing")
            if load.task.result() is None:
                return None
        if waiter.copying is not None:
            if not waiter.is_copied_to:
                return None
            copied_bytes = waiter.copying.done.result()
        lease = load.task.result()
        assert lease is not None
        report = msgspec.structs.replace(lease.report, device_bytes=copied_bytes)
        if not lease.files:
            return HostLease((), report, lambda: None) if copied_bytes else None
        mine = self._loader.lease_resident(card.checkpoint)
        return None if mine is None else HostLease(mine.files, report, mine.release, mine.holder)

    async def _join(self, card: Card, priority: int) -> SharedLoad:
        identity = card.checkpoint.identity
        if self._closed:
            raise Draining("the loader is closing")
        while (load := self._running.get(identity)) is not None:
            if not load.abandoned:
                return load
            await asyncio.wait([load.task])
        load = self._running[identity] = SharedLoad(card.checkpoint.size_bytes)
        work = self._load(card, load, priority)
        load.start(self._scope.spawn(work, f"load-{identity[:12]}", on_failure=lambda _: None))
        load.task.add_done_callback(lambda _: self._running.pop(identity, None))
        return load

    async def _load(self, card: Card, load: SharedLoad, priority: int) -> HostLease | None:
        lease: HostLease | None = None
        try:
            async with (
                self._queue.turn(card.checkpoint.size_bytes, priority, lambda: load.arrived(0)) as turn,
                self.suppliers(card) as suppliers,
            ):
                await self._end_others(card)
                # It has waited: a pull, or another name's load, may have been through.
                if not self.is_stored(card) and not self._loader.holds(card.checkpoint):
                    lease = await self._fetch(card, load, suppliers, turn)
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        return lease

    async def _fetch(self, card: Card, load: SharedLoad, suppliers: Suppliers, turn: Turn) -> HostLease:
        partial = await self._take_partial(card)
        storing: Storing | None = None
        writing: asyncio.Task[None] | None = None
        try:
            window_chunks = _WINDOW_CHUNKS if load.wants_devices else 0
            reserved = await self._loader.reserve(card.checkpoint, on_placed=load.placed, window_chunks=window_chunks)
        except BaseException:
            if partial is not None:
                await partial.pause()
            raise
        fetch = Fetch(card.checkpoint, reserved, suppliers, partial, self._clock, _both(load.arrived, turn))
        try:
            load.fetching(fetch, goes_through=reserved.goes_through)
            storing = fetch.storing
            if storing is not None:
                writing = self._writers.spawn(storing.run(), "store")
            # What goes through a window is held up where the SSD is.
            with self.meter.running(), self._pressing() if reserved.goes_through else nullcontext():
                lease = await fetch.run()
            self.meter.add(lease.report.remote_bytes)
        except BaseException:
            fetch.leave()
            if storing is not None and writing is not None:
                await _stop(storing, writing)
            reserved.abandon()
            raise
        if storing is not None and writing is not None:
            self._keep(card, storing, writing, reserved)
        else:
            reserved.forget()
        return lease

    async def _end_others(self, card: Card) -> None:
        """End a pull of the same checkpoint, and let a copy be finished that is being written."""
        identity = card.checkpoint.identity
        if self.take_over is not None:
            await self.take_over(identity)
        copy = self._copies.get(identity)
        if copy is not None:
            await asyncio.wait([copy])

    async def _take_partial(self, card: Card) -> SsdPartial | None:
        """Begin the SSD's copy, or go on with it; without one, where the SSD has no room for it."""
        try:
            return await self.begin(card)
        except SllmError as wrong:
            log.warning("%s is loaded without a copy on the SSD: %s", card.url, wrong.message)
            return None

    async def begin(self, card: Card) -> SsdPartial:
        """Begin the SSD's copy, or go on with it; raises what `SsdTier.begin` does."""
        return await self._ssd.begin(
            card.checkpoint.identity, card.weights, card.small_paths(), self._loader.chunk_bytes
        )

    def _keep(self, card: Card, storing: Storing, writing: asyncio.Task[None], reserved: Reservation) -> None:
        """Finish the SSD's copy from the pool, which holds the bytes until then."""
        identity = card.checkpoint.identity
        copy = self._scope.spawn(self._finish(card, storing, writing), f"copy-{identity[:12]}")
        self._copies[identity] = copy

        def done(_: asyncio.Task[None]) -> None:
            del self._copies[identity]
            reserved.forget()

        copy.add_done_callback(done)

    async def _finish(self, card: Card, storing: Storing, writing: asyncio.Task[None]) -> None:
        try:
            storing.end()
            await asyncio.shield(writing)
            if storing.failed is not None:
                raise storing.failed
            await self.publish(card, storing.partial)
        except SllmError as wrong:
            log.warning("%s has no copy on the SSD: %s", card.url, wrong)
            if isinstance(wrong, CheckpointCorrupt):  # What was stored came out of the pool.
                self._loader.forget(card.checkpoint)
            await storing.partial.drop()
        except BaseException:
            await _stop(storing, writing)
            raise

    async def publish(self, card: Card, partial: SsdPartial) -> None:
        """Make a complete partial the SSD's copy; raises what `SsdPartial.publish` does."""

        async def both() -> None:
            # Before it is visible, and whoever stops waiting: a copy whose id nobody knows would be of no use.
            if not card.model_id:
                await card.learn(await partial.identify())
            await partial.publish(card.model_id)
            self.on_stored()

        await to_the_end(self._writers.spawn(both(), "publish", on_failure=lambda _: None))

    @asynccontextmanager
    async def suppliers(self, card: Card) -> AsyncIterator[Suppliers]:
        stack, scope = AsyncExitStack(), TaskScope("mirrors")
        try:
            source = self._open_source(card.url)
            stack.push_async_callback(source.close)
            suppliers = Suppliers([Supplier(source, card.files)], self._clock, self._chance)
            # Bytes of several sources are put together only where digests tell of each chunk what it should be.
            for url in self._mirrors(card.model_id) if 0 < card.checkpoint.digest_bytes <= self.chunk_bytes else ():
                mirror = self._open_source(url)
                stack.push_async_callback(mirror.close)
                scope.spawn(_add_mirror(suppliers, mirror, card), "list")
            stack.push_async_callback(scope.close)
            yield suppliers
        finally:
            await to_the_end(self._writers.spawn(stack.aclose(), "close"))

    async def close(self) -> None:
        """End every load; what the SSD has of them can be gone on with."""
        self._closed = True
        await self._scope.close()
        await self._writers.close()


async def _add_mirror(suppliers: Suppliers, mirror: Source, card: Card) -> None:
    """Ask a mirror, too, if it has the very files; most have none of them."""
    try:
        files = {file.name: file for file in await mirror.files()}
    except SllmError as wrong:
        log.info("%s has no %s: %s", mirror.url, card.model_id, wrong)
        return
    sizes = {name: file.size_bytes for name, file in files.items()}
    if all(sizes.get(file.name) == file.size_bytes for file in card.weights):
        suppliers.add(Supplier(mirror, files))


def _both(arrived: Callable[[int], None], turn: Turn) -> Callable[[int], None]:
    def tell(size_bytes: int) -> None:
        turn.arrive(turn.arrived_bytes + size_bytes)
        arrived(size_bytes)

    return tell


async def _stop(storing: Storing, writing: asyncio.Task[None]) -> None:
    """End the writing with the chunks that are being written, and leave the rest for another time."""
    storing.end(at_once=True)
    while not writing.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([writing])
    await storing.partial.pause()


def is_cancelled() -> bool:
    """Tell whether it is the caller itself that was cancelled, and not what it waits for."""
    current = asyncio.current_task()
    return current is not None and current.cancelling() > 0
