"""A node's tiers on virtual time: bytes take the time that a disk or a source needs for them, one load after the other.

It stands where `Tiers` does and has what actors ask of that; there are no bytes. Each lease is counted, so that one
that nobody ends is seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from math import inf
from pathlib import Path
from typing import Any

from sllm_actor.checkpoint.folder import Checkpoint
from sllm_actor.errors import CheckpointInvalid, NoCapacity
from sllm_actor.loader.cards import Card
from sllm_actor.loader.holder import LOAD, Holder
from sllm_actor.loader.lease import HostLease, LoadReport, Resident
from sllm_actor.loader.load_queue import LoadQueue
from sllm_actor.loader.loads import OnProgress
from sllm_actor.loader.mapping import HostFile
from sllm_actor.loader.mover import PathFacts, Paths
from sllm_actor.loader.order import OnPlaced
from sllm_actor.loader.tiers import FIRST_REMOTE_BYTES_PER_S, FIRST_SSD_BYTES_PER_S, Queues
from sllm_actor.runtime import Clock

# What has arrived is told so often within one load.
PARTS = 4


class SimulatedCard(Card):
    """The description of a checkpoint whose bytes nobody looks at."""

    def __init__(self, name: str, size_bytes: int) -> None:
        self.checkpoint = Checkpoint(
            path=folder_of(name),
            files=(),
            config={},
            size_bytes=size_bytes,
            fingerprint=f"fingerprint of {name}",
            dtype="float16",
            architectures=("OPTForCausalLM",),
            identity=name,
        )

    @property
    def key(self) -> str:
        return self.checkpoint.identity

    @property
    def url(self) -> str:
        return f"simulated://{self.checkpoint.identity}"

    @property
    def model_id(self) -> str:
        return self.checkpoint.identity

    async def is_whole(self) -> bool:
        return True


def folder_of(name: str) -> Path:
    """Give where a model's card lies, on every node."""
    return Path("/models") / name


