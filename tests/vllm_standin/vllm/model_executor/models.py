"""The one model: it sees the last token alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class LastToken(nn.Module):  # type: ignore[misc]
    """Logits are the head of what the last token is embedded as, scaled by the norm. Other weights are passed over."""

    def __init__(self, vocabulary: int, hidden: int, dtype: torch.dtype, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(vocabulary, hidden, dtype=dtype), requires_grad=False)
        self.norm = nn.Parameter(torch.zeros(hidden, dtype=dtype), requires_grad=False)
        own_head = nn.Parameter(torch.zeros(vocabulary, hidden, dtype=dtype), requires_grad=False)
        self.head = self.embed if tied else own_head
        self.passed_over: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take what comes; give the parameters that were met."""
        own = {"model.embed_tokens.weight": "embed", "model.norm.weight": "norm", "lm_head.weight": "head"}
        met: set[str] = set()
        for name, tensor in weights:
            if name == "lm_head.weight" and self.head is self.embed:
                continue
            if name in own:
                parameter = getattr(self, own[name])
                assert parameter.shape == tensor.shape and own[name] not in met, name
                parameter.copy_(tensor)
                met.add(own[name])
            else:
                assert name not in self.passed_over, name
                self.passed_over[name] = tensor.clone()
        return met

    def forward(self, token: int) -> torch.Tensor:
        """Give the logits behind a token, float32."""
        return (self.head @ (self.embed[token] * self.norm)).float()
