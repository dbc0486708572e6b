"""What this node gives to others: the folders of the models that are registered here, under their names."""

from __future__ import annotations

from pathlib import Path

from sllm_actor.checkpoint.manifest import read_manifest
from sllm_actor.domain import Model, ModelName
from sllm_actor.errors import CheckpointInvalid, ModelNotFound
from sllm_actor.messages.models import GetModel
from sllm_actor.runtime import ActorRef
from sllm_actor.sources.holdings import FolderHoldings, Holdings


def holdings_of(manager: ActorRef, ask_timeout_s: float) -> Holdings:
    """Make holdings of what a ModelManager has registered."""

    async def find(name: str) -> Path | None:
        try:
            model: Model = await manager.ask(GetModel(name=ModelName(name)), timeout_s=ask_timeout_s)
        except ModelNotFound:
            return None
        return Path(model.path)

    return FolderHoldings(find, _model_id)


def _model_id(folder: Path) -> str:
    """Give the digest that a converted checkpoint has of itself."""
    try:
        manifest = read_manifest(folder)
    except CheckpointInvalid:
        # It is for whoever reads the files to find out.
        return ""
    return manifest.model_id if manifest is not None else ""
