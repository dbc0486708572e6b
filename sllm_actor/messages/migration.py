"""Moving a running request to another instance: by its tokens, which the other engine computes again.

Gateway to MigrationCoordinator, MigrationCoordinator to the source's InferenceWorker, that to the destination's.
"""

from __future__ import annotations

from sllm_actor.domain import ModelName, NodeId, RequestId
from sllm_actor.messages.declare import message
from sllm_actor.messages.explanation import MovedAnswer
from sllm_actor.messages.generation import Generate
from sllm_actor.messages.placement import Placement, RunsAlready


@message("migration.ask")
class MigrateRequest:
    """Move a running request to the node `to`, or, where that is empty, to where its model can run soonest.

    Answered by `HandedOver`; fails with `RequestNotFound`, `NodeNotFound`, `AlreadyThere`, or with the typed error of
    whatever went wrong: then it goes on where it is.
    """

    request_id: RequestId
    to: NodeId


@message("migration.out")
class MigrateOut:
    """Told to the worker that has a request: hand it over to this instance, generating until that has caught up.

    Answered by `HandedOver`, also where somebody else has it moved to that node; fails with `RequestNotFound`, with
    `Conflict` where it is being moved to another one already, with `MigrationFailed`, or, where the destination is to
    blame, `DestinationFailed`: then it goes on where it is.
    """

    request_id: RequestId
    migration_id: str
    instance_id: str
    model: ModelName
    node: NodeId
    worker: str
    address: str


@message("migration.handed_over")
class HandedOver:
    """The destination has it: after so many rounds, in which so many tokens, prompt included, and bytes were moved.

    For `recomputed_s` it was busy with keys and values that the source had computed already, beside what else it did.
    Who waited for a move that somebody else had asked for is told of no rounds, tokens and bytes.
    """

    node: NodeId
    instance_id: str
    rounds: int
    tokens: int
    bytes_moved: int
    recomputed_s: float


@message("migration.prepare")
class Prepare:
    """Compute the keys and values of a request that is to come, and hold them as long as the stream of this is open.

    Answered by a stream of `Prepared`: the first when they are computed, one more behind each `ExtendPrepared`. Fails
    with `Draining`, with `NoCapacity` where no slot is free, or with the typed error of whatever went wrong.
    """

    migration_id: str
    request: Generate


@message("migration.prepared")
class Prepared:
    """Of so many tokens, prompt included, all is computed but for the last."""

    known_tokens: int


@message("migration.extend")
class ExtendPrepared:
    """These tokens, packed like the others, were generated meanwhile. With `last` none come: it is handed over.

    What was handed over is held until its Router asks for it, with all its tokens, or for a bounded time. Fails with
    `MigrationFailed` where nothing is prepared under this id.
    """

    migration_id: str
    token_ids: bytes
    last: bool


@message("migration.list_live")
class ListLive:
    """Answered by a tuple of a worker's `LiveRequest`: what generates there, or waits to."""


@message("migration.live")
class LiveRequest:
    """A request that could be moved; `served` is the model whose instances answer it.

    One that `waits` for a slot has nothing to move yet.
    """

    request_id: RequestId
    model: ModelName
    served: ModelName
    priority: int
    waits: bool = False


@message("migration.hold_slots")
class HoldSlots:
    """Let none of a worker's requests begin to generate as long as the stream of this is open; one True says so."""


@message("migration.turn_away")
class TurnAway:
    """Let a worker's requests that wait for a slot fail with `Draining`: their Routers ask another instance."""


@message("migration.move_away")
class MoveAway:
    """Move all requests of an instance of this node to other nodes. Answered by how many were; the others end there."""

    worker: str
    instance_id: str


@message("migration.move_instance")
class MoveInstance:
    """Have an instance of this node go on elsewhere with all its answers, and then stop: others want its place.

    It goes `to` an instance that runs, or to one that is started under a placement. Answered by `InstanceMoved`; fails
    with `Conflict` where it is being moved already, or with the typed error of whatever went wrong: it goes on here.
    """

    instance_id: str
    worker: str
    model: ModelName
    to: Placement | RunsAlready


@message("migration.instance_moved")
class InstanceMoved:
    """The instance has stopped, and these answers of it go on elsewhere."""

    answers: tuple[MovedAnswer, ...]
