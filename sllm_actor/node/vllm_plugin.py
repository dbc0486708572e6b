"""vLLM's plugin: the load format `sllm`, in every process in which vLLM loads plugins."""

from __future__ import annotations

from sllm_actor.engine.vllm_options import LOAD_FORMAT


def register() -> None:
    """Make the load format known to vLLM; doing it twice does nothing more."""
    from vllm.model_executor.model_loader import register_model_loader

    from sllm_actor.node.vllm_loader import SllmModelLoader

    register_model_loader(LOAD_FORMAT)(SllmModelLoader)
