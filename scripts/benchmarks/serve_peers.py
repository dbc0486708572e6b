"""What `serve` compares with: transformers' `generate`, its continuous batching, and static batches of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache

BLOCKS, BATCH_TOKENS = 256, 256


# OPT's model asks its cache for a length that transformers 5.24 gives paged ones none of, to make positions that it has
# been given: without an answer its continuous batching ends with an AttributeError.
if not hasattr(PagedAttentionCache, "get_seq_length"):
    PagedAttentionCache.get_seq_length = lambda self: 0


class Request(NamedTuple):
    """A prompt, and how many tokens it is answered with."""

    prompt: list[int]
    new_tokens: int


class Peer:
    """One model in transformers' hands."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def generate(self, request: Request) -> list[int]:
        """Answer one prompt."""
        return self._batch([request], request.new_tokens)[0]

    def _batch(self, requests: Sequence[Request], new_tokens: int) -> list[list[int]]:
        longest = max(len(request.prompt) for request in requests)
        pads = [longest - len(request.prompt) for request in requests]
        ids = torch.tensor([[1] * pad + request.prompt for pad, request in zip(pads, requests, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
        with torch.inference_mode():
            found = self._model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
        answers: list[list[int]] = found[:, longest:].tolist()
        return answers

    def continuous(self, requests: Sequence[Request]) -> tuple[float, list[list[int]]]:
        """Answer all at once; the seconds do not count the start of its manager and a first request that warms it."""
        wish = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=requests[0].new_tokens)
        bounds = ContinuousBatchingConfig(num_blocks=BLOCKS, max_batch_tokens=BATCH_TOKENS)
        with (
            self._model.continuous_batching_context_manager(
                generation_config=wish, continuous_batching_config=bounds, block=True, timeout=30
            ) as manager,
        ):
            manager.add_request(list(range(3, 19)), max_new_tokens=4)
            while manager.get_result(timeout=1) is None:
                assert manager.is_running()
            begin_s = time.perf_counter()
            names = [manager.add_request(request.prompt, max_new_tokens=request.new_tokens) for request in requests]
            answers: dict[str, list[int]] = {}
            while len(answers) < len(names):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    assert result.error is None, result.error
                    answers[result.request_id] = list(result.generated_tokens)
                assert result is not None or manager.is_running()
            seconds = time.perf_counter() - begin_s
        return seconds, [answers[name] for name in names]

    def static(self, requests: Sequence[Request], due: Sequence[float], most: int) -> list[float]:
        """Answer batches of at most `most`, each as long as its longest; give the second each was whole."""
        begin_s = time.perf_counter()
        ended: list[float] = []
        while len(ended) < len(requests):
            now_s = time.perf_counter() - begin_s
            waiting = [place for place in range(len(ended), len(requests)) if due[place] <= now_s][:most]
            if not waiting:
                time.sleep(due[len(ended)] - now_s)
                continue
            batch = [requests[place] for place in waiting]
            self._batch(batch, max(request.new_tokens for request in batch))
            ended += [time.perf_counter() - begin_s] * len(batch)
        return ended
