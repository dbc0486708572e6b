"""How a registered model is named to an engine that is to build it."""

from __future__ import annotations

from sllm_actor.checkpoint.folder import Checkpoint
from sllm_actor.domain import Model
from sllm_actor.messages.engine import PrepareModel


def prepare_of(model: Model, checkpoint: Checkpoint | None = None) -> PrepareModel:
    """Have the model built; with its checkpoint, whose aliases the weights need, so that they can be attached."""
    return PrepareModel(
        path=model.path,
        dtype=model.dtype,
        eos_token_ids=model.eos_token_ids,
        context_tokens=model.context_tokens,
        aliases=checkpoint.aliases if checkpoint is not None else {},
        generates=model.generates,
        embedding=model.embedding,
    )
