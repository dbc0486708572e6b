"""Texts through a model that looks both ways: several at once, padded to the longest of them, and nothing is kept.

Texts of about the same length go together, so that little of a pass is padding; the one that has waited longest is in
every next one.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from sllm_actor.domain import EngineLimits, FinishReason
from sllm_actor.engine.generation import Generation, Step
from sllm_actor.engine.pooling import Pooler, check_text
from sllm_actor.engine.runner import MODEL_FAULTS
from sllm_actor.errors import GenerationFailed, SllmError

# A pass of more rows than this gains nothing, however short they are.
MAX_ROWS = 256


class EncoderRunner:
    """Owns an encoder and the texts that wait for it; the counterpart of `Runner`. Not thread-safe."""

    def __init__(self, model: PreTrainedModel, context_tokens: int, limits: EngineLimits) -> None:
        self._model = model
        self._context_tokens = context_tokens
        self._pass_tokens = limits.prefill_chunk_tokens
        self._vocabulary = int(model.get_input_embeddings().num_embeddings)
        self._padding = int(model.config.pad_token_id or 0)
        self._arrivals = itertools.count()
        self._waiting: list[tuple[tuple[int, int], Generation]] = []

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def room_for_texts(self) -> int:
        """Tell how many texts may be here at once."""
        return MAX_ROWS

    def begin_embedding(self, prompt: Sequence[int], pooler: Pooler, priority: int = 0) -> Generation:
        """Take on a text, as `Runner.begin_embedding` does.

        Raises:
            GenerationFailed: the model has no such token, or no context for the text.
        """
        check_text(prompt, self._context_tokens, self._vocabulary)
        text = Generation(prompt, None, (), (priority, next(self._arrivals)))
        text.pooler = pooler
        heapq.heappush(self._waiting, (text.order, text))
        return text

    def cancel(self, text: Generation) -> None:
        """Forget a text."""
        self._waiting = [item for item in self._waiting if item[1] is not text]
        heapq.heapify(self._waiting)

    def step(self) -> Step:
        """Compute one pass; a failure ends the texts that it concerns."""
        step = Step([], [], [], [])
        texts = self._choose()
        step.admitted.extend(texts)
        try:
            states = self._forward(texts)
        except MODEL_FAULTS as error:
            step.failed.extend((text, GenerationFailed(f"a forward pass failed: {error}")) for text in texts)
            return step
        for text, hidden in zip(texts, states, strict=True):
            assert text.pooler is not None
            try:
                text.pooler.take(hidden[: len(text.prompt)])
                text.vector = text.pooler.vector()
            except SllmError as error:
                step.failed.append((text, error))
                continue
            text.finish = FinishReason.STOP
            step.advanced.append(text)
        return step

    def _choose(self) -> list[Generation]:
        """Take the first that waits, and those next in length to it, as long as the pass stays within its tokens."""
        _, first = heapq.heappop(self._waiting)
        others = sorted((text for _, text in self._waiting), key=lambda text: abs(len(text.prompt) - len(first.prompt)))
        chosen, longest = [first], len(first.prompt)
        for text in others:
            longest = max(longest, len(text.prompt))
            if longest * (len(chosen) + 1) > self._pass_tokens:
                break
            chosen.append(text)
        taken = set(chosen)
        self._waiting = [item for item in self._waiting if item[1] not in taken]
        heapq.heapify(self._waiting)
        return chosen

    def _forward(self, texts: Sequence[Generation]) -> torch.Tensor:
        """Compute the hidden states, `[texts, tokens, hidden_size]`."""
        longest, device = max(len(text.prompt) for text in texts), self._model.device
        ids = torch.full((len(texts), longest), self._padding, dtype=torch.long)
        mask = torch.zeros((len(texts), longest), dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, : len(text.prompt)] = torch.tensor(text.prompt)
            mask[row, : len(text.prompt)] = 1
        with torch.inference_mode():
            output = self._model(input_ids=ids.to(device), attention_mask=mask.to(device), return_dict=True)
        states: torch.Tensor = output.last_hidden_state
        return states
