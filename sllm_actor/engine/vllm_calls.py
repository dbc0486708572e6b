"""Every call into vLLM: its names, arguments and answers, and what they are in ours.

As of vLLM v0.33.0. Imported by the engine process of a model with `backend = "vllm"` alone, in vLLM's environment.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import msgspec
from vllm import ModelRegistry, SamplingParams, TokensPrompt
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from sllm_actor.domain import EngineLimits, Sampling, TokenLogprobs
from sllm_actor.engine.vllm_options import LOAD_FORMAT, LoaderConfig, VllmOptions
from sllm_actor.messages.engine import PrepareModel

# As many as a client may ask for.
MAX_LOGPROBS = 20
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def supported_architectures() -> frozenset[str]:
    """Give the names of the model classes that this vLLM serves."""
    return frozenset(ModelRegistry.get_supported_archs())


def open_engine(prepared: PrepareModel, weights: LoaderConfig, limits: EngineLimits, options: VllmOptions) -> Any:
    """Start vLLM's engine for a model whose weights the load format `sllm` gives. Blocks until it can generate."""
    arguments = AsyncEngineArgs(
        model=prepared.path,
        # Texts are the node's: only token ids come and go.
        skip_tokenizer_init=True,
        # What is stored in a type that nothing is computed in is as its config says.
        dtype=DTYPES.get(prepared.dtype, "auto"),
        load_format=LOAD_FORMAT,
        model_loader_extra_config=msgspec.to_builtins(weights),
        max_model_len=prepared.context_tokens,
        max_num_seqs=limits.slots,
        kv_cache_memory_bytes=limits.kv_cache_bytes or None,
        gpu_memory_utilization=options.gpu_memory_percent / 100,
        enable_prefix_caching=True,
        scheduling_policy="priority",
        max_logprobs=MAX_LOGPROBS,
        enforce_eager=options.eager,
        # What a model's own generation_config.json says has been applied where the request was read.
        generation_config="vllm",
        disable_log_stats=True,
    )
    return AsyncLLM.from_engine_args(arguments)


def seed_of(sampling: Sampling, generated: int) -> int:
    """Give the seed of a request that goes on behind `generated` tokens.

    vLLM draws from a generator that begins anew with each request: with the same seed behind a move, the same random
    numbers would be drawn once more.
    """
    if not sampling.choice and not generated:
        return sampling.seed
    told = hashlib.sha256(f"{sampling.seed}/{sampling.choice}/{generated}".encode()).digest()
    return int.from_bytes(told[:8], "little") >> 1


def parameters_of(sampling: Sampling, generated: int, ends: Sequence[int]) -> Any:
    """Say how the tokens behind `generated` ones are drawn; at least one is."""
    left = max(1, sampling.max_tokens - generated)
    scored = sampling.prompt_logprobs and not generated
    return SamplingParams(
        max_tokens=left,
        min_tokens=min(left, max(0, sampling.min_tokens - generated)),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=seed_of(sampling, generated),
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        # The model's own ends are among ours, where they hold.
        stop_token_ids=list(ends),
        ignore_eos=True,
        logprobs=sampling.top_logprobs,
        prompt_logprobs=(sampling.top_logprobs or 0) if scored else None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def answer(
    llm: Any, request_id: str, tokens: Sequence[int], parameters: Any, priority: int
) -> AsyncGenerator[Any, None]:
    """Run one request; closing the generator, or cancelling who reads it, ends it in vLLM, too."""
    prompt = TokensPrompt(prompt_token_ids=list(tokens))
    stream: AsyncGenerator[Any, None] = llm.generate(prompt, parameters, request_id, priority=priority)
    return stream


async def compute(llm: Any, request_id: str, tokens: Sequence[int], priority: int) -> None:
    """Have the keys and values of some tokens computed, so that the cache of prefixes has them for whoever goes on."""
    parameters = SamplingParams(
        max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )
    async for _ in answer(llm, request_id, tokens, parameters, priority):
        pass


def logprobs_of(told: Mapping[int, Any], token_id: int, top: int) -> TokenLogprobs:
    """Give what vLLM tells of one position: of the token there, and of the `top` likeliest, likeliest first."""
    likeliest = sorted(told.items(), key=lambda item: (-item[1].logprob, item[0]))[:top]
    return TokenLogprobs(
        logprob=told[token_id].logprob, top=tuple((other, entry.logprob) for other, entry in likeliest)
    )
