"""Keys and values of sequences, one slot each, in buffers that double; and who may have how much of that memory.

A slot outlives its generation until its room is needed, so that a prompt that begins as another sequence did need not
be computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

FIRST_CAPACITY_TOKENS = 64


class KvShape(NamedTuple):
    """What one token takes in all layers."""

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.heads * self.head_dim * int(self.dtype.itemsize)


def kv_shape(config: Any, dtype: torch.dtype, device: torch.device) -> KvShape:
    """Read a model's shape off its config, which names it in as many ways as there are families."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if config.model_type == "falcon":
        heads = config.num_attention_heads
        if config.new_decoder_architecture:
            heads = config.num_kv_heads
        elif config.multi_query:
            heads = 1
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return KvShape(config.num_hidden_layers, heads, head_dim, dtype, device)


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Count the tokens with which both begin."""
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class Slot:
    """One sequence: per layer `[1, kv_heads, capacity, head_dim]`, of which `tokens` are written."""

    def __init__(self, shape: KvShape, owner: str) -> None:
        self.owner = owner  # The adapter that it was computed with: others get other keys and values.
        self.tokens: list[int] = []
        self.capacity_tokens = 0
        self._shape = shape
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def resize(self, tokens: int) -> None:
        """Have room for `tokens` in all, at least those that are written.

        Raises:
            RuntimeError: there is no memory; what is written is as it was.
        """
        written = len(self.tokens)
        for buffers in (self._keys, self._values):
            for layer in range(self._shape.layers):
                fresh = self._empty(tokens)
                if written:
                    fresh[:, :, :written] = buffers[layer][:, :, :written]
                buffers[layer : layer + 1] = [fresh]
        self.capacity_tokens = tokens

    def _empty(self, tokens: int) -> torch.Tensor:
        shape = self._shape
        return torch.empty((1, shape.heads, tokens, shape.head_dim), dtype=shape.dtype, device=shape.device)

    def put(self, layer: int, past: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store `[1, kv_heads, new, head_dim]` behind the first `past` tokens and give views of all of them."""
        count = keys.shape[2]
        own_keys, own_values = self._keys[layer], self._values[layer]
        own_keys.narrow(2, past, count).copy_(keys)
        own_values.narrow(2, past, count).copy_(values)
        return own_keys.narrow(2, 0, past + count), own_values.narrow(2, 0, past + count)

    def copy_from(self, other: Slot, tokens: int) -> None:
        """Begin as `other` does: with its first `tokens`, for which there is room."""
        for mine, its in ((self._keys, other._keys), (self._values, other._values)):
            for target, source in zip(mine, its, strict=True):
                target.narrow(2, 0, tokens).copy_(source.narrow(2, 0, tokens))
        self.tokens = other.tokens[:tokens]


class SlotPool:
    """Owns the slots of an engine: at most `slots` of them, and room for `limit_tokens` in all together."""

    def __init__(self, shape: KvShape, slots: int, kv_bytes: int) -> None:
        self.limit_tokens = kv_bytes // shape.token_bytes
        self._shape = shape
        self._slots = slots
        # What each running sequence has been promised; its buffers follow as they are needed.
        self._promised: dict[Slot, int] = {}
        # Of sequences that have ended, least recently used first.
        self._kept: list[Slot] = []

    @property
    def promised_tokens(self) -> int:
        return sum(self._promised.values())

    @property
    def kept_tokens(self) -> int:
        return sum(slot.capacity_tokens for slot in self._kept)

    def take(self, tokens: int, wanted: Sequence[int], owner: str) -> Slot | None:
        """Promise room for `tokens`, or give None while there is none; what is kept makes way.

        The slot may be a kept one that begins as `wanted` does: then it has the common tokens already.
        """
        if len(self._promised) >= self._slots or self.promised_tokens + tokens > self.limit_tokens:
            return None
        slot = Slot(self._shape, owner)
        best, common = self._best(self._kept, wanted, owner)
        # One that is wanted nearly whole is taken over; of another one the beginning is copied, while it is there.
        if (
            best is not None
            and 2 * common >= len(best.tokens)
            and self.promised_tokens + best.capacity_tokens <= self.limit_tokens
        ):
            slot = best
            self._kept.remove(best)
            del slot.tokens[common:]
        self._promised[slot] = max(tokens, slot.capacity_tokens)
        while len(self._promised) + len(self._kept) > self._slots:
            self._kept.pop(0)
        self._make_room()
        return slot

    def _make_room(self) -> None:
        while self._kept and self.promised_tokens + self.kept_tokens > self.limit_tokens:
            self._kept.pop(0)

    def grow(self, slot: Slot, tokens: int) -> bool:
        """Have room for `tokens` in a slot: by doubling, or by as much as there is. False: there is not enough.

        Raises:
            RuntimeError: there is no memory for what was promised.
        """
        if tokens <= slot.capacity_tokens:
            return True
        room = self.limit_tokens - (self.promised_tokens - self._promised[slot])
        if tokens > room:
            return False
        doubled = max(2 * slot.capacity_tokens, tokens, FIRST_CAPACITY_TOKENS)
        if 4 * (room - doubled) < self.limit_tokens:
            # Where memory is short nobody takes what others may need first.
            doubled = -(-tokens // FIRST_CAPACITY_TOKENS) * FIRST_CAPACITY_TOKENS
        capacity = min(doubled, room)
        self._promised[slot] = max(self._promised[slot], capacity)
        self._make_room()
        slot.resize(capacity)
        return True

    def adopt(self, slot: Slot, wanted: Sequence[int]) -> None:
        """Copy the longest beginning of `wanted` that any other slot has, if that is more than `slot` has."""
        others = [other for other in (*self._promised, *self._kept) if other is not slot]
        best, common = self._best(others, wanted, slot.owner)
        if best is not None and common > len(slot.tokens) and self.grow(slot, common):
            slot.copy_from(best, common)

    @staticmethod
    def _best(slots: Sequence[Slot], wanted: Sequence[int], owner: str) -> tuple[Slot | None, int]:
        best, most = None, 0
        for slot in slots:
            if slot.owner == owner and (common := common_prefix(slot.tokens, wanted)) > most:
                best, most = slot, common
        return best, most

    def give_back(self, slot: Slot, *, keep: bool) -> None:
        """End a promise; a slot that is kept can be found by its tokens until its room is needed."""
        del self._promised[slot]
        if keep and slot.tokens:
            self._kept.append(slot)
