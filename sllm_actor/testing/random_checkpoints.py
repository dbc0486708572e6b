"""Checkpoints of real shapes full of seeded noise, written at the speed of the disk, whatever their size.

`python -m sllm_actor.testing.random_checkpoints OUT SHAPE… [--tiny] [--configs FOLDER]` writes stock Hugging Face
folders, one for each `SHAPE` or `SHAPE:SHARDS`. Names and shapes come from the model's own class on the meta
device: no module has storage at any time. Imports torch where a model is asked for: not for a node's own process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from sllm_actor.checkpoint.safetensors_header import DTYPE_BITS
from sllm_actor.units import MIB

SEED = 20240710
_BLOCK_BYTES = 16 * MIB
# Clears the highest bit of each exponent, in 16-bit and 32-bit floats alike: every number is finite and below 2.
_FINITE = {16: 0xBFFF_BFFF_BFFF_BFFF, 32: 0xBFFF_FFFF_BFFF_FFFF}
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


class Weight(NamedTuple):
    """One tensor to write."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def opt(hidden: int, layers: int, vocabulary: int = 50272) -> dict[str, Any]:
    """Give an OPT config in float16 (Zhang et al. 2022, table 1): 768 by 12 is OPT-125M, 2048 by 24 OPT-1.3B."""
    return {
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "torch_dtype": "float16",
        "activation_function": "relu", "do_layer_norm_before": True, "max_position_embeddings": 2048,
        "hidden_size": hidden, "ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64, "vocab_size": vocabulary,
        "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
    }  # fmt: skip


def llama(hidden: int, layers: int, ffn: int, vocabulary: int = 32000, dtype: str = "bfloat16") -> dict[str, Any]:
    """Give a LLaMA config: 4096 by 32 with 11008 in float16 is LLaMA-2-7B."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": dtype,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "tie_word_embeddings": False,
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "vocab_size": vocabulary,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def mixture(hidden: int, layers: int, ffn: int, experts: int) -> dict[str, Any]:
    """Give a config in Mixtral's style: a checkpoint of many small tensors."""
    return llama(hidden, layers, ffn) | {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
        "num_local_experts": experts, "num_experts_per_tok": 2,
    }  # fmt: skip


# Each as published or of that kind, and a tiny one of the same kind.
_CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "opt-125m": (opt(768, 12), opt(64, 2, 512)),
    "opt-1.3b": (opt(2048, 24), opt(128, 2, 512)),
    "llama-1gb": (llama(1536, 16, 4096), llama(64, 2, 128, 512)),
    "llama-2-7b": (llama(4096, 32, 11008, dtype="float16"), llama(64, 3, 128, 512, "float16")),
    "many": (mixture(512, 24, 128, 72), mixture(64, 2, 32, 8)),
    "lora": (llama(4096, 32, 11008, dtype="float16"), llama(128, 2, 256, 512, "float16")),
}
SHAPES = tuple(_CONFIGS)
LORA_RANK = 32


def config_of(shape: str, tiny: bool = False, configs: Path | None = None) -> dict[str, Any]:
    """Give the config of a shape: its published one where the folder `configs` has it, else the one kept here."""
    real, small = _CONFIGS[shape]
    if tiny:
        return small
    published = configs / shape / "config.json" if configs is not None else None
    if published is not None and published.is_file():
        found: dict[str, Any] = json.loads(published.read_text())
        return found
    return real


def weights_of(shape: str, config: dict[str, Any], folder: Path) -> list[Weight]:
    """List the tensors of a shape as `save_pretrained` would write them; `folder` holds its `config.json`."""
    if shape == "many":
        return sorted(_mixture_weights(config))
    if shape == "lora":
        return sorted(_lora_weights(config))
    from sllm_actor.engine import skeleton

    dtype = _DTYPES[config["torch_dtype"]]
    model = skeleton.build(str(folder), dtype)
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    places = model.state_dict()
    return sorted(Weight(name, dtype, tuple(place.shape)) for name, place in places.items() if name not in tied)


