"""What of a model is refused when it is deployed with vLLM as its backend. Pure."""

from __future__ import annotations

from sllm_actor.checkpoint.folder import Checkpoint
from sllm_actor.domain import Backend, Model
from sllm_actor.errors import BackendInvalid, CheckpointConfigInvalid


def architecture_for_vllm(checkpoint: Checkpoint, *, embeds: bool) -> str:
    """Give the class that vLLM is to serve; whether it can, its process says.

    Raises:
        BackendInvalid: it is to embed, is split for several ranks, or is stored as our load format gives nothing.
        CheckpointConfigInvalid: no class is named.
    """
    if embeds:
        raise BackendInvalid("a checkpoint of sentence-transformers embeds, which our own engine does", param="backend")
    if checkpoint.ranks > 1:
        raise BackendInvalid(
            f"its tensors are split for {checkpoint.ranks} ranks, and an instance has one device", param="backend"
        )
    quantization = checkpoint.config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "bitsandbytes":
        raise BackendInvalid("what bitsandbytes has quantized, vLLM reads by a load format of its own", param="backend")
    if not checkpoint.architectures:
        raise CheckpointConfigInvalid(f"{checkpoint.path}: config.json names no architectures")
    return checkpoint.architectures[0]


def refuse_adapters(base: Model) -> None:
    """Refuse an adapter whose base is vLLM's.

    Raises:
        BackendInvalid: it is.
    """
    if base.backend is Backend.VLLM:
        raise BackendInvalid(f"{base.name} has vLLM as its backend, which is given no adapters", param="base")
