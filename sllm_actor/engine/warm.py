"""What the fork server does before the first fork: imports, and a forward pass of every architecture.

The pass is tiny and single-threaded: it pays for lazy imports and dispatch tables once, and starts no thread.
"""

from __future__ import annotations

import importlib

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from sllm_actor.domain import Embedding, EngineLimits, Pooling, Sampling
from sllm_actor.engine import attention, four_bits
from sllm_actor.engine.architectures import ENCODERS, MODULES
from sllm_actor.engine.encoder import EncoderRunner
from sllm_actor.engine.experts import unpack_experts
from sllm_actor.engine.mapped_tensors import DTYPES
from sllm_actor.engine.pooling import Pooler
from sllm_actor.engine.runner import Runner

TINY_CONTEXT_TOKENS = 64
EMBEDDING = Embedding(pooling=Pooling.MEAN, normalize=True, dimensions=16, max_tokens=TINY_CONTEXT_TOKENS)
LIMITS = EngineLimits(slots=2, kv_cache_bytes=1024 * 1024, prefill_chunk_tokens=4)
TINY = {
    "hidden_size": 16, "intermediate_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 32, "word_embed_proj_dim": 16,
    "max_position_embeddings": TINY_CONTEXT_TOKENS, "moe_intermediate_size": 16, "num_experts": 2,
    "num_experts_per_tok": 1, "dim": 16, "hidden_dim": 16, "n_heads": 2, "n_layers": 1,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def warm() -> None:
    """Import and run every architecture that engines serve."""
    torch.set_num_threads(1)
    assert AutoTokenizer is not None
    four_bits.load()
    for name, module in MODULES.items():
        model_class = getattr(importlib.import_module(module), name)
        config = model_class.config_class(**TINY)
        assert AutoConfig.for_model(config.model_type) is not None
        config._attn_implementation = attention.NAME
        model = model_class(config).eval()
        unpack_experts(model)
        for dtype in ("F32", "BF16", "F16"):
            runner = Runner(model.to(DTYPES[dtype]), (), TINY_CONTEXT_TOKENS, LIMITS)
            for prompt in ([1, 2, 3], [4, 5]):
                runner.begin(prompt, Sampling(max_tokens=2, temperature=1.0, top_p=0.9, seed=0))
            while runner.busy:
                failed = runner.step().failed
                assert not failed, failed
    for name, module in ENCODERS.items():
        model_class = getattr(importlib.import_module(module), name)
        encoder = model_class(model_class.config_class(**TINY)).eval()
        assert AutoConfig.for_model(encoder.config.model_type) is not None
        for dtype in ("F32", "BF16", "F16"):
            texts = EncoderRunner(encoder.to(DTYPES[dtype]), TINY_CONTEXT_TOKENS, LIMITS)
            texts.begin_embedding([1, 2, 3], Pooler(EMBEDDING, 0))
            assert not texts.step().failed
    assert transformers.__version__
