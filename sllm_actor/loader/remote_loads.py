"""Loads of checkpoints that are not on this node: one for all who want the same, and one copy for the SSD.

Who asks for a checkpoint while it is on its way joins; the last who leaves ends it, and what the SSD has of it stays.
A load takes over from a pull of the same checkpoint; the pull's callers then wait for the load's copy.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from sllm_actor.errors import Draining, SllmError, WriteFailed
from sllm_actor.loader.cards import Card
from sllm_actor.loader.fetch import Fetch, Storing
from sllm_actor.loader.lease import HostLease
from sllm_actor.loader.load_queue import LoadQueue, Turn
from sllm_actor.loader.loader import Loader
from sllm_actor.loader.loads import OnProgress
from sllm_actor.loader.mapping import HostFile
from sllm_actor.loader.order import OnPlaced
from sllm_actor.loader.pull import Pull
from sllm_actor.loader.reservation import Reservation
from sllm_actor.loader.ssd_partial import SsdPartial
from sllm_actor.loader.ssd_tier import SsdTier
from sllm_actor.loader.suppliers import Supplier, Suppliers
from sllm_actor.runtime.clock import Clock
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.sources.source import Source

log = logging.getLogger(__name__)

OpenSource = Callable[[str], Source]


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
        self.task: asyncio.Task[HostLease]

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
            tell(self.arrived_bytes, self.size_bytes)

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
    ) -> None:
        self._loader = loader
        self._ssd = ssd
        self._open_source = open_source
        self._queue = queue
        self._clock = clock
        self._chance = chance
        self._scope = TaskScope("remote-loads")
        self._writers = TaskScope("remote-loads/writers")
        self._running: dict[str, _Running] = {}
        self._pulls: dict[str, asyncio.Task[None]] = {}
        self._copies: dict[str, asyncio.Task[None]] = {}
        self.busy_s = 0.0
        self.remote_bytes = 0

    def progress(self, identity: str) -> tuple[int, int] | None:
        """Tell how many bytes of a checkpoint have arrived, and of how many; None where none is on its way."""
        running = self._running.get(identity)
        return None if running is None else (running.arrived_bytes, running.size_bytes)

    def copies(self) -> list[asyncio.Task[None]]:
        """List the copies that are being written to the SSD from the pool, which holds their bytes until then."""
        return list(self._copies.values())

    async def lease(
        self, card: Card, *, priority: int, on_placed: OnPlaced | None, on_progress: OnProgress | None
    ) -> HostLease:
        """Bring the checkpoint of `card` into the pool from its sources.

        Raises:
            SourceError, SourceInvalid, CheckpointCorrupt: no source gives it.
            ModelTooLarge, NoCapacity, Draining: as `Loader.lease` does.
        """
        while True:
            running = await self._join(card, priority)
            running.watch(on_placed, on_progress)
            running.waiters += 1
            try:
                lease = await asyncio.shield(running.task)
                mine = self._loader.lease_resident(card.checkpoint)
                if mine is not None:
                    return HostLease(mine.files, lease.report, mine.release)
            except asyncio.CancelledError:
                if running.task.cancelled() and not _is_cancelled():
                    raise Draining("the loader is closing") from None
                raise
            finally:
                running.waiters -= 1
                if not running.waiters:
                    _leave(running)

    async def _join(self, card: Card, priority: int) -> _Running:
        identity = card.checkpoint.identity
        while (running := self._running.get(identity)) is not None:
            if not running.abandoned:
                return running
            await asyncio.wait([running.task])
        running = self._running[identity] = _Running(card.checkpoint.size_bytes)
        work = self._load(card, running, priority)
        running.task = self._scope.spawn(work, f"load-{identity[:12]}", on_failure=lambda _: None)
        running.task.add_done_callback(lambda _: self._running.pop(identity, None))
        return running

    async def _load(self, card: Card, running: _Running, priority: int) -> HostLease:
        async with self._queue.turn(card.checkpoint.size_bytes, priority) as turn, self._suppliers(card) as suppliers:
            partial = await self._take_over(card)
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
                begun_s = self._clock.monotonic_s()
                lease = await fetch.run()
                self.busy_s += self._clock.monotonic_s() - begun_s
                self.remote_bytes += lease.report.remote_bytes
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

    async def _take_over(self, card: Card) -> SsdPartial | None:
        """Begin the SSD's copy, or go on with it; without one, where the SSD has no room for it."""
        identity = card.checkpoint.identity
        pull = self._pulls.get(identity)
        if pull is not None:
            pull.cancel()
            await asyncio.wait([pull])
        copy = self._copies.get(identity)
        if copy is not None:
            await asyncio.wait([copy])
        try:
            return await self._begin(card)
        except SllmError as wrong:
            log.warning("%s is loaded without a copy on the SSD: %s", card.url, wrong)
            return None

    async def _begin(self, card: Card) -> SsdPartial:
        return await self._ssd.begin(
            card.checkpoint.identity, card.weights, card.small_paths(), self._loader.chunk_bytes
        )

    def _keep(self, card: Card, storing: Storing, writing: asyncio.Task[None], reserved: Reservation) -> None:
        """Finish the SSD's copy from the pool, which holds the bytes until then."""
        held = self._loader.lease_resident(card.checkpoint)
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
            await self._publish(card, storing.partial)
        except SllmError as wrong:
            log.warning("%s has no copy on the SSD: %s", card.url, wrong)
            await storing.partial.drop()
        except BaseException:
            await _stop(storing, writing)
            raise

    async def _publish(self, card: Card, partial: SsdPartial) -> None:
        entry = await partial.publish(card.model_id or None)
        if entry.model_id != card.model_id:
            await card.learn(entry.model_id)

    async def pull(self, card: Card, on_progress: OnProgress | None) -> None:
        """Bring the checkpoint of `card` to the SSD and return when it is there, whole and checked.

        Raises:
            SourceError, SourceInvalid, CheckpointCorrupt: no source gives it.
            ModelTooLarge, NoCapacity, WriteFailed: the SSD does not take it.
        """
        identity = card.checkpoint.identity
        while not self._ssd.holds(card.model_id):
            running, copy = self._running.get(identity), self._copies.get(identity)
            if running is not None or copy is not None:
                # A load is on its way, and stores what it gets.
                if running is not None:
                    running.watch(None, on_progress)
                await asyncio.wait(([] if running is None else [running.task]) + ([] if copy is None else [copy]))
                if not self._ssd.holds(card.model_id) and identity not in self._copies:
                    raise WriteFailed(f"{card.url} was loaded, and could not be stored; the node's log says why")
                continue
            task = self._pulls.get(identity)
            if task is None:
                task = self._scope.spawn(self._pull(card, on_progress), "pull", on_failure=lambda _: None)
                self._pulls[identity] = task
                task.add_done_callback(lambda _: self._pulls.pop(identity, None))
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                if _is_cancelled():
                    task.cancel()
                    await asyncio.wait([task])
                    raise

    async def _pull(self, card: Card, on_progress: OnProgress | None) -> None:
        partial = await self._begin(card)
        total_bytes = card.checkpoint.size_bytes
        arrived_bytes = partial.done_bytes

        def arrived(size_bytes: int) -> None:
            nonlocal arrived_bytes
            arrived_bytes += size_bytes
            if on_progress is not None:
                on_progress(arrived_bytes, total_bytes)

        try:
            async with self._suppliers(card) as suppliers:
                await Pull(card.checkpoint, suppliers, partial, self._loader.chunk_bytes, arrived).run()
        except BaseException:
            await partial.pause()
            raise
        await self._publish(card, partial)

    @asynccontextmanager
    async def _suppliers(self, card: Card) -> AsyncIterator[Suppliers]:
        source = self._open_source(card.url)
        try:
            yield Suppliers([Supplier(source, card.files)], self._clock, self._chance)
        finally:
            await source.close()

    async def close(self) -> None:
        """End every load and every pull; what the SSD has of them can be gone on with."""
        await self._scope.close()
        await self._writers.close()


def _both(arrived: Callable[[int], None], turn: Turn) -> Callable[[int], None]:
    def tell(size_bytes: int) -> None:
        turn.arrived_bytes += size_bytes
        arrived(size_bytes)

    return tell


async def _stop(storing: Storing, writing: asyncio.Task[None]) -> None:
    """End the writing with the chunks that are being written, and leave the rest for another time."""
    storing.end(at_once=True)
    while not writing.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([writing])
    await storing.partial.pause()


def _is_cancelled() -> bool:
    current = asyncio.current_task()
    return current is not None and current.cancelling() > 0


def _leave(running: _Running) -> None:
    """End a load that nobody waits for, or give back what it has brought."""
    running.abandoned = True
    if not running.task.done():
        running.task.cancel()
    elif not running.task.cancelled() and running.task.exception() is None:
        running.task.result().release()
