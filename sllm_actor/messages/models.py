"""Registering models: gateway to ModelManager."""

from __future__ import annotations

from sllm_actor.domain import Model, ModelName, ModelState
from sllm_actor.messages.declare import message


@message("models.register")
class RegisterModel:
    """Check the checkpoint that `source` names and register it as `name`.

    A name that is registered from the same folder is updated; from another one, only with `replace`.
    Answered by `Model`, or fails with a `CheckpointInvalid`, `SourceInvalid` or `ModelExists`.
    """

    name: ModelName
    source: str
    keep_alive_s: float | None
    replace: bool


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
