"""Where a registered model stands on this node. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sllm_actor.actors.instance import Instance
from sllm_actor.actors.registry import Registry
from sllm_actor.domain import Model, ModelName, ModelState
from sllm_actor.messages.models import ModelStatus


def standing(
    model: Model,
    registry: Registry,
    instances: Collection[Instance],
    starting: Collection[ModelName],
    held_bytes: Mapping[str, int],
) -> ModelStatus:
    """Describe a model; `held_bytes` has the checkpoints in host memory, by fingerprint."""
    serving = sum(instance.serves(model) for instance in instances)
    if serving:
        state = ModelState.RUNNING
    elif model.name in starting:
        state = ModelState.LOADING
    elif model.fingerprint in held_bytes:
        state = ModelState.HOST
    else:
        on_disk = ModelState.SSD if model.card else ModelState.COLD
        state = on_disk if registry.on_disk.has(model) else ModelState.REMOTE
    arriving = registry.arriving(model)
    return ModelStatus(
        model=model,
        state=state,
        instances=serving,
        host_bytes=held_bytes.get(model.fingerprint, 0),
        loading_bytes=0 if arriving is None else arriving[0],
    )