class Way:
    """One disk or one network: a load at a time. How fast it is, is expected of it once it was seen to be."""

    def __init__(self, bytes_per_s: float, first_bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.queue = LoadQueue(1, lambda _: self.facts().bytes_per_s or first_bytes_per_s)
        self.moved_bytes = 0
        self.busy_s = 0.0

    def facts(self) -> PathFacts:
        """Tell what has gone this way."""
        return PathFacts(self.moved_bytes, self.busy_s)


class _Held:
    """A checkpoint in host memory."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.holders: list[Holder] = []
        self.last_used_s = 0.0


class SimulatedPool:
    """Stands where the `Loader` does: host memory of one node, in bytes."""

    def __init__(self, pool_bytes: int, ssd: Way, clock: Clock, *, keeps: bool) -> None:
        self.pool_bytes = pool_bytes
        self._keeps = keeps
        self.held: dict[str, _Held] = {}
        self._ssd = ssd
        self._clock = clock
        self._reserved_bytes = 0

    @property
    def free_bytes(self) -> int:
        used_bytes = sum(held.checkpoint.size_bytes for held in self.held.values())
        return self.pool_bytes - used_bytes - self._reserved_bytes

    @property
    def is_idle(self) -> bool:
        """Whether nothing is leased and nothing is on its way."""
        return not self._reserved_bytes and not any(held.holders for held in self.held.values())

    def paths(self) -> Paths:
        none = PathFacts(0, 0.0)
        return Paths(page_cache=none, ssd=self._ssd.facts(), device=none)

    def residents(self) -> list[Resident]:
        return [
            Resident(
                fingerprint=held.checkpoint.fingerprint,
                path=str(held.checkpoint.path),
                size_bytes=held.checkpoint.size_bytes,
                holders=tuple(held.holders),
                pinned=False,
                last_used_s=held.last_used_s,
            )
            for held in self.held.values()
        ]

    def fingerprints(self) -> list[tuple[str, bool]]:
        return [(held.checkpoint.fingerprint, False) for held in self.held.values()]

    def lease(self, checkpoint: Checkpoint, report: LoadReport) -> HostLease:
        """Lease what is here."""
        held, holder = self.held[checkpoint.identity], Holder(LOAD, self._clock.monotonic_s())
        held.holders.append(holder)

        def give_back() -> None:
            held.holders.remove(holder)
            held.last_used_s = self._clock.monotonic_s()
            if not self._keeps and not held.holders:
                self.held.pop(checkpoint.identity, None)

        return HostLease((), report, give_back, holder)

    def reserve(self, size_bytes: int) -> None:
        """Make room, of what nobody has leased the longest unused first.

        Raises:
            NoCapacity: there is not enough.
        """
        idle = sorted((one for one in self.held.values() if not one.holders), key=lambda one: one.last_used_s)
        while self.free_bytes < size_bytes and idle:
            del self.held[idle.pop(0).checkpoint.identity]
        if self.free_bytes < size_bytes:
            raise NoCapacity(f"{size_bytes} bytes of host memory are not free", retry_after_s=1.0)
        self._reserved_bytes += size_bytes

    def give_up(self, size_bytes: int) -> None:
        """Give reserved room back."""
        self._reserved_bytes -= size_bytes

    def hold(self, checkpoint: Checkpoint) -> None:
        """Have reserved room be a checkpoint's."""
        self._reserved_bytes -= checkpoint.size_bytes
        self.held[checkpoint.identity] = _Held(checkpoint)


class _Ssd:
    """What the registry asks of the SSD tier."""

    def __init__(self, quota_bytes: float) -> None:
        self.given_up: tuple[()] = ()
        self.quota_bytes = 0
        self.revision = 0
        # What it has, the longest unused first.
        self.stored: dict[str, int] = {}
        self._most_bytes = quota_bytes

    def store(self, model_id: str, size_bytes: int) -> None:
        """Have a model, in place of the longest unused ones where there is no room; use one that it has."""
        known = self.stored.pop(model_id, None) is not None
        while self.stored and sum(self.stored.values()) + size_bytes > self._most_bytes:
            del self.stored[next(iter(self.stored))]
            self.revision += 1
        if size_bytes <= self._most_bytes:
            self.stored[model_id] = size_bytes
            self.revision += not known

    def entries(self) -> tuple[()]:
        return ()

    def whole(self) -> tuple[Collection[str], int]:
        return self.stored, self.revision


class SimulatedTiers:
    """The tiers of one node; `stored` names the models whose bytes its SSD has."""

    def __init__(
        self,
        cards: Mapping[str, SimulatedCard],
        stored: Iterable[str],
        clock: Clock,
        *,
        pool_bytes: int,
        ssd_bytes_per_s: float,
        remote_bytes_per_s: float,
        ssd_quota_bytes: float = inf,
        keeps_host: bool = True,
    ) -> None:
        self._cards = cards
        self._clock = clock
        self._local = Way(ssd_bytes_per_s, FIRST_SSD_BYTES_PER_S)
        self._remote = Way(remote_bytes_per_s, FIRST_REMOTE_BYTES_PER_S)
        self._loading: dict[str, asyncio.Lock] = {}
        self._on_stored: Callable[[], None] = lambda: None
        self.loader = SimulatedPool(pool_bytes, self._local, clock, keeps=keeps_host)
        self.ssd = _Ssd(ssd_quota_bytes)
        for name in stored:
            self.ssd.store(name, self._cards[name].checkpoint.size_bytes)

    async def recover(self) -> None:
        """Nothing is left of a process that was killed."""

    async def keep_cards(self, is_wanted: Callable[[str], bool]) -> None:
        """Cards take no room."""

    async def card(self, key: str) -> Card:
        if key not in self._cards:
            raise CheckpointInvalid(f"there is no card {key}")
        return self._cards[key]

    def card_folder(self, key: str) -> Path:
        return self._cards[key].checkpoint.path

    def is_on_ssd(self, card: Card) -> bool:
        return card.model_id in self.ssd.stored

    def comes_from_afar(self, wanted: Card) -> bool:
        return not self.is_on_ssd(wanted) and wanted.model_id not in self.loader.held

    def has_disk_queue(self) -> bool:
        return bool(self._local.queue.ways)

    def disk_queue_s(self, wanted: Card) -> float:
        return self._local.queue.remaining_s()

    def arriving(self, card: Card) -> tuple[int, int] | None:
        return None

    def when_stored(self, tell: Callable[[], None]) -> None:
        self._on_stored = tell

    def remote_path(self) -> PathFacts:
        return self._remote.facts()

    def queues(self) -> Queues:
        return Queues(self._remote.queue.remaining_s(), {})

    async def lease(
        self,
        wanted: Card,
        *,
        on_placed: OnPlaced | None = None,
        on_progress: OnProgress | None = None,
        **_: Any,
    ) -> HostLease:
        """Have a checkpoint in host memory; who wants it while it comes waits for the same bytes.

        Raises:
            NoCapacity: there is no room for it.
        """
        checkpoint = wanted.checkpoint
        async with self._loading.setdefault(wanted.key, asyncio.Lock()):
            begin_s, size_bytes = self._clock.monotonic_s(), checkpoint.size_bytes
            from_afar, resident = self.comes_from_afar(wanted), wanted.key in self.loader.held
            if not resident:
                self.loader.reserve(size_bytes)
                try:
                    _tell_placed(wanted, on_placed)
                    await self._move(self._remote if from_afar else self._local, size_bytes, on_progress)
                except BaseException:
                    self.loader.give_up(size_bytes)
                    raise
                self.loader.hold(checkpoint)
            else:
                _tell_placed(wanted, on_placed)
            report = LoadReport(
                pool_bytes=size_bytes if resident else 0,
                ssd_bytes=0 if resident or from_afar else size_bytes,
                remote_bytes=size_bytes if from_afar else 0,
                total_bytes=size_bytes,
                duration_s=self._clock.monotonic_s() - begin_s,
            )
            if from_afar:
                self.ssd.store(wanted.model_id, size_bytes)
                self._on_stored()
            elif not resident:
                self.ssd.store(wanted.model_id, size_bytes)
            return self.loader.lease(checkpoint, report)

    async def _move(self, way: Way, size_bytes: int, on_progress: OnProgress | None) -> None:
        async with way.queue.turn(size_bytes) as turn:
            for part in range(1, PARTS + 1):
                duration_s = size_bytes / PARTS / way.bytes_per_s
                await self._clock.sleep(duration_s)
                way.moved_bytes += size_bytes // PARTS
                way.busy_s += duration_s
                turn.arrive(part * size_bytes // PARTS)
                if on_progress is not None:
                    on_progress(part * size_bytes // PARTS, size_bytes)


def _tell_placed(wanted: Card, on_placed: OnPlaced | None) -> None:
    if on_placed is not None:
        on_placed((HostFile("model.safetensors", wanted.checkpoint.size_bytes),))
