"""Generations on one model: each with its own cache, stepped in turn.

Batching over generations is the next floor of this room; what is here is right for any number of
them, and interleaves them token by token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sllm_actor.domain import FinishReason, Sampling
from sllm_actor.engine.kv_cache import new_cache
from sllm_actor.engine.sampling import Drawn, Sampler, draw_rows
from sllm_actor.errors import GenerationFailed

# What a forward pass raises: no memory, no such token, a number in the config that only now is used.
MODEL_FAULTS = (RuntimeError, LookupError, ArithmeticError, ValueError, TypeError)


class Generation:
    """One running answer."""

    def __init__(self, prompt: Sequence[int], sampler: Sampler, cache: Cache) -> None:
        self.prompt = prompt
        self.sampler = sampler
        self.cache = cache
        self.tokens: list[int] = []
        self.finish: FinishReason | None = None


class Runner:
    """Owns a model and computes tokens with it. Not thread-safe."""

    def __init__(self, model: PreTrainedModel, eos_token_ids: Sequence[int], context_tokens: int) -> None:
        self._model = model
        self._eos = frozenset(eos_token_ids)
        self._context_tokens = context_tokens
        self._layers = int(model.config.get_text_config().num_hidden_layers)

    def begin(self, prompt: Sequence[int], sampling: Sampling) -> Generation:
        """Make a generation; `step` computes its prompt and first token.

        The prompt is not empty and leaves room in the context for a token: the gateway has checked it.
        """
        assert 0 < len(prompt) < self._context_tokens
        room = self._context_tokens - len(prompt)
        limited = min(sampling.max_tokens, room)
        cache = new_cache(self._layers, len(prompt) + limited)
        return Generation(prompt, Sampler(sampling, prompt, self._eos), cache)

    def step(self, generation: Generation) -> Drawn:
        """Compute one more token and say in `generation.finish` whether it was the last.

        A token that ends the answer is appended to `tokens` like any other; whoever shows text leaves it out.

        Raises:
            GenerationFailed: the model gave no finite numbers, has no such token, or found no memory.
        """
        try:
            drawn = self._next(generation)
        except MODEL_FAULTS as error:
            raise GenerationFailed(f"token {len(generation.tokens)} can't be computed: {error}") from error
        if isinstance(drawn, GenerationFailed):
            raise drawn
        generation.tokens.append(drawn.token_id)
        if drawn.token_id in generation.sampler.ends:
            generation.finish = FinishReason.STOP
        elif self._is_full(generation):
            generation.finish = FinishReason.LENGTH
        return drawn

    def _next(self, generation: Generation) -> Drawn | GenerationFailed:
        fresh = generation.tokens[-1:] or generation.prompt
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor([list(fresh)], dtype=torch.long),
                past_key_values=generation.cache,
                use_cache=True,
                return_dict=True,
                logits_to_keep=1,
            )
            return draw_rows(output.logits[:, -1], [generation.sampler])[0]

    def _is_full(self, generation: Generation) -> bool:
        written = len(generation.prompt) + len(generation.tokens)
        return len(generation.tokens) >= generation.sampler.sampling.max_tokens or written >= self._context_tokens
