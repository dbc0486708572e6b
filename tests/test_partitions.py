"""Partitions: layers balanced over files, slices that put together are the original, and refusals by name."""

from __future__ import annotations

import importlib
import itertools
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CONFIG, noise
from converted import Described as Raw
from converted import stock_folder, stored
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import save_model
from transformers import AutoConfig, AutoModelForCausalLM

from sllm_actor.checkpoint.convert import convert
from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.checkpoint.layout import Described
from sllm_actor.checkpoint.partitions import balance, by_layers, layer_of, slices
from sllm_actor.checkpoint.safetensors_header import DTYPE_BITS
from sllm_actor.checkpoint.tensor_parallel import TABLES, for_tensor_parallel
from sllm_actor.checkpoint.verify import verify
from sllm_actor.errors import CheckpointUnsplittable

# ---- by layers ----


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.data())
def test_layers_are_balanced_as_well_as_can_be(sizes_bytes: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(sizes_bytes)))
    groups = balance(sizes_bytes, count)
    assert groups == sorted(groups) and set(groups) == set(range(count))

    def largest(assigned: Sequence[int]) -> int:
        return max(sum(s for s, g in zip(sizes_bytes, assigned, strict=True) if g == group) for group in range(count))

    best = min(
        largest([sum(k >= cut for cut in cuts) for k in range(len(sizes_bytes))])
        for cuts in itertools.combinations(range(1, len(sizes_bytes)), count - 1)
    )
    assert largest(groups) == best


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.mlp.up_proj.weight", ("model.layers", 12)),
        ("h.3.attn.c_attn.weight", (".h", 3)),
        ("transformer.h.0.ln_1.bias", ("transformer.h", 0)),
        ("transformer.blocks.7.norm.weight", ("transformer.blocks", 7)),
        ("model.layers.2.mlp.experts.5.w1.weight", ("model.layers", 2)),
        ("encoder.layer.11.output.dense.weight", ("encoder.layer", 11)),
        ("lm_head.weight", None),
        ("model.norm.weight", None),
        ("model.embed_tokens.weight", None),
        ("layers.x.weight", None),
    ],
)
def test_the_layer_of_a_tensor_is_in_its_name(name: str, expected: tuple[str, int] | None) -> None:
    assert layer_of(name) == expected


def test_embeddings_go_to_the_first_file_and_the_head_to_the_last() -> None:
    names = [
        "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight",
        *(f"model.layers.{k}.w" for k in (10, 2, 0, 1)),
    ]  # fmt: skip
    plan = by_layers([Described(name, "U8", (10,), 10) for name in names], 2)
    files = [[piece.tensor.name for piece in pieces] for pieces in plan.files]
    assert files == [
        ["model.embed_tokens.weight", "model.layers.2.w", "model.layers.0.w", "model.layers.1.w"],
        ["lm_head.weight", "model.norm.weight", "model.layers.10.w"],
    ]


def test_more_files_than_layers_are_refused(tmp_path: Path) -> None:
    source = stock_folder(tmp_path / "a", {"layers.0.w": ("U8", [1], b"a"), "x": ("U8", [1], b"b")})
    with pytest.raises(CheckpointUnsplittable, match="1 layers can't be spread over 2 files"):
        convert(source, tmp_path / "b", partitions=2)


def test_a_partitioned_folder_has_an_index_and_no_pad_name_twice(tmp_path: Path) -> None:
    tensors: dict[str, Raw] = {f"layers.{k}.{n}": ("U8", [9], noise(9, k)) for k in range(4) for n in "abc"}
    made = convert(stock_folder(tmp_path / "a", tensors), tmp_path / "b", partitions=4)
    assert [file.name for file in made.manifest.files] == [f"model-0000{k}-of-00004.safetensors" for k in (1, 2, 3, 4)]
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors) and index["metadata"] == {"total_size": 12 * 9}
    pads = [t.name for f in read_folder(tmp_path / "b").files for t in f.header.tensors if "__pad_" in t.name]
    assert sorted(pads) == [f"__pad_{k}__" for k in range(8)] and made.pads == 8


# ---- slices ----

