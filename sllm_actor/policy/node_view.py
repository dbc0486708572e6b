"""One node as the Scheduler sees it: its newest report, and what of it is free, could be given up, or is busy. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from sllm_actor.domain import ModelName, NodeId
from sllm_actor.messages.placement import InstanceView, NodeReport, PlaceModel
from sllm_actor.policy.bandwidth import Bandwidths
from sllm_actor.policy.estimator import beside


class Grant(NamedTuple):
    """A placement whose instance does not show in its node's report yet: its slots and memory are taken."""

    node: NodeId
    host_bytes: int
    expires_s: float
    slots: int = 1


class Room(NamedTuple):
    """Slots and host memory."""

    slots: int
    host_bytes: int


class Ways(NamedTuple):
    """What all nodes have seen of their disks, and of what they fetch."""

    ssd: Bandwidths
    remote: Bandwidths


class Counted(NamedTuple):
    """What a node's report comes to beside the grants there and the marks of its instances.

    What neither instances nor grants have is `free`; what has nothing to finish and leaves is so in a moment
    (`leaving_room`). Of the instances that stay the idle ones may be given up, the longest idle first. `at_work`
    engines compute or come up, and a start would come up `beside` so many.
    """

    free: Room
    leaving_room: Room
    idle_room: Room
    busy: tuple[InstanceView, ...]
    idle: tuple[InstanceView, ...]
    at_work: int
    beside: int


class NodeView:
    """One node: its newest report, the grants there, and which of its instances leave or are held.

    What they come to is counted when somebody asks: of many reports few are looked at before the next.
    """

    __slots__ = (
        "_counted", "_grants", "_held", "_leaving", "_ways", "active", "expected", "on_host", "on_ssd", "pinned_bytes",
        "report",
    )  # fmt: skip

    def __init__(
        self, report: NodeReport, ways: Ways, grants: Iterable[Grant], leaving: Collection[str], held: Collection[str],
        expected: Mapping[str, int], before: NodeView | None = None,
    ) -> None:  # fmt: skip
        self.report = report
        self._ways = ways
        self.expected = expected
        self.on_host: frozenset[str]
        self.on_ssd: frozenset[str]
        self.on_host, self.on_ssd = _checkpoints(report, expected, before)
        # How many requests run of each model that has instances.
        self.active = _active(report)
        self.pinned_bytes = sum(report.pinned_host_bytes.values())
        self.count_beside(grants, leaving, held)

    def count_beside(self, grants: Iterable[Grant], leaving: Collection[str], held: Collection[str] = ()) -> None:
        """Count beside these from now on. They may change until this is called anew."""
        self._grants, self._leaving, self._held = grants, leaving, held
        self._counted: Counted | None = None

    def hear_of_change(self, report: NodeReport) -> None:
        """Take in a report that differs from the last one only in what instances work on, and in who waits."""
        self.report, self.active = report, _active(report)
        self._counted = None

    def _count(self) -> Counted:
        report, starting = self.report, 0
        free_slots, free_bytes = report.slots, report.host_pool_bytes - self.pinned_bytes
        for grant in self._grants:
            # What is fetched before it has a slot computes nothing.
            starting += bool(grant.slots)
            free_slots -= grant.slots
            free_bytes -= grant.host_bytes
        going, busy, idle = list[InstanceView](), list[InstanceView](), list[InstanceView]()
        for one in report.instances:
            free_slots -= one.slots
            free_bytes -= one.host_bytes
            if self._goes(one):
                # Whatever leaves because somebody was granted its room is counted against that grant.
                if not one.active or one.instance_id in self._leaving:
                    going.append(one)
            elif one.active:
                busy.append(one)
            elif not one.kept and one.instance_id not in self._held:
                idle.append(one)
        idle.sort(key=lambda one: (one.idle_since_s, one.instance_id))
        # Engines that compute or come up: who starts beside them shares the node's cores.
        at_work = len(busy) + starting
        counted = self._counted = Counted(
            Room(free_slots, free_bytes), _room_of(going), _room_of(idle), tuple(busy), tuple(idle), at_work,
            beside(at_work, report.core_threads),
        )  # fmt: skip
        return counted

    def _goes(self, instance: InstanceView) -> bool:
        return instance.leaving or instance.instance_id in self._leaving

    def staying(self, model: ModelName) -> list[InstanceView]:
        """List the instances of a model that do not leave."""
        return [one for one in self.report.instances if one.model == model and not self._goes(one)]

    @property
    def counted(self) -> Counted:
        """What all of it comes to."""
        return self._counted or self._count()

    @property
    def ssd_bytes_per_s(self) -> float:
        """How fast its disk has been seen to be, or else the disks of others."""
        return self.report.ssd_bytes_per_s or self._ways.ssd.usual

    @property
    def remote_bytes_per_s(self) -> float:
        """How fast it has been seen to fetch, or else others."""
        return self.report.remote_bytes_per_s or self._ways.remote.usual

    def holds(self, fingerprint: str) -> bool:
        """Tell whether the node has a checkpoint in host memory or on its disk."""
        return fingerprint in self.on_host or fingerprint in self.on_ssd

    def unpinned_bytes(self, fingerprint: str) -> int:
        """Count the host memory that the pins of other checkpoints leave."""
        own_bytes = self.report.pinned_host_bytes.get(fingerprint, 0)
        return self.report.host_pool_bytes - self.pinned_bytes + own_bytes

    def missing(self, question: PlaceModel) -> Room:
        """Tell what is not free yet of what a model needs; nothing is missing where neither is above 0."""
        free, fingerprint = self.counted.free, question.fingerprint
        own_bytes = self.report.pinned_host_bytes.get(fingerprint, 0) + self.expected.get(fingerprint, 0)
        return Room(question.slots - free.slots, question.host_bytes - free.host_bytes - own_bytes)


def _checkpoints(
    report: NodeReport, expected: Mapping[str, int], before: NodeView | None
) -> tuple[frozenset[str], frozenset[str]]:
    """Give what a node has in host memory, or soon, and on the disk: the same sets as before where that is the same."""
    host, ssd = report.host_fingerprints, report.ssd_fingerprints
    if before is None:
        return frozenset((*host, *expected)), frozenset(ssd)
    same_host = host == before.report.host_fingerprints and expected == before.expected
    return (
        before.on_host if same_host else frozenset((*host, *expected)),
        before.on_ssd if ssd == before.report.ssd_fingerprints else frozenset(ssd),
    )


def _active(report: NodeReport) -> dict[ModelName, int]:
    active: dict[ModelName, int] = {}
    for one in report.instances:
        active[one.model] = active.get(one.model, 0) + one.active
    return active


def _room_of(instances: Iterable[InstanceView]) -> Room:
    slots = host_bytes = 0
    for instance in instances:
        slots += instance.slots
        host_bytes += instance.host_bytes
    return Room(slots, host_bytes)
