"""Choosing where a model starts: Router to Scheduler, and what ModelManagers report to it."""

from __future__ import annotations

from sllm_actor.domain import ModelName, NodeId, RequestId
from sllm_actor.messages.declare import message


@message("placement.ask")
class PlaceModel:
    """Ask for the node that can start an instance of `model` soonest.

    Answered by `Placement`, as soon as a slot is free, those of the lowest `priority` first; fails with `NoCapacity`,
    `QueueFull` or, where no node has the memory beside what is pinned, at once with `ModelTooLarge`. The model takes so
    many `slots` of one node, a device each.
    """

    request_id: RequestId
    model: ModelName
    fingerprint: str
    size_bytes: int
    host_bytes: int
    timeout_s: float
    slots: int = 1
    priority: int = 0


@message("placement.hurry")
class HurryPlacement:
    """A request of a lower `priority` number has joined those that a waiting `PlaceModel` was asked for.

    Told; where nothing of that id waits, it changes nothing.
    """

    request_id: RequestId
    priority: int


@message("placement.granted")
class Placement:
    """The right to start one instance on `node`, to be used within `lease_s`; `reason` is for people."""

    placement_id: str
    node: NodeId
    manager: str
    estimate_s: float
    lease_s: float
    reason: str


@message("placement.instance")
class InstanceView:
    """An instance as the Scheduler sees it. `idle_since_s`: monotonic, meaningful while `active` is 0.

    Of the requests that run on it: their prompts together, how long they have been generating together, the most urgent
    one's priority. Of its model: what it takes to load, seconds a generated token, and what recomputing takes, for a
    token and for a request; 0.0 until it was observed.
    """

    instance_id: str
    model: ModelName
    active: int
    idle_since_s: float
    host_bytes: int
    slots: int = 1
    fingerprint: str = ""
    size_bytes: int = 0
    prompt_tokens: int = 0
    running_s: float = 0.0
    priority: int = 0
    token_s: float = 0.0
    resume_s_per_token: float = 0.0
    resume_s: float = 0.0


@message("placement.report")
class NodeReport:
    """What a ModelManager tells the Scheduler once it is up and after every change.

    `slots` and `host_pool_bytes` bound what may run at once; checkpoints that are pinned in host memory, by
    fingerprint, take their part of it whether they run or not, and their instances no more. `ended_placements` are
    the placements whose start has succeeded or failed since the last report, of which `failed_placements` failed, and
    `starting_placements` those under way;
    `host_fingerprints` the checkpoints in host memory, `ssd_fingerprints` those on its disks; bandwidths are observed
    ones. `disk_queues_s` says, by fingerprint, for which of these their disk is busy, and how long; `remote_queue_s` is
    for what comes from elsewhere.
    """

    node: NodeId
    manager: str
    slots: int
    host_pool_bytes: int
    instances: tuple[InstanceView, ...]
    pinned_host_bytes: dict[str, int]
    ended_placements: tuple[str, ...]
    starting_placements: tuple[str, ...]
    host_fingerprints: tuple[str, ...]
    ssd_fingerprints: tuple[str, ...]
    ssd_bytes_per_s: float
    disk_queues_s: dict[str, float]
    remote_bytes_per_s: float
    remote_queue_s: float
    failed_placements: tuple[str, ...] = ()


@message("placement.nodes")
class ListNodes:
    """Answered by a tuple of the newest `NodeReport` of every node."""