TORCH_DTYPES = {
    "U8": torch.uint8, "BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64, "C64": torch.complex64,
}  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.data())
def test_the_slices_put_together_are_the_original(shape: list[int], data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, 4))
    dimension = data.draw(st.integers(0, len(shape) - 1))
    shape[dimension] *= ranks
    dtype = data.draw(st.sampled_from(sorted(TORCH_DTYPES)))
    torch_dtype = TORCH_DTYPES[dtype]
    count = torch.Size(shape).numel()
    raw = random.Random(count).randbytes(count * DTYPE_BITS[dtype] // 8)
    parts = []
    for piece in slices(Described("x", dtype, tuple(shape), len(raw)), dimension, ranks):
        taken = bytearray(b"".join(raw[begin : begin + length] for begin, length in piece.runs.ranges()))
        assert len(taken) == piece.runs.size_bytes == piece.tensor.size_bytes
        one = torch.frombuffer(taken, dtype=torch_dtype) if taken else torch.empty(0, dtype=torch_dtype)
        parts.append(one.reshape(piece.tensor.shape))
    whole = torch.cat(parts, dimension).contiguous()
    assert list(whole.shape) == shape
    assert bytes(whole.flatten().view(torch.uint8).tolist()) == raw


def test_what_does_not_divide_or_would_cut_a_byte_is_refused() -> None:
    with pytest.raises(CheckpointUnsplittable, match=r"'x' \[6, 5\] can't be cut into 2 along dimension 1"):
        slices(Described("x", "U8", (6, 5), 30), 1, 2)
    with pytest.raises(CheckpointUnsplittable, match="along dimension 2"):
        slices(Described("x", "U8", (6, 4), 24), 2, 2)
    with pytest.raises(CheckpointUnsplittable, match="between two bytes"):
        slices(Described("x", "F4", (2, 2), 2), 1, 2)


ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "opt": "OPTForCausalLM",
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_ranks_of_a_model_put_together_are_the_model(tmp_path: Path, model_type: str, tied: bool) -> None:
    source = save_model(tmp_path / "a", ARCHITECTURES[model_type], tie_word_embeddings=tied)
    made = convert(source, tmp_path / "b", tensor_parallel=2)
    split = made.manifest.partition.split
    ranks = [load_file(tmp_path / "b" / f"model-rank-0000{rank}-of-00002.safetensors") for rank in (0, 1)]
    original = load_file(source / "model.safetensors")
    for name, value in original.items():
        parts = [rank[name] for rank in ranks]
        if name in split:
            assert torch.cat(parts, split[name]).equal(value), name
        else:
            assert parts[0].equal(value) and parts[1].equal(value), name
    assert sum("q_proj" in name for name in split) >= 2
    assert verify(tmp_path / "b").model_id == made.manifest.model_id


@pytest.mark.parametrize("model_type", sorted(TABLES))
def test_the_table_is_that_of_transformers_where_it_has_one(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=8)
    plan: dict[str, str] = dict(getattr(config, "base_model_tp_plan", None) or {})
    if not plan:
        assert model_type == "opt", "the one architecture here for which transformers has no plan"
        return
    head = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    model_class: Any = next(value for name, value in vars(head).items() if name.endswith("ForCausalLM"))
    with torch.device("meta"):
        names = list(model_class(config).state_dict())
    prefix = model_class.base_model_prefix
    styles = {f"{prefix}.{module}": style for module, style in plan.items()} | dict(model_class._tp_plan)
    expected: dict[str, int] = {}
    for name in names:
        module, _, kind = name.rpartition(".")
        style = styles.get(re.sub(r"\.[0-9]+\.", ".*.", module), "replicated")
        if style.startswith("colwise"):
            expected[name] = 0
        elif style == "rowwise" and kind == "weight":
            expected[name] = 1
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in model_class(config).state_dict().items()}
    described = [Described(name, "U8", shape, torch.Size(shape).numel()) for name, shape in shapes.items()]
    found = for_tensor_parallel(described, config.to_dict() | {"num_key_value_heads": 2}, {}, 2).partition.split
    assert found == expected and len(found) > 4


LLAMA = CONFIG | {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}


def plan_of(tensors: dict[str, tuple[int, ...]], config: dict[str, Any], ranks: int) -> dict[str, int]:
    described = [Described(name, "U8", shape, torch.Size(shape).numel()) for name, shape in tensors.items()]
    return for_tensor_parallel(described, config, {}, ranks).partition.split


