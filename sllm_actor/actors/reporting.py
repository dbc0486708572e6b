"""What a ModelManager tells the Scheduler of its node."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from math import inf

from sllm_actor.actors.instance import Instance
from sllm_actor.actors.manager_limits import Limits
from sllm_actor.actors.place import Place
from sllm_actor.actors.registry import Registry
from sllm_actor.actors.scheduler_way import SchedulerWay
from sllm_actor.actors.waiting_room import WaitingRoom
from sllm_actor.domain import ModelName
from sllm_actor.errors import SllmError
from sllm_actor.loader.tiers import Tiers
from sllm_actor.messages.placement import NodeChange, NodeReport, StartingView
from sllm_actor.policy.bandwidth import ObservedWay
from sllm_actor.runtime import ActorRef, Clock

log = logging.getLogger(__name__)

# A report may be lost with its connection: the last starts that ended are told again, for longer than a node without a
# way to the leader is a member.
ENDED_KEPT = 64
ENDED_TOLD_S = 120.0
# A report comes sooner where so many more, or fewer, threads want the cores than the Scheduler knows of.
LOOK_EVERY_S = 0.25
# Before a leader that has not heard of this node is told again, at first: a Scheduler begins soon after it is known.
FIRST_AGAIN_S = 0.02
TOLD_THREADS = 2.0
# What changes within so short a while is told together: requests come in bursts, and their answers end in them. For an
# idle instance a start may be waiting, and one of which more is asked than it takes needs help; how busy the others are
# can wait longer.
TOGETHER_S = 0.005
BUSY_S = 0.1


class Reporting:
    """Makes a node's reports, and owns the bandwidths that they tell of."""

    def __init__(
        self, place: Place, way: SchedulerWay, registry: Registry, tiers: Tiers, clock: Clock, limits: Limits,
        room: WaitingRoom,
    ) -> None:  # fmt: skip
        self._place = place
        self._way = way
        self._registry = registry
        self._tiers = tiers
        self._clock = clock
        self._room = room
        self._max_instances = limits.max_instances
        self._max_requests = limits.max_requests_per_instance
        self._every_s = limits.report_every_s
        self._manager = ""
        self._instances: Mapping[str, Instance] = {}
        self._starting: Mapping[str, ModelName] = {}
        # For whom the last report was made, in which epoch; and what it had: its instances, and what was pinned.
        self._told: tuple[ActorRef | None, int | None, frozenset[str]] = (None, None, frozenset())
        self._pinned: frozenset[str] = frozenset()
        # When that was, and how many threads wanted the cores then.
        self._told_s, self._told_threads = -inf, 0.0
        # What is to be told soon: these instances, and whether others wait for starts; and when.
        self._changed: dict[str, Instance] = {}
        self._awaited_changed = False
        self._soon: asyncio.TimerHandle | None = None
        self._soon_s = inf
        # The placements of the last starts that ended: when, and whether in failure.
        self._ended: dict[str, tuple[float, bool]] = {}
        self._ssd = ObservedWay(tiers.loader.paths().ssd)
        self._remote = ObservedWay(tiers.remote_path())

    def learn_bandwidth(self) -> None:
        """Take in what has been moved since the last time."""
        self._ssd.learn(self._tiers.loader.paths().ssd)
        self._remote.learn(self._tiers.remote_path())

    def tell_what_moved(self) -> None:
        """Tell all of it, and the bandwidths that have been seen since the last time."""
        self.learn_bandwidth()
        self.tell()

    def ended(self, placement_id: str, *, failed: bool) -> None:
        """Have the next reports tell how a start has ended."""
        self._ended[placement_id] = self._clock.monotonic_s(), failed
        if len(self._ended) > ENDED_KEPT:
            del self._ended[next(iter(self._ended))]

    def _ended_lately(self, now_s: float) -> dict[str, tuple[float, bool]]:
        while self._ended:
            oldest = next(iter(self._ended))
            if self._ended[oldest][0] > now_s - ENDED_TOLD_S:
                break
            del self._ended[oldest]
        return self._ended

    def begin(self, manager: str, instances: Mapping[str, Instance], starting: Mapping[str, ModelName]) -> None:
        """Tell of these from now on: whenever `tell` is called, and, where this node is alone, its own Scheduler."""
        self._manager, self._instances, self._starting = manager, instances, starting
        self._tiers.when_stored(self.tell)
        self._registry.on_found = self.tell
        self._room.on_awaited = self._tell_awaited
        if self._place.alone:
            self._way.listen(self.tell)
            self.tell()

    async def introduce(self) -> None:
        """Have each new leader hear of this node for certain: it is known of before its Scheduler has begun."""
        heard: ActorRef | None = None
        again_s = FIRST_AGAIN_S
        while True:
            leader = self._way.ref
            if leader is None or leader == heard:
                await self._way.changed()
                again_s = FIRST_AGAIN_S
            elif await self._is_heard_by(leader):
                heard = leader
            else:
                await self._way.changed(again_s)
                again_s = min(2 * again_s, self._every_s)

    async def _is_heard_by(self, leader: ActorRef) -> bool:
        report = self._report()
        if report is None:
            return False
        try:
            await leader.ask(report, timeout_s=self._every_s)
        except SllmError as error:
            log.debug("the scheduler of %s does not hear this node yet: %s", leader.address.node, error.message)
            return False
        return True

    async def keep_telling(self) -> None:
        """Tell it again and again, since what is told may be lost on its way to another node."""
        while True:
            left_s = self._told_s + self._every_s - self._clock.monotonic_s()
            if left_s <= 0.0 or abs(self._place.threads - self._told_threads) >= TOLD_THREADS:
                self.tell()
            else:
                looks_at_cores = self._place.core_threads is not None
                await self._clock.sleep(min(LOOK_EVERY_S, left_s) if looks_at_cores else left_s)

    def tell(self) -> None:
        """Tell all of it, unless this node is no member: then nothing may be placed here."""
        self._changed, self._awaited_changed = {}, False
        report = self._report()
        if report is not None:
            self._way.tell(report)

    def tell_of(self, instance: Instance) -> None:
        """Tell soon what one instance works on then, where the rest is as it was told last; else, all there is.

        Sooner where it is idle, or has more than it answers at once, and more than it was told to have.
        """
        self._changed[instance.instance_id] = instance
        is_too_much = instance.active > max(self._max_requests, instance.told_active)
        self._arm(TOGETHER_S if is_too_much or not instance.active else BUSY_S)

    def _tell_awaited(self) -> None:
        self._awaited_changed = True
        self._arm(TOGETHER_S)

    def _arm(self, in_s: float) -> None:
        at_s = self._clock.monotonic_s() + in_s
        if at_s < self._soon_s:
            if self._soon is not None:
                self._soon.cancel()
            self._soon_s, self._soon = at_s, asyncio.get_running_loop().call_later(in_s, self._tell_changed)

    def _tell_changed(self) -> None:
        self._soon_s, self._soon = inf, None
        changed, awaited_changed = self._changed, self._awaited_changed
        self._changed, self._awaited_changed = {}, False
        epoch, now_s = self._place.epoch, self._clock.monotonic_s()
        leader, told_in, known = self._told
        if epoch is None or not (changed or awaited_changed):
            return
        if leader != self._way.ref or told_in != epoch or changed.keys() - known:
            self.tell()
            return
        views = tuple([instance.view(self._pinned, now_s) for instance in changed.values()])
        awaited = self._room.awaited() if awaited_changed else None
        self._way.tell(NodeChange(node=self._place.node, epoch=epoch, told_s=now_s, instances=views, awaited=awaited))

    def close(self) -> None:
        """Tell nothing more of what has changed."""
        if self._soon is not None:
            self._soon.cancel()

    def _report(self) -> NodeReport | None:
        """Say all that there is to tell, for whoever leads; None while this node is no member."""
        now_s, epoch, threads = self._clock.monotonic_s(), self._place.epoch, self._place.threads
        self._told_s, self._told_threads = now_s, threads
        if epoch is None:
            return None
        self._told = self._way.ref, epoch, frozenset(self._instances)
        # Where nothing is ever started, nothing is held for it either.
        held = self._tiers.loader.fingerprints() if self._max_instances else []
        pinned = self._pinned = frozenset([fingerprint for fingerprint, is_pinned in held if is_pinned])
        ended = self._ended_lately(now_s)
        return NodeReport(
            node=self._place.node,
            manager=self._manager,
            slots=self._max_instances,
            host_pool_bytes=self._tiers.loader.pool_bytes if self._max_instances else 0,
            instances=tuple([one.view(pinned, now_s) for one in self._instances.values()]),
            pinned_host_bytes={
                model.fingerprint: model.host_bytes
                for model in (self._registry.models() if pinned else ())
                if model.fingerprint in pinned
            },
            ended_placements=tuple(ended),
            starting=self._under_way(),
            host_fingerprints=tuple([fingerprint for fingerprint, _ in held]),
            ssd_fingerprints=self._registry.on_disk.fingerprints() if self._max_instances else (),
            ssd_bytes_per_s=self._ssd.bytes_per_s,
            disk_queues_s=self._registry.on_disk.queues_s(),
            remote_bytes_per_s=self._remote.bytes_per_s,
            remote_queue_s=self._tiers.queues().remote_s,
            failed_placements=tuple([one for one, (_, failed) in ended.items() if failed]),
            address=self._place.address,
            epoch=epoch,
            cordoned=self._place.cordoned,
            told_s=now_s,
            core_threads=threads,
            awaited=self._room.awaited(),
        )

    def _under_way(self) -> tuple[StartingView, ...]:
        """Describe the starts; what was removed meanwhile takes its slot until its start has failed."""
        found = ((placement_id, name, self._registry.known(name)) for placement_id, name in self._starting.items())
        return tuple(
            StartingView(placement_id=placement_id, model=name, host_bytes=model.host_bytes if model else 0)
            for placement_id, name, model in found
        )
