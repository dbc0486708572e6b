"""Builders of tiny models for tests: random weights, saved by transformers as a stock folder."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.checkpoint.safetensors_header import Tensor, parse_header
from sllm_actor.domain import EngineLimits, Sampling
from sllm_actor.engine import skeleton
from sllm_actor.engine.architectures import EVERY
from sllm_actor.engine.generation import Generation
from sllm_actor.engine.mapped_tensors import MappedTensors
from sllm_actor.engine.runner import Runner

# Tiny products gain nothing from a second thread, and wait long for it on a busy machine.
torch.set_num_threads(1)

CONTEXT_TOKENS = 320
VOCABULARY_TOKENS = 128
LIMITS = EngineLimits(slots=8, kv_cache_bytes=64 * 1024 * 1024, prefill_chunk_tokens=32)

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "word_embed_proj_dim": 32,
    "head_dim": 8,
    "vocab_size": VOCABULARY_TOKENS,
    "max_position_embeddings": CONTEXT_TOKENS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "dim": 32,
    "hidden_dim": 48,
    "n_heads": 4,
    "n_layers": 2,
}


def save_model(folder: Path, architecture: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save a model whose weights are large enough that every token depends on all before it."""
    model_class = getattr(importlib.import_module(EVERY[architecture]), architecture)
    shape = _SHAPE | changes
    if architecture.startswith("Falcon"):
        del shape["head_dim"]  # Falcon's follows from the others, and can't be set.
    # The same weights every time: among others' answers there is a near tie now and then, which is anybody's.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model: PreTrainedModel = model_class(model_class.config_class(**shape))
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.2)
    model.to(dtype).save_pretrained(folder)
    return folder


def change_config(folder: Path, **changes: Any) -> Path:
    """Write other values into a saved config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]) -> Path:
    """Write other tensors into a saved model.safetensors."""
    path = folder / "model.safetensors"
    save_file(
        {name: value.contiguous().clone() for name, value in change(load_file(path)).items()},
        path,
        {"format": "pt"},
    )
    return folder


def tensor_names(folder: Path) -> list[str]:
    return [tensor.name for file in read_folder(folder).files for tensor in file.header.tensors]


def attach(folder: Path, *, shift_bytes: int = 0, generates: bool = True) -> PreTrainedModel:
    """Build and fill the model as an engine does; `shift_bytes` lays the bytes that far off alignment."""
    checkpoint = read_folder(folder)
    model = skeleton.build(str(folder), checkpoint.dtype, generates=generates)
    owner: dict[str, MappedTensors] = {}
    tensors: list[Tensor] = []
    for file in checkpoint.files:
        raw = (folder / file.name).read_bytes()
        data = memoryview(bytearray(shift_bytes) + raw)[shift_bytes:]
        header = parse_header(data, len(data), file.name)
        tensors += header.tensors
        owner |= dict.fromkeys((tensor.name for tensor in header.tensors), MappedTensors(data))
    paired = skeleton.match(model, tensors, checkpoint.aliases)
    skeleton.put_weights(model, {name: owner[tensor.name].view(tensor) for name, tensor in paired.items()})
    return model


def greedy(max_tokens: int) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=0.0, top_p=1.0, seed=0, ignore_eos=True)


def finish(runner: Runner) -> None:
    """Step until nothing runs; nothing may fail."""
    while runner.busy:
        failed = runner.step().failed
        assert failed == [], failed


def run(model: PreTrainedModel, prompt: Sequence[int], sampling: Sampling, eos: Sequence[int] = ()) -> list[int]:
    """Generate with our own loop."""
    runner = Runner(model, eos, CONTEXT_TOKENS, LIMITS)
    generation: Generation = runner.begin(prompt, sampling)
    finish(runner)
    return generation.tokens


def run_transformers(folder: Path, prompt: Sequence[int], tokens: int) -> list[int]:
    """Generate with transformers' own `generate`, from its own loading."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return list(out[0, len(prompt) :].tolist())


def logit_gap(folder: Path, tokens: Sequence[int], one: int, other: int) -> float:
    """Tell how far apart transformers has the next token's logits of two tokens, relative to the largest of all."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.inference_mode():
        logits = model(torch.tensor([list(tokens)])).logits[0, -1].float()
    return float((logits[one] - logits[other]).abs() / logits.abs().max())


def prompt_of(tokens: int, seed: int = 0) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    return list(torch.randint(3, VOCABULARY_TOKENS, (tokens,), generator=random).tolist())