def test_a_bias_behind_a_cut_by_rows_is_whole_at_every_rank() -> None:
    tensors = {
        "model.decoder.layers.0.self_attn.out_proj.weight": (8, 8),
        "model.decoder.layers.0.self_attn.out_proj.bias": (8,),
        "model.decoder.layers.0.self_attn.q_proj.bias": (8,),
    }
    config = {"model_type": "opt", "num_attention_heads": 4}
    assert plan_of(tensors, config, 2) == {
        "model.decoder.layers.0.self_attn.out_proj.weight": 1,
        "model.decoder.layers.0.self_attn.q_proj.bias": 0,
    }


@pytest.mark.parametrize(
    ("tensor", "shape", "config", "ranks", "said"),
    [
        ("model.layers.0.self_attn.qkv_proj.weight", (8, 8), LLAMA, 2, "qkv_proj.weight' [8, 8] is unknown"),
        ("model.layers.0.mlp.up_proj.weight_scale", (8,), LLAMA, 2, "weight_scale' [8] is unknown"),
        ("model.layers.0.mlp.up_proj.weight", (8,), LLAMA, 2, "up_proj.weight' [8] is unknown"),
        ("visual.proj", (8,), LLAMA, 2, "'visual.proj' [8] is unknown"),
        ("model.layers.0.self_attn.k_proj.weight", (8, 8), LLAMA, 4, "num_key_value_heads 2"),
        ("model.layers.0.self_attn.q_proj.weight", (12, 8), LLAMA, 3, "num_attention_heads 4"),
        ("model.layers.0.self_attn.o_proj.weight", (8, 12), LLAMA, 3, "num_attention_heads 4"),
        ("model.layers.0.self_attn.q_proj.weight", (8, 8), {"model_type": "llama"}, 2, "num_attention_heads None"),
        ("model.layers.0.mlp.up_proj.weight", (7, 8), LLAMA, 2, "can't be cut into 2 along dimension 0"),
        ("lm_head.weight", (7, 8), LLAMA, 2, "'lm_head.weight' [7, 8] can't be cut"),
        ("h.0.attn.c_attn.weight", (8, 24), {"model_type": "gpt2"}, 2, "no split of a 'gpt2' model"),
        ("x", (8,), {}, 2, "no split of a None model"),
    ],
)
def test_what_would_be_split_wrongly_is_refused_by_its_name(
    tensor: str, shape: tuple[int, ...], config: dict[str, Any], ranks: int, said: str
) -> None:
    with pytest.raises(CheckpointUnsplittable) as refused:
        plan_of({tensor: shape}, config, ranks)
    assert said in refused.value.message and tensor in refused.value.message


def test_an_alias_of_a_tensor_that_is_split_otherwise_is_refused() -> None:
    described = [Described("lm_head.weight", "U8", (8, 8), 64)]
    with pytest.raises(CheckpointUnsplittable, match=r"'model\.embed_tokens\.weight' is stored as 'lm_head\.weight'"):
        for_tensor_parallel(described, LLAMA, {"model.embed_tokens.weight": "lm_head.weight"}, 2)
    stored_whole = [Described("model.embed_tokens.weight", "U8", (8, 8), 64)]
    plan = for_tensor_parallel(stored_whole, LLAMA, {"lm_head.weight": "model.embed_tokens.weight"}, 2)
    assert plan.partition.split == {}


def test_slices_are_not_converted_again(tmp_path: Path) -> None:
    source = save_model(tmp_path / "a", "LlamaForCausalLM")
    convert(source, tmp_path / "b", tensor_parallel=2)
    with pytest.raises(CheckpointUnsplittable, match="slices for 2 ranks"):
        convert(tmp_path / "b", tmp_path / "c")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "b")


def test_slices_of_a_pickle_are_those_of_the_model(tmp_path: Path) -> None:
    stock = save_model(tmp_path / "stock", "LlamaForCausalLM")
    source = tmp_path / "a"
    source.mkdir()
    (source / "config.json").write_bytes((stock / "config.json").read_bytes())
    torch.save(load_file(stock / "model.safetensors"), source / "pytorch_model.bin")
    convert(stock, tmp_path / "b", tensor_parallel=2)
    convert(source, tmp_path / "c", tensor_parallel=2)
    for rank in (0, 1):
        name = f"model-rank-0000{rank}-of-00002.safetensors"
        found, expected = load_file(tmp_path / "c" / name), load_file(tmp_path / "b" / name)
        assert found.keys() == expected.keys()
        assert all(found[tensor].equal(expected[tensor]) for tensor in found)
    assert stored(stock)
