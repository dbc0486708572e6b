"""Builders of LoRA adapters for tests, in PEFT's layout, and the models that they amount to."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import attach
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.checkpoint.safetensors_header import parse_header
from sllm_actor.engine import lora
from sllm_actor.engine.mapped_tensors import MappedTensors

RANK = 4


def save_adapter(
    folder: Path,
    base: Path,
    targets: Sequence[str] | str,
    *,
    seed: int = 1,
    rank: int = RANK,
    ranks: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:
    """Save an adapter of the linear modules whose names end in `targets`; strong enough to change every answer."""
    model = attach(base)
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, (into, out) in lora.linear_modules(model).items():
        if isinstance(targets, str) or any(name.endswith(f".{target}") for target in targets):
            own = next((rank for key, rank in (ranks or {}).items() if name.endswith(f".{key}")), rank)
            down, up = torch.randn(own, into, generator=random), torch.randn(out, own, generator=random)
            tensors[f"base_model.model.{name}.lora_A.weight"] = (down * 0.2).to(dtype)
            tensors[f"base_model.model.{name}.lora_B.weight"] = (up * 0.2).to(dtype)
    assert tensors
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "base_model_name_or_path": str(base), "r": rank, "lora_alpha": 8, "bias": "none",
        "target_modules": targets if isinstance(targets, str) else list(targets), "rank_pattern": dict(ranks or {}),
        "alpha_pattern": {}, "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None,
        "init_lora_weights": True, "inference_mode": True, "lora_dropout": 0.05, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


def change_adapter(folder: Path, **changes: Any) -> Path:
    """Write other values into a saved adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def merged(base: Path, adapter: Path, out: Path) -> Path:
    """Save a model whose weights are the base's with the adapter's added, computed apart from the engine."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    for name, module in model.named_modules():
        down = tensors.get(f"base_model.model.{name}.lora_A.weight")
        if down is None:
            continue
        up = tensors[f"base_model.model.{name}.lora_B.weight"]
        alpha = next((a for key, a in config["alpha_pattern"].items() if name.endswith(key)), config["lora_alpha"])
        scale = alpha / (math.sqrt(len(down)) if config["use_rslora"] else len(down))
        with torch.no_grad():
            change = scale * (up.double() @ down.double())
            module.weight.add_((change.T if isinstance(module, Conv1D) else change).to(module.weight.dtype))
    model.save_pretrained(out)
    return out


def load_adapter(model: Any, folder: Path) -> lora.Adapter:
    """Load an adapter as an engine does."""
    found = read_folder(folder)
    assert found.adapter is not None
    data = memoryview(bytearray((folder / found.files[0].name).read_bytes()))
    tensors = parse_header(data, len(data), "adapter").tensors
    placed = lora.match(model, found.adapter, tensors)
    lora.check_targets(model, found.adapter, placed)
    return lora.make(found.adapter, placed, MappedTensors(data).view, model.device)
