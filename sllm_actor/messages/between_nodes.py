"""The messages that the actors of one node may send to those of another."""

from __future__ import annotations

from sllm_actor.messages.embedding import Embed, Embedded
from sllm_actor.messages.engine import Prefilled
from sllm_actor.messages.explanation import ExplainPlacement, Explanation
from sllm_actor.messages.generation import (
    Finished,
    Generate,
    LocateRequest,
    Migrated,
    PromptLogprobs,
    RequestLocation,
    Tokens,
)
from sllm_actor.messages.instances import (
    AdapterHeld,
    FetchModel,
    InstanceStarted,
    InstanceStatus,
    ListInstances,
    NoSlot,
    StartInstance,
    StartProgress,
    StopInstances,
)
from sllm_actor.messages.migration import (
    ExtendPrepared,
    HandedOver,
    InstanceMoved,
    MigrateOut,
    MoveInstance,
    Prepare,
    Prepared,
)
from sllm_actor.messages.operations import CordonNode, DrainNode, NoticeNode, NoticeTaken
from sllm_actor.messages.placement import (
    HurryPlacement,
    ListNodes,
    NodeChange,
    NodeReport,
    Placement,
    PlaceModel,
    RunsAlready,
)

BETWEEN_NODES: tuple[type, ...] = (
    Generate, Embed, PromptLogprobs, Prefilled, AdapterHeld, NoSlot, Tokens, Embedded, Finished,
    PlaceModel, Placement, RunsAlready, HurryPlacement, NodeReport, NodeChange, ListNodes,
    ExplainPlacement, Explanation,
    StartInstance, FetchModel, StartProgress, InstanceStarted, StopInstances, ListInstances, InstanceStatus,
    CordonNode, DrainNode, NoticeNode, NoticeTaken,
    LocateRequest, RequestLocation, MigrateOut, HandedOver, Prepare, Prepared, ExtendPrepared, Migrated,
    MoveInstance, InstanceMoved,
)  # fmt: skip
