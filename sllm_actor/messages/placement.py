"""Choosing where a model starts: Router to Scheduler, and what ModelManagers report to it."""

from __future__ import annotations

import msgspec

from sllm_actor.domain import ModelName, NodeId, RequestId
from sllm_actor.messages.declare import message


@message("placement.ask")
class PlaceModel:
    """Ask for the node that can start an instance of `model` soonest.

    Answered by `Placement`, as soon as a slot is free, those of the lowest `priority` first, or by `RunsAlready` where
    an instance has come up meanwhile; fails with `NoCapacity`, `QueueFull` or, where no node has the memory beside what
    is pinned, at once with `ModelTooLarge`. The model takes so many `slots` of one node, a device each. Where only the
    nodes that hold its bytes can start it (a folder, which nobody else has), it is for `holders_only`. Who asks has
    `failed` to reach these instances. Not to be started is it on the nodes of `not_on`, and
    only on the node `only_on`, where that is not empty; nor does an instance elsewhere count.
    """

    request_id: RequestId
    model: ModelName
    fingerprint: str
    size_bytes: int
    host_bytes: int
    timeout_s: float
    slots: int = 1
    priority: int = 0
    holders_only: bool = False
    failed: tuple[str, ...] = ()
    not_on: tuple[NodeId, ...] = ()
    only_on: str = ""


@message("placement.hurry")
class HurryPlacement:
    """A request of a lower `priority` number, or one that has `failed` to reach these instances, too, has joined those
    that a waiting `PlaceModel` was asked for.

    Told; where nothing of that id waits, it changes nothing.
    """

    request_id: RequestId
    priority: int
    failed: tuple[str, ...] = ()


@message("placement.granted")
class Placement:
    """The right to start one instance on `node`, to be used within `lease_s`; `reason` is for people.

    `manager` is the actor to ask, at `address`, which is empty where no other node could be meant. `epoch` is the
    leader's, who gave it. Making room for it, by moving or ending what generated there, has taken `made_room_s`; its
    bytes have come without a device for `fetched_s`.
    """

    placement_id: str
    node: NodeId
    manager: str
    estimate_s: float
    lease_s: float
    reason: str
    address: str = ""
    epoch: int = 0
    made_room_s: float = 0.0
    fetched_s: float = 0.0


@message("placement.running")
class RunsAlready:
    """An instance that runs: nothing has to be started."""

    model: ModelName
    instance_id: str
    node: NodeId
    worker: str
    address: str


@message("placement.instance")
class InstanceView:
    """An instance as the Scheduler sees it; `worker` is its actor's name. One that is `leaving` takes no more requests,
    one that is `kept` makes no room for others. Its model is for `holders_only` as in `PlaceModel`.

    `idle_since_s`, by its node's own clock, is meaningful while `active` is 0.

    Of the requests that run on it: their prompts together, how long they have been generating together, the most urgent
    one's priority. Of its model: what it takes to load, seconds a generated token, and what recomputing takes, for a
    token and for a request; 0.0 until it was observed.
    """

    instance_id: str
    model: ModelName
    active: int
    idle_since_s: float
    host_bytes: int
    worker: str = ""
    slots: int = 1
    fingerprint: str = ""
    size_bytes: int = 0
    prompt_tokens: int = 0
    running_s: float = 0.0
    priority: int = 0
    token_s: float = 0.0
    resume_s_per_token: float = 0.0
    resume_s: float = 0.0
    leaving: bool = False
    kept: bool = False
    holders_only: bool = False


@message("placement.starting")
class StartingView:
    """A start that goes on, and what its instance will take: a leader may not have granted it itself."""

    placement_id: str
    model: ModelName
    host_bytes: int
    slots: int = 1


@message("placement.report")
class NodeReport:
    """What a ModelManager tells the Scheduler once it is up and after every change that `NodeChange` does not tell.

    `slots` and `host_pool_bytes` bound what may run at once; checkpoints that are pinned in host memory, by
    fingerprint, take their part of it whether they run or not, and their instances no more. `ended_placements` are
    the last placements whose start has succeeded or failed, of which `failed_placements` failed, and
    `starting` those under way;
    `host_fingerprints` the checkpoints in host memory, `ssd_fingerprints` those on its disks; bandwidths are observed
    ones. `disk_queues_s` says, by fingerprint, for which of these their disk is busy, and how long; `remote_queue_s` is
    for what comes from elsewhere. Other nodes find this one at `address`; it is a member of the cluster in `epoch`, and
    while it is `cordoned` nothing is started there. `told_s` is when this was told, by the node's own clock.
    Of all processes on its machine so many `core_threads` run or wait for a core, of late. Of the requests that came to
    it so many wait for a start of each model that is `awaited`, beside the one that the Scheduler was asked for.
    """

    node: NodeId
    manager: str
    slots: int
    host_pool_bytes: int
    instances: tuple[InstanceView, ...]
    pinned_host_bytes: dict[str, int]
    ended_placements: tuple[str, ...]
    starting: tuple[StartingView, ...]
    host_fingerprints: tuple[str, ...]
    ssd_fingerprints: tuple[str, ...]
    ssd_bytes_per_s: float
    disk_queues_s: dict[str, float]
    remote_bytes_per_s: float
    remote_queue_s: float
    failed_placements: tuple[str, ...] = ()
    address: str = ""
    epoch: int = 0
    cordoned: bool = False
    told_s: float = 0.0
    core_threads: float = 0.0
    awaited: dict[ModelName, int] = msgspec.field(default_factory=dict)


@message("placement.node_change")
class NodeChange:
    """Told to the Scheduler where only what `instances` work on, or who waits for a start, has changed since its node's
    last `NodeReport`, or the last of these. `told_s` is by the node's own clock. Of an instance that no report had
    nothing is learned; without `awaited` as many wait as was told before.
    """

    node: NodeId
    epoch: int
    told_s: float
    instances: tuple[InstanceView, ...] = ()
    awaited: dict[ModelName, int] | None = None


@message("placement.report_now")
class ReportNow:
    """Told to a ModelManager: tell the Scheduler how this node is."""


@message("placement.members")
class MembersChanged:
    """Told to the Scheduler: who is a member now, each in its epoch, and whose process has ended before its lease."""

    epochs: dict[NodeId, int]
    gone: tuple[NodeId, ...] = ()


@message("placement.nodes")
class ListNodes:
    """Answered by a tuple of the newest `NodeReport` of every node."""
