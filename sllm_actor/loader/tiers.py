"""Where a checkpoint's bytes are, from the device's side: host memory, the SSD, or a source; and the way up.

One truth for the node: what is asked for is taken from the highest tier that holds it, and what the tiers below have
to give of it flows up. A plain folder has one tier below host memory, its own disk.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, aclosing, nullcontext
from functools import partial
from pathlib import Path

import msgspec

from sllm_actor.checkpoint.folder import Checkpoint
from sllm_actor.errors import CheckpointInvalid, NoCapacity, ReadFailed, SllmError
from sllm_actor.loader.cards import Card, Cards
from sllm_actor.loader.lease import DeviceTarget, HostLease
from sllm_actor.loader.load_queue import LoadQueue
from sllm_actor.loader.loader import Loader
from sllm_actor.loader.loads import OnProgress
from sllm_actor.loader.meter import Meter
from sllm_actor.loader.mover import PathFacts
from sllm_actor.loader.order import OnPlaced, Order, check_targets
from sllm_actor.loader.pulls import Pulls
from sllm_actor.loader.remote_loads import Mirrors, OpenSource, RemoteLoads
from sllm_actor.loader.ssd_tier import SsdTier
from sllm_actor.runtime.clock import Clock
from sllm_actor.runtime.progress import followed
from sllm_actor.runtime.threads import on_thread
from sllm_actor.units import MIB

log = logging.getLogger(__name__)

# What a way is believed to give before the first load has told.
FIRST_SSD_BYTES_PER_S = 1e9
FIRST_REMOTE_BYTES_PER_S = 1e8
FIRST_DEVICE_BYTES_PER_S = 1e10
# At once: on each disk and to each device, and from sources.
LOCAL_LOADS, REMOTE_LOADS = 1, 4
# What pulls take beside the pool.
PULL_MEMORY_BYTES = 128 * MIB


_DISK, _DEVICE = "disk ", "device "


def _disk_way(disk: int) -> str:
    return f"{_DISK}{os.major(disk)}:{os.minor(disk)}"


def _device_way(ordinal: int) -> str:
    return f"{_DEVICE}{ordinal}"


class Queues(msgspec.Struct, frozen=True):
    """When what is under way now will be through, in seconds: from sources, and by disk and device of this node.

    `local_s` has those that are busy: `disk MAJOR:MINOR` and `device NUMBER`.
    """

    remote_s: float
    local_s: dict[str, float]


class Tiers:
    """Leases checkpoints in host memory, wherever they are. Belongs to one event loop; owns none of its parts."""

    def __init__(
        self,
        loader: Loader,
        ssd: SsdTier,
        cards: Cards,
        open_source: OpenSource,
        clock: Clock,
        chance: Callable[[], float],
        pressing: Callable[[], AbstractContextManager[None]] = nullcontext,
        mirrors: Mirrors = lambda _: (),
        pull_memory_bytes: int = PULL_MEMORY_BYTES,
    ) -> None:
        self._pressing = pressing
        self.loader = loader
        self.ssd = ssd
        self._cards = cards
        self._open_source = open_source
        self._clock = clock
        self._chance = chance
        self._local_queue = LoadQueue(LOCAL_LOADS, self._local_bytes_per_s)
        self._disk_meters: dict[str, Meter] = {}
        self._ssd_disks: frozenset[int] = frozenset()  # Known once something was read from there.
        self._remote_queue = LoadQueue(
            REMOTE_LOADS, lambda _: self.remote_path().bytes_per_s or FIRST_REMOTE_BYTES_PER_S
        )
        self._remote = RemoteLoads(loader, ssd, open_source, self._remote_queue, clock, chance, mirrors, pressing)
        self._pulls = Pulls(self._remote, pull_memory_bytes, lambda: self.remote_path().bytes_per_s)
        self._remote.take_over = self._pulls.give_way

    async def describe(self, url: str) -> Card:
        """Fetch the card of what `url` names, unless it is here.

        Raises:
            SourceError, SourceInvalid, CheckpointInvalid, WriteFailed: as `Cards.make` does.
        """
        source = self._open_source(url)
        try:
            return await self._cards.make(source, self._clock, self._chance)
        finally:
            await source.close()

    async def card(self, key: str) -> Card:
        """Read a card that is here.

        Raises:
            CheckpointInvalid: it isn't, or can't be read.
        """
        return await self._cards.open(key)

    def card_folder(self, key: str) -> Path:
        """Give where this node has the card of that key, if it has it."""
        return self._cards.folder(key)

    async def keep_cards(self, is_wanted: Callable[[str], bool]) -> None:
        """Drop the cards that are not wanted; what the tiers have of their checkpoints stays until room is needed."""
        await self._cards.keep(is_wanted)

    async def recover(self) -> None:
        """Remove what a killed process has left of cards; before anything is described."""
        await self._cards.recover()

    def is_on_ssd(self, card: Card) -> bool:
        """Tell whether the SSD has a checkpoint whole."""
        return self.ssd.holds(card.model_id)

    def comes_from_afar(self, wanted: Checkpoint | Card) -> bool:
        """Tell whether no tier of this node has a checkpoint whole, so that its sources would be asked."""
        return isinstance(wanted, Card) and not self.is_on_ssd(wanted) and not self.loader.holds(wanted.checkpoint)

    async def lease(
        self,
        wanted: Checkpoint | Card,
        *,
        priority: int = 0,
        verify: bool = False,
        in_place: bool = False,
        on_placed: OnPlaced | None = None,
        on_progress: OnProgress | None = None,
    ) -> HostLease:
        """Have a checkpoint in host memory, and hold it until release.

        Room that is only kept until the SSD has its copy is waited for.

        Raises:
            SllmError: as `Loader.lease` and, for what is not on this node, as `RemoteLoads.lease` does.
        """
        order = Order(_checkpoint(wanted), {}, priority, verify, on_placed, on_progress)
        return await self._obtain(wanted, order, in_place=in_place)

    async def load_to_device(
        self,
        wanted: Checkpoint | Card,
        targets: Mapping[str, DeviceTarget],
        *,
        priority: int = 0,
        verify: bool = False,
        on_progress: OnProgress | None = None,
    ) -> HostLease:
        """Have files of a checkpoint, by name, in device memory: through the host pool, and to stay there, too.

        A chunk goes up as soon as it has arrived and been compared, wherever from. Where the pool has no room for the
        whole checkpoint, its bytes only go through: the lease then has no files. While it loads, and when it fails,
        the targets hold anything; once this has ended, they may be closed.

        Raises:
            InvalidInput: a target names no file of the checkpoint, or has no room for it.
            DeviceError: the device has no room, or refused or lost a copy; what the SSD has of the checkpoint stays.
            SllmError: as `lease` does.
        """
        checkpoint = _checkpoint(wanted)
        check_targets(checkpoint, targets)
        order = Order(checkpoint, targets, priority, verify, None, on_progress)
        return await self._obtain(wanted, order, in_place=False)

    async def _obtain(self, wanted: Checkpoint | Card, order: Order, *, in_place: bool) -> HostLease:
        while True:
            copies = self._remote.copies()
            try:
                found = await self._try(wanted, order, in_place=in_place)
            except NoCapacity:
                # One that has begun meanwhile keeps room, too.
                copies = copies or self._remote.copies()
                if not copies:
                    raise
                with self._pressing():
                    await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
            else:
                if found is not None:
                    return found

    async def _try(self, wanted: Checkpoint | Card, order: Order, *, in_place: bool) -> HostLease | None:
        """Take it from the highest tier that has it; None where that is another one by now."""
        if self.loader.holds(order.checkpoint):
            return await self._in_turn(order, frozenset(), in_place=False)

        async def read(found: Checkpoint) -> HostLease:
            return await self._in_turn(order._replace(checkpoint=found), found.disks, in_place=in_place)

        if not isinstance(wanted, Card):
            return await read(wanted)
        return await self._from_ssd(wanted, read) or await self._remote.lease(wanted, order)

    async def _in_turn(self, order: Order, disks: frozenset[int], *, in_place: bool) -> HostLease:
        """Load what is on these disks, or in host memory, when they and the devices that it is for are free."""
        ways = frozenset(map(_disk_way, disks)) | {_device_way(each.buffer.ordinal) for each in order.targets.values()}
        if not ways:
            return await self._up(order, in_place=in_place)
        size_bytes, told = order.checkpoint.size_bytes, order.on_progress
        waits = None if told is None else partial(told, 0, size_bytes)
        async with self._local_queue.turn(size_bytes, order.priority, waits, ways) as turn:

            def progress(arrived_bytes: int, total_bytes: int) -> None:
                turn.arrive(arrived_bytes)
                if told is not None:
                    told(arrived_bytes, total_bytes)

            meters = [self._disk_meters.setdefault(_disk_way(disk), Meter(self._clock)) for disk in disks]
            with ExitStack() as stack:
                for meter in meters:
                    stack.enter_context(meter.running())
                lease = await self._up(order._replace(on_progress=progress), in_place=in_place)
            for meter in meters:
                meter.add(lease.report.ssd_bytes + lease.report.page_cache_bytes)
            return lease

    async def _up(self, order: Order, *, in_place: bool) -> HostLease:
        """Load what is on a disk of this node, or in host memory."""
        if order.targets:
            return await self.loader.load_to_device(
                order.checkpoint,
                order.targets,
                priority=order.priority,
                verify=order.verify,
                on_progress=order.on_progress,
            )
        return await self.loader.lease(
            order.checkpoint,
            priority=order.priority,
            verify=order.verify,
            in_place=in_place,
            on_placed=order.on_placed,
            on_progress=order.on_progress,
        )

    async def _from_ssd(self, card: Card, read: Callable[[Checkpoint], Awaitable[HostLease]]) -> HostLease | None:
        """Load what the SSD has whole. A copy that can't be read, or is no longer what it was, is given up."""
        held = self.ssd.lease(card.model_id) if card.model_id else None
        if held is None:
            return None
        try:
            found = await on_thread(card.on_ssd, held.path)
            self._ssd_disks = found.disks
            lease = await read(found)
        except (ReadFailed, CheckpointInvalid) as wrong:
            held.release()
            log.warning("the copy of %s on the SSD is given up: %s", card.url, wrong)
            await self._give_up(card.model_id)
            return None
        except BaseException:
            held.release()
            raise
        if not lease.report.in_place_bytes:
            held.release()
            return lease

        def give_back() -> None:
            lease.release()
            held.release()

        return HostLease(lease.files, lease.report, give_back, held.holder)

    async def _give_up(self, model_id: str) -> None:
        try:
            await self.ssd.evict(model_id)
        except SllmError as wrong:
            log.warning("%s stays on the SSD for now: %s", model_id, wrong)

    async def pull(self, card: Card, on_progress: OnProgress | None = None) -> None:
        """Have a checkpoint on the SSD, whole and checked.

        Raises:
            SllmError: as `Pulls.pull` does.
        """
        await self._pulls.pull(card, on_progress)

    async def pulled(self, card: Card) -> AsyncGenerator[tuple[int, int], None]:
        """Pull, and give how much has arrived and of how much, in bytes, as that changes; the last is the whole."""
        size_bytes = card.checkpoint.size_bytes
        yield self._stored_bytes(card), size_bytes
        async with aclosing(followed(lambda told: self.pull(card, told))) as steps:
            async for step in steps:
                yield step or (size_bytes, size_bytes)

    def _stored_bytes(self, card: Card) -> int:
        """Count what the SSD has of a checkpoint that is not there whole."""
        identity = card.checkpoint.identity
        return next((entry.done_bytes for entry in self.ssd.entries() if entry.model_id == identity), 0)

    def arriving(self, card: Card) -> tuple[int, int] | None:
        """Tell how much of a checkpoint has arrived from its sources, and of how much, in bytes."""
        return self._remote.progress(card.checkpoint.identity)

    def when_stored(self, tell: Callable[[], None]) -> None:
        """Have `tell` called whenever the SSD has a checkpoint more."""
        self._remote.on_stored = tell

    def remote_path(self) -> PathFacts:
        """Tell what has come from sources so far, and in which time."""
        return self._remote.meter.facts()

    def queues(self) -> Queues:
        """Tell how long the queues are."""
        queue = self._local_queue
        return Queues(self._remote_queue.remaining_s(), {way: queue.remaining_s(way) for way in sorted(queue.ways)})

    def has_disk_queue(self) -> bool:
        """Tell whether any disk has something to read."""
        return bool(self._local_queue.ways)

    def disk_queue_s(self, wanted: Checkpoint | Card) -> float:
        """Tell when the disks will be free that this node's copy of a checkpoint lies on."""
        disks = self._ssd_disks if isinstance(wanted, Card) else wanted.disks
        # The SSD is taken to be where the cards are, until something was read from there.
        return max(self._local_queue.remaining_s(_disk_way(disk)) for disk in disks or _checkpoint(wanted).disks)

    def _local_bytes_per_s(self, way: str) -> float:
        paths, meter = self.loader.paths(), self._disk_meters.get(way)
        if way.startswith(_DEVICE):
            return paths.device.bytes_per_s or FIRST_DEVICE_BYTES_PER_S
        return (meter.facts().bytes_per_s if meter else 0.0) or paths.ssd.bytes_per_s or FIRST_SSD_BYTES_PER_S

    async def close(self) -> None:
        """End every load and pull from a source."""
        await self._pulls.close()
        await self._remote.close()


def _checkpoint(wanted: Checkpoint | Card) -> Checkpoint:
    return wanted.checkpoint if isinstance(wanted, Card) else wanted
