"""What the fork server does before the first fork: imports, and a forward pass of every architecture.

The pass is tiny and single-threaded: it pays for lazy imports and dispatch tables once, and starts no thread.
"""

from __future__ import annotations

import importlib

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from sllm_actor.engine.architectures import MODULES
from sllm_actor.engine.kv_cache import new_cache
from sllm_actor.engine.skeleton import DTYPES

TINY = {
    "hidden_size": 16, "intermediate_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 32, "word_embed_proj_dim": 16,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def warm() -> None:
    """Import and run every architecture that engines serve."""
    torch.set_num_threads(1)
    assert AutoTokenizer is not None
    for name, module in MODULES.items():
        model_class = getattr(importlib.import_module(module), name)
        config = model_class.config_class(**TINY)
        assert AutoConfig.for_model(config.model_type) is not None
        model = model_class(config).eval()
        for dtype in ("F32", "BF16", "F16"):
            model.to(DTYPES[dtype])
            cache = new_cache(1, 16)
            with torch.inference_mode():
                for tokens in ([1, 2, 3], [4]):
                    model(
                        input_ids=torch.tensor([tokens]),
                        past_key_values=cache,
                        use_cache=True,
                        logits_to_keep=1,
                    )
    assert transformers.__version__
