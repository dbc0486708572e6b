"""A mixture of experts whose weights lie as checkpoints have them: one tensor for each expert and projection.

transformers keeps the experts of a layer in one tensor, which would have to be put together by copying all of them.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts


class Expert(nn.Module):  # type: ignore[misc]
    """One gated network. The names are those of Qwen's checkpoints."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)


class Experts(nn.ModuleList):  # type: ignore[misc]
    """Takes the place of `Qwen3MoeExperts`."""

    def __init__(self, like: Qwen3MoeExperts) -> None:
        super().__init__(Expert(like.hidden_dim, like.intermediate_dim) for _ in range(like.num_experts))
        self.act_fn = ACT2FN[like.config.hidden_act]

    def forward(self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Add up what each token's experts make of it. `[tokens, hidden]`, `[tokens, top_k]` twice."""
        found = torch.zeros_like(hidden)
        for number in top_k_index.unique().tolist():
            tokens, places = torch.where(top_k_index == number)
            expert = self[number]
            state = hidden[tokens]
            inner = self.act_fn(expert.gate_proj(state)) * expert.up_proj(state)
            outer = expert.down_proj(inner) * top_k_weights[tokens, places, None]
            found.index_add_(0, tokens, outer.to(found.dtype))
        return found


def unpack_experts(model: nn.Module) -> None:
    """Let every mixture of a model have its experts one by one."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Qwen3MoeExperts):
                setattr(module, name, Experts(child))
