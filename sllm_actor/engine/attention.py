"""Attention over slots: every sequence of a pass looks at its own keys and values, and at nothing else.

A pass is packed: the tokens of all sequences stand behind each other, `[1, tokens]`, so that the layers between the
attentions are computed for all of them at once. No mask spans sequences, and no row is padded to another's length.
Registered with transformers under `NAME`, which builds no mask for a name that it does not know.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.falcon import modeling_falcon

from sllm_actor.engine.kv_cache import Slot

NAME = "slots"


class Segment(NamedTuple):
    """`size` tokens of a pass, from its token `begin` on, that come behind the `past` ones in `slot`."""

    slot: Slot
    begin: int
    size: int
    past: int


class Pass:
    """The segments of one forward pass. Stands where a model expects its cache, too, and is an empty one."""

    def __init__(self, segments: list[Segment]) -> None:
        self.segments = segments
        self.longest_tokens = max((segment.past + segment.size for segment in segments), default=0)
        self._masks: dict[tuple[int, int, int], torch.Tensor] = {}

    def get_seq_length(self) -> int:
        return 0

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Leave keys and values as they are: `attend` stores them."""
        return keys, values

    def mask(self, size: int, past: int, window: int, query: torch.Tensor) -> torch.Tensor:
        """Give what `size` tokens behind `past` may look at: `[size, past + size]`, 0 or -inf, for all layers."""
        key = (size, past, window)
        if key not in self._masks:
            self._masks[key] = causal_mask(size, past, window, query)
        return self._masks[key]


def causal_mask(size: int, past: int, window: int, query: torch.Tensor) -> torch.Tensor:
    """Make an additive mask in the query's type; `window` 0 is no window."""
    seen = torch.arange(past + size, device=query.device)
    own = torch.arange(past, past + size, device=query.device)[:, None]
    hidden = seen > own
    if window:
        hidden |= seen <= own - window
    mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
    return mask.masked_fill_(hidden, float("-inf"))


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    slots: Pass | None = None,
    biases: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute one layer's attention. `[1, heads, tokens, head_dim]` in, `[1, tokens, heads, head_dim]` out.

    `biases` are added to the scores of the first keys, `[heads, keys]` (ALiBi). Without `slots` the tokens are one
    sequence, all of whose keys are given.
    """
    rule = _Rule(scaling, sliding_window or 0, biases)
    if slots is None:
        past = key.shape[2] - query.shape[2]
        return _look(query, key, value, Pass([]), past, rule).transpose(1, 2), None
    layer: int = module.layer_idx
    if len(slots.segments) == 1:
        slot, _begin, _size, past = slots.segments[0]
        keys, values = slot.put(layer, past, key, value)
        return _look(query, keys, values, slots, past, rule).transpose(1, 2), None
    out = query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))
    for slot, begin, size, past in slots.segments:
        keys, values = slot.put(layer, past, key.narrow(2, begin, size), value.narrow(2, begin, size))
        found = _look(query.narrow(2, begin, size), keys, values, slots, past, rule)
        out.narrow(1, begin, size).copy_(found.transpose(1, 2))
    return out, None


class _Rule(NamedTuple):
    """How one layer looks: a window of 0 is none."""

    scaling: float | None
    window: int
    biases: torch.Tensor | None


def _look(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: Pass, past: int, rule: _Rule
) -> torch.Tensor:
    """Let the last tokens of one sequence look at all of it. `[1, heads, size, head_dim]` in and out."""
    heads, groups, size = query.shape[1], keys.shape[1], query.shape[2]
    end = past + size
    window = rule.window if rule.window < end else 0
    if size == 1:
        if window:
            keys, values = keys.narrow(2, end - window, window), values.narrow(2, end - window, window)
        # Queries that share a key head stand as several queries of that head: nothing is repeated.
        grouped = query if heads == groups else query.reshape(1, groups, heads // groups, query.shape[3])
        mask = None if rule.biases is None else rule.biases[:, :end].reshape(1, groups, heads // groups, end)
        found = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=rule.scaling)
        return found.view(1, heads, 1, values.shape[3])
    mask = None
    if past or window or rule.biases is not None:
        mask = slots.mask(size, past, window, query)
    if rule.biases is not None:
        mask = mask + rule.biases[None, :, :end][:, :, None]
    return scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=mask is None, scale=rule.scaling, enable_gqa=heads != groups
    )


class SlotFalconAttention(modeling_falcon.FalconAttention):  # type: ignore[misc]
    """Falcon's attention over slots: transformers' own knows no other functions than those built into it."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        alibi: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        layer_past: Pass | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Do as the base class; its arguments are transformers' own."""
        query, key, value = self._split(self.query_key_value(hidden_states))
        biases = None
        if alibi is not None:
            longest = key.shape[2] if layer_past is None else layer_past.longest_tokens
            ones = torch.ones((1, longest), dtype=torch.long, device=query.device)
            built = modeling_falcon.build_alibi_tensor(ones, self.num_heads, query.dtype)
            biases = built[:, 0] / math.sqrt(self.head_dim)
        else:
            assert position_embeddings is not None
            query, key = modeling_falcon.apply_rotary_pos_emb(query, key, *position_embeddings)
        found, _none = attend(
            self, query, key, value, None, scaling=self.inv_norm_factor, slots=layer_past, biases=biases
        )
        return self.dense(found.reshape(hidden_states.shape)), None

    def _split(self, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split into heads, `[1, heads, tokens, head_dim]`; key heads stay as few as they are."""
        batch, tokens, _ = fused.shape
        if self.new_decoder_architecture:
            groups = fused.view(batch, tokens, self.num_kv_heads, -1, self.head_dim)
            query = groups[:, :, :, :-2].flatten(2, 3)
            key, value = groups[:, :, :, -2], groups[:, :, :, -1]
        else:
            query, key, value = self._split_heads(fused)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def install() -> None:
    """Make transformers know this attention by its name."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    modeling_falcon.FALCON_ATTENTION_CLASSES[NAME] = SlotFalconAttention


install()