def _mixture_weights(config: dict[str, Any]) -> Iterator[Weight]:
    """By hand, since transformers merges the experts as it builds them, and the files of real ones do not."""
    hidden, ffn, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    for name in ("model.embed_tokens", "lm_head"):
        yield Weight(f"{name}.weight", "BF16", (vocabulary, hidden))
    yield Weight("model.norm.weight", "BF16", (hidden,))
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield Weight(f"{at}.{name}.weight", "BF16", (hidden,))
        for name in "qkvo":
            yield Weight(f"{at}.self_attn.{name}_proj.weight", "BF16", (hidden, hidden))
        yield Weight(f"{at}.block_sparse_moe.gate.weight", "BF16", (config["num_local_experts"], hidden))
        for expert in range(config["num_local_experts"]):
            of = f"{at}.block_sparse_moe.experts.{expert}"
            for name, shape in (("w1", (ffn, hidden)), ("w2", (hidden, ffn)), ("w3", (ffn, hidden))):
                yield Weight(f"{of}.{name}.weight", "BF16", shape)


def _lora_weights(config: dict[str, Any]) -> Iterator[Weight]:
    """An adapter of attention and the way down, in peft's names."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    inputs = {f"self_attn.{name}_proj": hidden for name in "qkvo"} | {"mlp.down_proj": ffn}
    for layer in range(config["num_hidden_layers"]):
        for name, width in inputs.items():
            at = f"base_model.model.model.layers.{layer}.{name}"
            yield Weight(f"{at}.lora_A.weight", "F16", (LORA_RANK, width))
            yield Weight(f"{at}.lora_B.weight", "F16", (hidden, LORA_RANK))


def save(out: Path, shape: str, *, shards: int = 1, tiny: bool = False, configs: Path | None = None) -> None:
    """Write a checkpoint folder of a shape, whole or not at all; keeps what is there.

    The same shape has the same bytes in every layout: each tensor's noise depends on its name and the shape alone.
    """
    if (out / "config.json").exists():
        return
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    config = config_of(shape, tiny, configs)
    (unfinished / "config.json").write_text(json.dumps(config, indent=2))
    parts = _share_out(weights_of(shape, config, unfinished), shards)
    names = ["model.safetensors"]
    if len(parts) > 1:
        names = [f"model-{k:05}-of-{len(parts):05}.safetensors" for k in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        write_weights(unfinished / name, part, shape)
    if len(parts) > 1:
        weight_map = {weight.name: name for name, part in zip(names, parts, strict=True) for weight in part}
        size_bytes = sum(weight.size_bytes for part in parts for weight in part)
        index = {"metadata": {"total_size": size_bytes}, "weight_map": weight_map}
        (unfinished / "model.safetensors.index.json").write_text(json.dumps(index))
    os.rename(unfinished, out)


def _share_out(weights: Sequence[Weight], shards: int) -> list[list[Weight]]:
    """Cut into so many shards of about the same size, in order."""
    total_bytes = sum(weight.size_bytes for weight in weights)
    parts: list[list[Weight]] = [[] for _ in range(shards)]
    done_bytes = 0
    for weight in weights:
        parts[min(done_bytes * shards // total_bytes, shards - 1)].append(weight)
        done_bytes += weight.size_bytes
    return [part for part in parts if part]


def write_weights(path: Path, weights: Iterable[Weight], salt: str) -> None:
    """Write a safetensors file of noise, 16 MiB of memory at a time."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered, end = list(weights), 0
    for weight in ordered:
        begin, end = end, end + weight.size_bytes
        entries[weight.name] = {"dtype": weight.dtype, "shape": weight.shape, "data_offsets": (begin, end)}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for weight in ordered:
            for block in _noise(weight, salt):
                file.write(block)
        file.flush()
        os.fsync(file.fileno())


def _noise(weight: Weight, salt: str) -> Iterator[memoryview]:
    generator = numpy.random.Generator(numpy.random.SFC64([SEED, zlib.crc32(f"{salt}/{weight.name}".encode())]))
    finite = numpy.uint64(_FINITE[DTYPE_BITS[weight.dtype]])
    left = weight.size_bytes
    while left > 0:
        length = min(left, _BLOCK_BYTES)
        words = generator.integers(0, 2**64, -(-length // 8), numpy.uint64) & finite
        yield words.view(numpy.uint8).data[:length]
        left -= length


def main() -> None:
    """Write what the command line names."""
    parser = argparse.ArgumentParser(description=save.__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("shapes", nargs="+", metavar="SHAPE[:SHARDS]", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--tiny", action="store_true", help="kilobytes of the same kind")
    parser.add_argument("--configs", type=Path, help="a folder of published configs, one folder a model")
    arguments = parser.parse_args()
    for named in arguments.shapes:
        shape, _, shards = named.partition(":")
        out = arguments.out / (f"{shape}-sharded" if shards else shape)
        save(out, shape, shards=int(shards or 1), tiny=arguments.tiny, configs=arguments.configs)


if __name__ == "__main__":
    main()
