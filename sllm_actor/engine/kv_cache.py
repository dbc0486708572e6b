"""The keys and values of one generation, in buffers that double instead of being copied at every token."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

FIRST_CAPACITY_TOKENS = 64


class GrowingLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer: `[1, kv_heads, tokens, head_dim]`, of which the first `_length` tokens are written."""

    is_sliding = False

    def __init__(self, capacity_tokens: int) -> None:
        super().__init__()
        self._limit_tokens = capacity_tokens
        self._length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        tokens = min(max(FIRST_CAPACITY_TOKENS, 2 * key_states.shape[-2]), self._limit_tokens)
        self.keys = self._empty(key_states, tokens)
        self.values = self._empty(value_states, tokens)
        self.is_initialized = True

    @staticmethod
    def _empty(states: torch.Tensor, tokens: int) -> torch.Tensor:
        batch, heads, _, head_dim = states.shape
        return states.new_empty((batch, heads, tokens, head_dim))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[1, kv_heads, new, head_dim]` and give views of all that is written."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, end = self._length, self._length + key_states.shape[-2]
        assert end <= self._limit_tokens, "the context was checked before the generation began"
        if end > self.keys.shape[-2]:
            self._grow(min(max(2 * self.keys.shape[-2], end), self._limit_tokens))
        self.keys[:, :, begin:end] = key_states
        self.values[:, :, begin:end] = value_states
        self._length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _grow(self, tokens: int) -> None:
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._empty(old, tokens)
            new[:, :, : self._length] = old[:, :, : self._length]
            setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return self._limit_tokens


def new_cache(layers: int, context_tokens: int) -> Cache:
    """Make an empty cache for one generation of at most `context_tokens`."""
    return Cache(layers=[GrowingLayer(context_tokens) for _ in range(layers)])
