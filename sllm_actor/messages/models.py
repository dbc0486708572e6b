"""Registering models: gateway to ModelManager."""

from __future__ import annotations

from sllm_actor.domain import Backend, Model, ModelName, ModelState, Scaling, TierChoice
from sllm_actor.messages.declare import message


@message("models.register")
class RegisterModel:
    """Check the checkpoint that `source` names and register it as `name`.

    A name that is registered from the same folder is updated; from another one, only with `replace`. `base` is the
    registered model that an adapter is for; empty where the adapter's description names one.
    Answered by `Model`, or fails with a `CheckpointInvalid`, `SourceInvalid`, `BackendInvalid` or `ModelExists`.
    """

    name: ModelName
    source: str
    keep_alive_s: float | None
    replace: bool
    base: str = ""
    scaling: Scaling = Scaling()
    backend: Backend = Backend.SLLM


@message("models.remove")
class RemoveModel:
    """Stop the model's instances and forget it. Answered by `Model`, or fails with `ModelNotFound`."""

    name: ModelName


@message("models.get")
class GetModel:
    """Answered by `Model`, or fails with `ModelNotFound`."""

    name: ModelName


@message("models.list")
class ListModels:
    """Answered by a tuple of `ModelStatus`, by name."""


@message("models.status")
class ModelStatus:
    """A registration and where it stands now; `loading_bytes` is what has arrived of a load under way."""

    model: Model
    state: ModelState
    instances: int
    host_bytes: int
    loading_bytes: int


@message("models.pull")
class PullModel:
    """Bring a registered model to this node's SSD. Answered by a stream of `PullProgress` that ends when it is there.

    Fails with a `SourceError`, `CheckpointCorrupt`, `ModelTooLarge`, `NoCapacity` or `WriteFailed`.
    """

    name: ModelName


@message("models.pulled")
class PullProgress:
    """How much of a pull is on the SSD, in bytes."""

    done_bytes: int
    total_bytes: int


@message("models.pin")
class PinModel:
    """Keep a model in the tiers that have it: nothing makes room at its expense. Answered by `TiersChanged`.

    Here and in the next two, `name` may also be the id of what the SSD has of a model that is not registered. Fails
    with `ModelNotFound`, or with `Conflict` where no such tier has it.
    """

    name: ModelName
    tier: TierChoice


@message("models.unpin")
class UnpinModel:
    """Let a model make room again. Answered by `TiersChanged`, or fails with `ModelNotFound`."""

    name: ModelName
    tier: TierChoice


@message("models.evict")
class EvictModel:
    """Give up what tiers have of a model. Answered by `TiersChanged`.

    Fails with `ModelNotFound`, or with `Conflict` where it is held, pinned or on its way: then all of it is there.
    """

    name: ModelName
    tier: TierChoice


@message("models.tiers_changed")
class TiersChanged:
    """In which tiers there was something to be changed: `host`, `ssd`."""

    tiers: tuple[str, ...]


@message("models.tiers")
class ListTiers:
    """Answered by `TiersView`."""


@message("models.holder")
class HolderView:
    """Who has a lease: an instance, or what it is for; and for how long by now."""

    who: str
    held_s: float


@message("models.tier_entry")
class TierEntry:
    """One checkpoint in one tier; it is `idle_s` since the last of its leases ended.

    Less than `size_bytes` is there of one that is on its way (`done_bytes`). `model_id` is that of the SSD's copy, or
    what its download goes by; empty in host memory.
    """

    models: tuple[str, ...]
    model_id: str
    size_bytes: int
    done_bytes: int
    leases: int
    held_by: tuple[HolderView, ...]
    pinned: bool
    idle_s: float


@message("models.way")
class WayView:
    """What has gone one way since the node's start, and in which time."""

    size_bytes: int
    busy_s: float
    bytes_per_s: float


@message("models.tiers_view")
class TiersView:
    """What a node's tiers hold, how long their queues are, and what they have given so far.

    `local_queues_s` has the disks and devices of this node that are busy: `disk MAJOR:MINOR`, `device NUMBER`.
    """

    host: tuple[TierEntry, ...]
    host_free_bytes: int
    host_bytes: int
    ssd: tuple[TierEntry, ...]
    ssd_used_bytes: int
    ssd_quota_bytes: int
    local_queues_s: dict[str, float]
    remote_queue_s: float
    ways: dict[str, WayView]
