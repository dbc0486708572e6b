"""Choose the node that can start a model soonest.

Pure functions over what nodes reported: no clock, no I/O.
Cost model: ServerlessLLM (OSDI '24), startup-time-optimized scheduling: `q + n / b`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sllm_actor.domain import NodeId
from sllm_actor.messages.placement import InstanceView, NodeReport, PlaceModel
from sllm_actor.units import format_bytes, format_seconds


class Start(NamedTuple):
    """A slot is free on the node: start there."""

    report: NodeReport
    estimate_s: float
    reason: str


class Evict(NamedTuple):
    """Every slot is taken, and this idle instance is the one to give up."""

    report: NodeReport
    victim: InstanceView
    reason: str


class Wait(NamedTuple):
    """There is no room, and none to be made, or an instance is being given up already."""

    reason: str


class Grant(NamedTuple):
    """A placement whose instance does not show in its node's report yet: its slot and memory are taken."""

    node: NodeId
    host_bytes: int
    expires_s: float


Decision = Start | Evict | Wait


def startup_s(report: NodeReport, fingerprint: str, size_bytes: int) -> float:
    """Estimate the seconds until a checkpoint of `size_bytes` is in the node's host memory.

    A CPU engine computes where the host pool lies, so bytes that are there need no further move.
    """
    if fingerprint in report.host_fingerprints:
        return 0.0
    queue_s, bytes_per_s, _ = _way(report, fingerprint)
    return queue_s + size_bytes / bytes_per_s if bytes_per_s > 0 else float("inf")


def _way(report: NodeReport, fingerprint: str) -> tuple[float, float, str]:
    """Give the queue and the bandwidth of the way from the highest tier below host memory, and what it is called."""
    if fingerprint in report.ssd_fingerprints:
        return report.disk_queues_s.get(fingerprint, 0.0), report.ssd_bytes_per_s, "reads"
    return report.remote_queue_s, report.remote_bytes_per_s, "fetches"


def decide(
    question: PlaceModel, reports: Sequence[NodeReport], grants: Iterable[Grant], leaving: frozenset[str]
) -> Decision:
    """Place one start.

    `leaving`: instances that are being given up already; their slots are awaited, not taken twice.
    """
    open_grants = list(grants)
    ranked = sorted(
        reports,
        key=lambda report: (startup_s(report, question.fingerprint, question.size_bytes), report.node),
    )
    for report in ranked:
        if _has_room(report, report.instances, open_grants, question):
            estimate_s = startup_s(report, question.fingerprint, question.size_bytes)
            return Start(report, estimate_s, _reason(report, question, estimate_s))
    for report in ranked:
        if not _could_have_room(report, open_grants, question):
            continue
        if any(instance.instance_id in leaving for instance in report.instances):
            return Wait(f"an instance is leaving {report.node}")
        idle = [instance for instance in report.instances if instance.active == 0]
        if idle:
            victim = min(idle, key=lambda instance: (instance.idle_since_s, instance.instance_id))
            return Evict(report, victim, f"{victim.model} has been idle the longest on {report.node}")
    return Wait("no node would have room, whichever idle instances were given up")


class Waiter(NamedTuple):
    """A start that waits for room, and since when."""

    question: PlaceModel
    since_s: float


def next_of(waiting: Sequence[Waiter], now_s: float) -> int:
    """Choose who of those that wait, in order of arrival, is served next; give its place in that order.

    The lowest priority is first, and of equals who came first. But one that has waited for half of its time goes
    before all who came later, so that however many urgent ones come, nobody waits in vain for a node that serves.
    """
    for place, (question, since_s) in enumerate(waiting):
        if now_s - since_s >= question.timeout_s / 2:
            return place
    return min(range(len(waiting)), key=lambda place: (waiting[place].question.priority, place))


def fits_nowhere(question: PlaceModel, reports: Sequence[NodeReport]) -> str:
    """Say why no node that has reported could start the model, whatever else left it; empty where one could."""
    if not reports or any(question.host_bytes <= _unpinned_bytes(report, question) for report in reports):
        return ""
    report = max(reports, key=lambda report: (report.host_pool_bytes, _unpinned_bytes(report, question)))
    needs, has = format_bytes(question.host_bytes), format_bytes(report.host_pool_bytes)
    missing = f"{question.model} needs {needs} of host memory, the pool has {has}"
    if question.host_bytes > report.host_pool_bytes:
        return f"{missing}: raise host_pool_bytes"
    pinned = format_bytes(report.host_pool_bytes - _unpinned_bytes(report, question))
    return f"{missing}, of which other models have {pinned} pinned: unpin one, or raise host_pool_bytes"


def _unpinned_bytes(report: NodeReport, question: PlaceModel) -> int:
    """Count the host memory that the pins of other checkpoints leave."""
    pinned_bytes = sum(report.pinned_host_bytes.values()) - report.pinned_host_bytes.get(question.fingerprint, 0)
    return report.host_pool_bytes - pinned_bytes


def _could_have_room(report: NodeReport, grants: Sequence[Grant], question: PlaceModel) -> bool:
    """Tell whether there would be room once every instance that does not generate had left."""
    kept = [instance for instance in report.instances if instance.active]
    return _has_room(report, kept, grants, question)


def _has_room(
    report: NodeReport, instances: Sequence[InstanceView], grants: Sequence[Grant], question: PlaceModel
) -> bool:
    """Tell whether a slot and the host memory for one more are free beside `instances`, open grants and pins."""
    here = [grant for grant in grants if grant.node == report.node]
    taken_bytes = sum(instance.host_bytes for instance in instances) + sum(grant.host_bytes for grant in here)
    fits = taken_bytes + question.host_bytes <= _unpinned_bytes(report, question)
    return fits and len(instances) + len(here) < report.slots


def _reason(report: NodeReport, question: PlaceModel, estimate_s: float) -> str:
    if question.fingerprint in report.host_fingerprints:
        return f"{report.node} holds it in host memory"
    queue_s, bytes_per_s, does = _way(report, question.fingerprint)
    return (
        f"{report.node} {does} {format_bytes(question.size_bytes)} at {bytes_per_s / 1e9:.2f} GB/s"
        f" after a queue of {format_seconds(queue_s)}: {format_seconds(estimate_s)}"
    )
