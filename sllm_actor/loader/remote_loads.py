"""Loads of checkpoints that are not on this node: one for all who want the same, and one copy for the SSD.

Who asks for a checkpoint while it is on its way joins; the last who leaves ends it, and what the SSD has of it stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from sllm_actor.errors import CheckpointCorrupt, Draining, SllmError
from sllm_actor.loader.cards import Card
from sllm_actor.loader.fetch import Fetch, Storing
from sllm_actor.loader.holder import COPY
from sllm_actor.loader.lease import HostLease
from sllm_actor.loader.load_queue import LoadQueue, Turn
from sllm_actor.loader.loader import Loader
from sllm_actor.loader.loads import OnProgress
from sllm_actor.loader.mapping import HostFile
from sllm_actor.loader.meter import Meter
from sllm_actor.loader.order import OnPlaced
from sllm_actor.loader.reservation import Reservation
from sllm_actor.loader.ssd_partial import SsdPartial
from sllm_actor.loader.ssd_tier import SsdTier
from sllm_actor.loader.suppliers import Supplier, Suppliers
from sllm_actor.runtime.clock import Clock
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.runtime.threads import to_the_end
from sllm_actor.sources.source import Source

log = logging.getLogger(__name__)

OpenSource = Callable[[str], Source]
Mirrors = Callable[[str], Sequence[str]]
"""Where else a model may be, by its id: URLs of places that are asked beside its own source."""


class _Running:
    """A load under way, and those who wait for it."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.arrived_bytes = 0
        self.waiters = 0
        self.abandoned = False
        self.files: tuple[HostFile, ...] | None = None
        self.on_placed: list[OnPlaced] = []
        self.on_progress: list[OnProgress] = []
        self.task: asyncio.Task[HostLease | None]

    def placed(self, files: tuple[HostFile, ...]) -> None:
        self.files = files
        for tell in self.on_placed:
            try:
                tell(files)
            except SllmError as wrong:
                # The engine of one who waits has died, which he will hear of; the load is not his alone.
                log.warning("an engine can't be told where its weights will lie: %s", wrong)

    def arrived(self, size_bytes: int) -> None:
        self.arrived_bytes += size_bytes
        for tell in self.on_progress:
            # On its own turn of the loop, so that its failure is not ours.
            asyncio.get_running_loop().call_soon(tell, self.arrived_bytes, self.size_bytes)

    def forget(self, on_placed: OnPlaced | None, on_progress: OnProgress | None) -> None:
        if on_placed in self.on_placed:
            self.on_placed.remove(on_placed)
        if on_progress in self.on_progress:
            self.on_progress.remove(on_progress)

    def watch(self, on_placed: OnPlaced | None, on_progress: OnProgress | None) -> None:
        if on_placed is not None:
            self.on_placed.append(on_placed)
            if self.files is not None:
                on_placed(self.files)
        if on_progress is not None:
            self.on_progress.append(on_progress)


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
    ) -> None:
        self._mirrors = mirrors
        self._loader = loader
        self._ssd = ssd
        self._open_source = open_source
        self._queue = queue
        self._clock = clock
        self._chance = chance
        self._scope = TaskScope("remote-loads")
        self._writers = TaskScope("remote-loads/writers")
        self._running: dict[str, _Running] = {}
        self._closed = False
        # Ends a pull of an identity, for a load that goes on with what it has stored.
        self.take_over: Callable[[str], Awaitable[None]] | None = None
        # Called when the SSD has a checkpoint more.
        self.on_stored: Callable[[], None] = lambda: None
        self.meter = Meter(clock)
        self._copies: dict[str, asyncio.Task[None]] = {}

    def progress(self, identity: str) -> tuple[int, int] | None:
        """Tell how many bytes of a checkpoint have arrived, and of how many; None where none is on its way."""
        running = self._running.get(identity)
        return None if running is None else (running.arrived_bytes, running.size_bytes)

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
        running = self._running.get(card.checkpoint.identity)
        if running is not None and on_progress is not None:
            running.on_progress.append(on_progress)
        return (None if running is None else running.task), self._copies.get(card.checkpoint.identity)

    async def lease(
        self, card: Card, *, priority: int, on_placed: OnPlaced | None, on_progress: OnProgress | None
    ) -> HostLease | None:
        """Bring the checkpoint of `card` into the pool from its sources; None where a higher tier has it by now.

        Raises:
            SourceError, SourceInvalid, CheckpointCorrupt: no source gives it.
            ModelTooLarge, NoCapacity, Draining: as `Loader.lease` does.
        """
        running = await self._join(card, priority)
        running.waiters += 1
        try:
            running.watch(on_placed, on_progress)
            lease = await asyncio.shield(running.task)
            mine = self._loader.lease_resident(card.checkpoint) if lease is not None else None
            if lease is None or mine is None:
                return None
            return HostLease(mine.files, lease.report, mine.release, mine.holder)
        except asyncio.CancelledError:
            if running.task.cancelled() and not is_cancelled():
                raise Draining("the loader is closing") from None
            raise
        finally:
            running.forget(on_placed, on_progress)
            running.waiters -= 1
            if not running.waiters:
                _leave(running)

    async def _join(self, card: Card, priority: int) -> _Running:
        identity = card.checkpoint.identity
        if self._closed:
            raise Draining("the loader is closing")
        while (running := self._running.get(identity)) is not None:
            if not running.abandoned:
                return running
            await asyncio.wait([running.task])
        running = self._running[identity] = _Running(card.checkpoint.size_bytes)
        work = self._load(card, running, priority)
        running.task = self._scope.spawn(work, f"load-{identity[:12]}", on_failure=lambda _: None)
        running.task.add_done_callback(lambda _: self._running.pop(identity, None))
        return running

    async def _load(self, card: Card, running: _Running, priority: int) -> HostLease | None:
        lease: HostLease | None = None
        try:
            async with (
                self._queue.turn(card.checkpoint.size_bytes, priority, lambda: running.arrived(0)) as turn,
                self.suppliers(card) as suppliers,
            ):
                await self._end_others(card)
                # It has waited: a pull, or another name's load, may have been through.
                if not self.is_stored(card) and not self._loader.holds(card.checkpoint):
                    lease = await self._fetch(card, running, suppliers, turn)
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        return lease

    async def _fetch(self, card: Card, running: _Running, suppliers: Suppliers, turn: Turn) -> HostLease:
        partial = await self._take_partial(card)
        storing: Storing | None = None
        writing: asyncio.Task[None] | None = None
        try:
            reserved = await self._loader.reserve(card.checkpoint, {}, on_placed=running.placed)
        except BaseException:
            if partial is not None:
                await partial.pause()
            raise
        try:
            fetch = Fetch(card.checkpoint, reserved, suppliers, partial, self._clock, _both(running.arrived, turn))
            storing = fetch.storing
            if storing is not None:
                writing = self._writers.spawn(storing.run(), "store")
            with self.meter.running():
                lease = await fetch.run()
            self.meter.add(lease.report.remote_bytes)
        except BaseException:
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
        held = self._loader.lease_resident(card.checkpoint, COPY)
        assert held is not None, "it has just been committed"
        identity = card.checkpoint.identity
        copy = self._scope.spawn(self._finish(card, storing, writing), f"copy-{identity[:12]}")
        self._copies[identity] = copy

        def done(_: asyncio.Task[None]) -> None:
            del self._copies[identity]
            reserved.forget()
            held.release()

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
            # Bytes of several sources are put together only where digests tell what they should be.
            for url in self._mirrors(card.model_id) if card.checkpoint.digest_bytes else ():
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


def _leave(running: _Running) -> None:
    """End a load that nobody waits for, or give back what it has brought."""
    running.abandoned = True
    if not running.task.done():
        running.task.cancel()
    elif not running.task.cancelled() and running.task.exception() is None:
        lease = running.task.result()
        if lease is not None:
            lease.release()
