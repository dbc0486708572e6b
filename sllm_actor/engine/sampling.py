"""Draw one token. Counter-based: the random number depends on the seed and the position alone.

So a sampler has no state: any engine that has the same tokens draws the same next one.
"""

from __future__ import annotations

import torch

from sllm_actor.domain import Sampling
from sllm_actor.errors import GenerationFailed

_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    """SplitMix64's finalizer (Steele, Lea, Flood: Fast splittable pseudorandom number generators)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, position: int) -> float:
    """Give the random number in [0, 1) for a position."""
    return (_mix(_mix(seed & _MASK) ^ position) >> 11) / (1 << 53)


def draw(logits: torch.Tensor, sampling: Sampling, position: int) -> int:
    """Choose the token at `position` of the answer. logits: `[vocabulary]`, any float type.

    Raises:
        GenerationFailed: the logits hold no finite maximum.
    """
    token = torch.argmax(logits)
    best = logits[token].double()
    if not torch.isfinite(best):
        raise GenerationFailed(f"the model's logits at token {position} are not finite")
    if sampling.temperature == 0.0:
        return int(token)
    # The best token stands at 0, so that the smallest temperature makes no infinity of it.
    probabilities = torch.softmax((logits.double() - best) / sampling.temperature, dim=-1)
    ordered, token_ids = torch.sort(probabilities, descending=True, stable=True)
    cumulative = torch.cumsum(ordered, dim=-1)
    # The nucleus is the shortest prefix whose mass reaches top_p; the draw is scaled into its mass.
    last = min(int(torch.searchsorted(cumulative, sampling.top_p)), len(cumulative) - 1)
    target = uniform(sampling.seed, position) * float(cumulative[last])
    return int(token_ids[min(int(torch.searchsorted(cumulative, target, right=True)), last)])
