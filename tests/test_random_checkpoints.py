"""Checkpoints of noise are what `save_pretrained` would write, but for their values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.testing.random_checkpoints import SHAPES, config_of, save, weights_of


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_a_folder_that_we_and_safetensors_read(tmp_path: Path, shape: str) -> None:
    save(tmp_path / shape, shape, tiny=True)
    (file,) = read_folder(tmp_path / shape).files
    tensors = load_file(tmp_path / shape / "model.safetensors")
    assert {tensor.name for tensor in file.header.tensors} == tensors.keys()
    assert all(value.isfinite().all() for value in tensors.values())


@pytest.mark.parametrize("shape", ["opt-125m", "llama-1gb"])
def test_transformers_finds_every_weight_of_a_model(tmp_path: Path, shape: str) -> None:
    save(tmp_path / shape, shape, tiny=True)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / shape, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_the_same_shape_has_the_same_bytes_in_shards(tmp_path: Path) -> None:
    save(tmp_path / "whole", "opt-125m", tiny=True)
    save(tmp_path / "cut", "opt-125m", tiny=True, shards=3)
    files = read_folder(tmp_path / "cut").files
    cut = {name: value for file in files for name, value in load_file(tmp_path / "cut" / file.name).items()}
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert len(files) == 3
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_second_writing_gives_the_same_bytes_and_another_tensor_others(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(tmp_path / name, "lora", tiny=True)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    tensors = list(load_file(tmp_path / "one" / "model.safetensors").values())
    assert not torch.equal(tensors[0], tensors[2])


def test_the_real_sizes_are_those_that_the_benchmark_wants(tmp_path: Path) -> None:
    many = weights_of("many", config_of("many"), tmp_path)
    lora = weights_of("lora", config_of("lora"), tmp_path)
    assert len(many) > 5000
    assert 500e6 < sum(weight.size_bytes for weight in many) < 1e9
    assert 90e6 < sum(weight.size_bytes for weight in lora) < 110e6
