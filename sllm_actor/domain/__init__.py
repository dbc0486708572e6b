"""The nouns that every floor shares: names, models, generations, timelines. Data only."""

from __future__ import annotations

from sllm_actor.domain.backend import Backend
from sllm_actor.domain.embedding import Embedding, Pooling
from sllm_actor.domain.generation import EngineLimits, FinishReason, Resume, Sampling, TokenLogprobs
from sllm_actor.domain.model import Model, ModelState, Scaling, TierChoice
from sllm_actor.domain.names import ModelName, NodeId, RequestId, check_model_name, check_node_id
from sllm_actor.domain.timeline import Span, Timeline

__all__ = [
    "Backend",
    "Embedding",
    "EngineLimits",
    "FinishReason",
    "Model",
    "ModelName",
    "ModelState",
    "NodeId",
    "Pooling",
    "RequestId",
    "Resume",
    "Sampling",
    "Scaling",
    "Span",
    "TierChoice",
    "Timeline",
    "TokenLogprobs",
    "check_model_name",
    "check_node_id",
]
