"""AsyncLLM: its public calls with their signatures, over a model that looks at the last token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from vllm.config import LoadConfig, ModelConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.logprobs import Logprob
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.models import LastToken
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.plugins import load_general_plugins
from vllm.sampling_params import RequestOutputKind, SamplingParams, VLLMValidationError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BLOCK_TOKENS = 16


class AsyncLLM:
    """Owns a model; `max_num_seqs` requests run at once."""

    def __init__(self, engine_args: AsyncEngineArgs, model: LastToken) -> None:
        assert engine_args.max_model_len is not None and engine_args.max_num_seqs is not None
        self._context_tokens = engine_args.max_model_len
        self._max_logprobs = engine_args.max_logprobs
        self._model = model
        self._slots = asyncio.Semaphore(engine_args.max_num_seqs)
        self._blocks: set[tuple[int, ...]] = set()
        self._ids: set[str] = set()
        self.errored = False

    @classmethod
    def from_engine_args(
        cls,
        engine_args: AsyncEngineArgs,
        start_engine_loop: bool = True,
        usage_context: Any = None,
        stat_loggers: list[Any] | None = None,
    ) -> AsyncLLM:
        """Load the model as its load format does."""
        load_general_plugins()
        text = json.loads((Path(engine_args.model) / "config.json").read_text())
        tied = bool(text.get("tie_word_embeddings"))
        model = LastToken(text["vocab_size"], text["hidden_size"], DTYPES[engine_args.dtype], tied=tied)
        loader = get_model_loader(
            LoadConfig(
                load_format=engine_args.load_format, model_loader_extra_config=engine_args.model_loader_extra_config
            )
        )
        loader.load_weights(model, ModelConfig(model=engine_args.model, dtype=engine_args.dtype))
        return cls(engine_args, model)

    async def generate(
        self,
        prompt: Mapping[str, Any],
        sampling_params: SamplingParams,
        request_id: str,
        *,
        prompt_text: str | None = None,
        lora_request: Any = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
        session_id: str | None = None,
        kv_hints: Any = None,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: dict[str, Any] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer one request; closing or cancelling it ends it."""
        tokens = list(prompt["prompt_token_ids"])
        self._check(tokens, sampling_params, request_id)
        self._ids.add(request_id)
        try:
            async with self._slots:
                async for output in self._run(tokens, sampling_params, request_id):
                    yield output
        finally:
            self._ids.discard(request_id)

    def _check(self, tokens: list[int], parameters: SamplingParams, request_id: str) -> None:
        if request_id in self._ids:
            raise ValueError(f"Request id {request_id} already running.")
        if not 0 < len(tokens) < self._context_tokens:
            raise VLLMValidationError(f"{len(tokens)} tokens do not fit the context of {self._context_tokens}")
        if not all(0 <= token < len(self._model.embed) for token in tokens):
            raise VLLMValidationError("Token id is out of vocabulary")
        if max(parameters.logprobs or 0, parameters.prompt_logprobs or 0) > self._max_logprobs:
            raise VLLMValidationError("too many logprobs")

    async def _run(
        self, tokens: list[int], parameters: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        cached = 0 if parameters.prompt_logprobs is not None else self._cached(tokens)
        scored = self._scored(tokens, parameters.prompt_logprobs)
        dice = torch.Generator().manual_seed(parameters.seed or 0)
        drawn: list[int] = []
        reason: str | None = None
        while reason is None:
            await asyncio.sleep(0)
            logits = self._model((tokens + drawn)[-1])
            drawn.append(self._draw(logits, parameters, len(drawn), dice))
            ends = drawn[-1] in parameters.stop_token_ids
            full = len(drawn) == parameters.max_tokens or len(tokens) + len(drawn) >= self._context_tokens
            reason = "stop" if ends else "length" if full else None
            told = None if parameters.logprobs is None else [_entry(logits, drawn[-1], parameters.logprobs)]
            if reason is None and parameters.output_kind is RequestOutputKind.FINAL_ONLY:
                continue
            part = CompletionOutput(0, "", drawn[-1:], None, told, reason, drawn[-1] if reason == "stop" else None)
            yield RequestOutput(request_id, None, tokens, scored, [part], reason is not None, cached)
            scored = None
        self._remember(tokens + drawn[:-1])

    def _draw(self, logits: torch.Tensor, parameters: SamplingParams, count: int, dice: torch.Generator) -> int:
        logits = logits.clone()
        for token, bias in (parameters.logit_bias or {}).items():
            logits[token] += bias
        if count < parameters.min_tokens:
            logits[parameters.stop_token_ids] = float("-inf")
        if not parameters.temperature:
            return int(logits.argmax())
        return int(torch.multinomial(torch.softmax(logits / parameters.temperature, -1), 1, generator=dice))

    def _scored(self, tokens: list[int], top: int | None) -> list[dict[int, Logprob] | None] | None:
        if top is None:
            return None
        return [None, *(_entry(self._model(a), b, top) for a, b in pairwise(tokens))]

    def _cached(self, tokens: list[int]) -> int:
        count = 0
        # The last token is always computed.
        while count + BLOCK_TOKENS < len(tokens) and tuple(tokens[: count + BLOCK_TOKENS]) in self._blocks:
            count += BLOCK_TOKENS
        return count

    def _remember(self, tokens: list[int]) -> None:
        self._blocks |= {tuple(tokens[:end]) for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS)}

    async def abort(self, request_id: str, internal: bool = False) -> None:
        """Forget a request."""

    def shutdown(self, timeout: float | None = None) -> None:
        """End what runs beside."""


def _entry(logits: torch.Tensor, token: int, top: int) -> dict[int, Logprob]:
    logprobs = torch.log_softmax(logits, -1)
    ranks = {int(one): place + 1 for place, one in enumerate(logits.argsort(descending=True))}
    wanted = [token, *(one for one, rank in ranks.items() if rank <= top)]
    return {one: Logprob(float(logprobs[one]), ranks[one]) for one in dict.fromkeys(wanted)}
