"""What operators ask of nodes: gateway to NodesDesk, which knows them all, and from there to the NodeKeeper of one."""

from __future__ import annotations

from sllm_actor.domain import NodeId
from sllm_actor.messages.declare import message


@message("operations.show")
class ShowNodes:
    """Answered by a tuple of `NodeShown`, by name."""


@message("operations.shown")
class NodeShown:
    """A member of the cluster; of one that is not `reported`, no more is known than that.

    `host_fingerprints` and `ssd_fingerprints` are the checkpoints that it has, `starting` the models that it starts.
    """

    node: NodeId
    address: str
    leads: bool
    cordoned: bool
    reported: bool
    epoch: int
    instances: int
    active: int
    slots: int
    host_pool_bytes: int
    checkpoints: int
    roles: tuple[str, ...]
    host_fingerprints: tuple[str, ...] = ()
    ssd_fingerprints: tuple[str, ...] = ()
    starting: tuple[str, ...] = ()


@message("operations.migrations")
class ListMigrations:
    """Answered by a tuple of `MigrationRecord`: the migrations that are under way between any nodes."""


@message("operations.cordon")
class Cordon:
    """Let nothing be started on `node` from now on, or let it again; it holds over restarts.

    Answered by None, or fails with `NodeNotFound`, `NodeUnreachable` or a `MetadataFailed`.
    """

    node: NodeId
    cordoned: bool


@message("operations.drain")
class Drain:
    """Cordon `node` and stop its instances, each once its answers are finished. Answered by how many those were.

    Fails as `Cordon` does.
    """

    node: NodeId


@message("operations.notice")
class Notice:
    """Say that `node` will be gone in so many `seconds`: it does as for `Drain`, for that time.

    Answered by `NoticeTaken`. Fails as `Cordon` does.
    """

    node: NodeId
    seconds: float


@message("operations.notice_taken")
class NoticeTaken:
    """So many answers went on elsewhere, so many instances have stopped; so many answers are `left` to run here."""

    moved: int
    stopped: int
    left: int


@message("operations.cordon_node")
class CordonNode:
    """As `Cordon`, said to the NodeKeeper of the node that is meant."""

    cordoned: bool


@message("operations.drain_node")
class DrainNode:
    """As `Drain`, said to the NodeKeeper of the node that is meant."""


@message("operations.notice_node")
class NoticeNode:
    """As `Notice`, said to the NodeKeeper of the node that is meant."""

    seconds: float


@message("operations.stop_everything")
class StopEverything:
    """Told to the own NodeKeeper when the node stops: as `DrainNode`, and nothing is cordoned. Answered by how many."""
