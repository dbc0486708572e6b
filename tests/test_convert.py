"""Conversion of safetensors folders: what comes out has the same tensors, laid out, and every tool reads it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIG, framed, noise
from converted import Described, leftovers, stock_folder, stored
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import prompt_of, run_transformers, save_model
from transformers import AutoModelForCausalLM

from sllm_actor.checkpoint.convert import convert
from sllm_actor.checkpoint.digests import digest
from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.checkpoint.layout import is_pad
from sllm_actor.checkpoint.manifest import OriginFormat
from sllm_actor.checkpoint.safetensors_header import DTYPE_BITS
from sllm_actor.errors import (
    CheckpointCorrupt,
    CheckpointHeaderInvalid,
    CheckpointInvalid,
    CheckpointMissing,
    InvalidInput,
    TargetExists,
    TargetInvalid,
)

ODD: dict[str, Described] = {
    "model.layers.0.weight": ("F32", [16], noise(64, 1)),
    "model.layers.1.weight": ("BF16", [5, 3], noise(30, 2)),
    "größe.名前": ("U8", [7], noise(7, 3)),
    "scalar": ("I64", [], noise(8, 4)),
    "nothing": ("F16", [0, 4], b""),
    "more": ("BOOL", [3], bytes([1, 0, 1])),
}


def test_every_tensor_keeps_its_bytes_dtype_shape_and_name(tmp_path: Path) -> None:
    source = stock_folder(tmp_path / "a", ODD)
    made = convert(source, tmp_path / "b")
    assert stored(tmp_path / "b") == stored(source) == {name: (d, s, raw) for name, (d, s, raw) in ODD.items()}
    assert made.tensors == len(ODD)
    for file in read_folder(tmp_path / "b").files:
        assert file.header.data_begin % 4096 == 0
        assert all(tensor.begin % 64 == 0 for tensor in file.header.tensors if not is_pad(tensor.name))


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_is_copied_byte_by_byte(tmp_path: Path, dtype: str) -> None:
    tensors: dict[str, Described] = {
        "x": (dtype, [4, 8], noise(4 * DTYPE_BITS[dtype], 1)),
        "y": (dtype, [8], noise(DTYPE_BITS[dtype], 2)),
    }
    convert(stock_folder(tmp_path / "a", tensors), tmp_path / "b")
    assert stored(tmp_path / "b") == tensors


TORCH_DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.bool, torch.complex64,
]  # fmt: skip


def test_values_are_equal_in_every_dtype_that_torch_has(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    tensors = {str(dtype): (torch.arange(15).reshape(3, 5) % 2 * 3).to(dtype) for dtype in TORCH_DTYPES}
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    (tmp_path / "a" / "config.json").write_text(json.dumps(CONFIG))
    convert(tmp_path / "a", tmp_path / "b")
    found = {name: value for name, value in load_file(tmp_path / "b" / "model.safetensors").items() if not is_pad(name)}
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype is value.dtype
        assert found[name].view(torch.uint8).equal(value.view(torch.uint8)), name


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([4096, 16384]))
def test_any_folder_comes_through(tmp_path_factory: pytest.TempPathFactory, seed: int, chunk_bytes: int) -> None:
    draw = random.Random(seed)
    folder = tmp_path_factory.mktemp("any")
    files: list[dict[str, Described]] = []
    for k in range(draw.randint(1, 3)):
        sizes = [draw.choice([0, 1, 63, 64, 65, 4096, draw.randint(0, 20_000)]) for _ in range(draw.randint(1, 6))]
        files.append({f"t{k}.{n}": ("U8", [size], draw.randbytes(size)) for n, size in enumerate(sizes)})
    source = stock_folder(folder / "a", *files)
    convert(source, folder / "b", chunk_bytes=chunk_bytes)
    assert stored(folder / "b") == stored(source)
    (file,) = read_folder(folder / "b").files
    raw = (folder / "b" / "model.safetensors").read_bytes()
    assert file.digests == b"".join(digest(raw[at : at + chunk_bytes]) for at in range(0, len(raw), chunk_bytes))


def test_tensors_larger_than_any_buffer_are_copied(tmp_path: Path) -> None:
    tensors: dict[str, Described] = {"x": ("U8", [9_000_001], noise(9_000_001, 1)), "y": ("U8", [5], noise(5, 2))}
    convert(stock_folder(tmp_path / "a", tensors), tmp_path / "b")
    assert stored(tmp_path / "b") == tensors


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "OPTForCausalLM"])
@pytest.mark.parametrize("partitions", [1, 2])
def test_transformers_loads_the_converted_folder_and_computes_the_same(
    tmp_path: Path, architecture: str, partitions: int
) -> None:
    source = save_model(tmp_path / "a", architecture)
    convert(source, tmp_path / "b", partitions=partitions)
    ids = torch.tensor([prompt_of(9)])
    logits = []
    for folder in (source, tmp_path / "b"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        with torch.inference_mode():
            logits.append(model(ids).logits)
    assert logits[0].equal(logits[1])
    assert run_transformers(source, prompt_of(5), 4) == run_transformers(tmp_path / "b", prompt_of(5), 4)


def test_a_sharded_original_becomes_one_file(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "whole", "LlamaForCausalLM"))
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    convert(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").glob("*.safetensors*")] == ["model.safetensors"]
    assert stored(tmp_path / "b") == stored(tmp_path / "a")


def test_a_converted_folder_is_converted_again_in_any_partition(tmp_path: Path) -> None:
    source = stock_folder(tmp_path / "a", {f"layers.{k}.w": ("U8", [70 + k], noise(70 + k, k)) for k in range(5)})
    first = convert(source, tmp_path / "b")
    by_layers = convert(tmp_path / "b", tmp_path / "c", partitions=3)
    back = convert(tmp_path / "c", tmp_path / "d")
    assert stored(tmp_path / "d") == stored(tmp_path / "c") == stored(source)
    assert by_layers.manifest.model_id != first.manifest.model_id == back.manifest.model_id
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (tmp_path / "d" / "model.safetensors").read_bytes()


def test_a_damaged_converted_folder_is_not_given_digests_anew(tmp_path: Path) -> None:
    convert(stock_folder(tmp_path / "a", ODD), tmp_path / "b")
    with (tmp_path / "b" / "model.safetensors").open("r+b") as opened:
        opened.seek(4100)
        byte = opened.read(1)
        opened.seek(4100)
        opened.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors chunk 0"):
        convert(tmp_path / "b", tmp_path / "c")
    assert not (tmp_path / "c").exists() and leftovers(tmp_path) == []


def test_only_what_belongs_to_a_checkpoint_is_copied(tmp_path: Path) -> None:
    source = stock_folder(tmp_path / "a", ODD)
    copied = [
        "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
        "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "spiece.model",
    ]  # fmt: skip
    left = [
        "modeling_x.py",
        "tokenizer.py",
        "tokenizer.pkl",
        "training_args.bin",
        "README.md",
        ".hidden",
        "pytorch_model.bin",
    ]
    for name in [*copied, *left]:
        (source / name).write_text(name)
    (source / "tokenizer").mkdir()
    convert(source, tmp_path / "b")
    expected = {"config.json", "model.safetensors", "sllm.json", *copied}
    assert {path.name for path in (tmp_path / "b").iterdir()} == expected
    assert all((tmp_path / "b" / name).read_text() == name for name in copied)


def test_the_model_id_tells_content_and_not_place_time_or_origin(tmp_path: Path) -> None:
    one = convert(stock_folder(tmp_path / "a", ODD), tmp_path / "b").manifest
    (tmp_path / "far").mkdir()
    halves = [dict(list(ODD.items())[:3]), dict(list(ODD.items())[3:])]
    two = convert(stock_folder(tmp_path / "far" / "a", *halves), tmp_path / "far" / "b").manifest
    assert one.model_id == two.model_id
    assert one.origin.generation != two.origin.generation
    assert one.origin.format is OriginFormat.SAFETENSORS
    changed = ODD | {"scalar": ("I64", [], noise(8, 5))}
    assert convert(stock_folder(tmp_path / "c", changed), tmp_path / "d").manifest.model_id != one.model_id
    config = {**CONFIG, "vocab_size": 17}
    assert convert(stock_folder(tmp_path / "e", ODD, config=config), tmp_path / "f").manifest.model_id != one.model_id


def test_progress_counts_every_byte_once_and_never_goes_back(tmp_path: Path) -> None:
    source = stock_folder(tmp_path / "a", ODD)
    seen: list[tuple[int, int]] = []
    made = convert(source, tmp_path / "b", on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (made.size_bytes, made.size_bytes)
    assert seen == sorted(seen) and len({total for _, total in seen}) == 1
    again: list[tuple[int, int]] = []
    convert(tmp_path / "b", tmp_path / "c", on_progress=lambda done, total: again.append((done, total)))
    assert again[-1] == (2 * made.size_bytes, 2 * made.size_bytes)


def test_an_existing_target_is_replaced_only_when_asked(tmp_path: Path) -> None:
    source = stock_folder(tmp_path / "a", ODD)
    other = stock_folder(tmp_path / "other", {"x": ("U8", [3], b"abc")})
    convert(source, tmp_path / "b")
    with pytest.raises(TargetExists, match="exists"):
        convert(other, tmp_path / "b")
    assert stored(tmp_path / "b") == ODD
    convert(other, tmp_path / "b", replace=True)
    assert stored(tmp_path / "b") == {"x": ("U8", [3], b"abc")}
    assert leftovers(tmp_path) == []


def test_only_a_converted_folder_is_ever_replaced(tmp_path: Path) -> None:
    source = stock_folder(tmp_path / "a", ODD)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    with pytest.raises(TargetExists, match="not converted"):
        convert(source, tmp_path / "home", replace=True)
    assert (tmp_path / "home" / "letter").read_text() == "dear"
    (tmp_path / "file").write_text("x")
    with pytest.raises(TargetExists, match="not a folder"):
        convert(source, tmp_path / "file", replace=True)
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty", replace=True)
    assert stored(tmp_path / "empty") == ODD and leftovers(tmp_path) == []


def test_a_target_that_is_holds_or_lies_in_the_source_is_refused(tmp_path: Path) -> None:
    source = stock_folder(tmp_path / "outer" / "a", ODD)
    for target in (source, source / "b", source / "." / ".." / "a", tmp_path / "outer"):
        with pytest.raises(TargetInvalid):
            convert(source, target, replace=True)
    assert stored(source) == ODD
    assert {path.name for path in source.iterdir()} == {"config.json", "model.safetensors"}


def test_links_lead_nowhere(tmp_path: Path) -> None:
    source = stock_folder(tmp_path / "a", ODD)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(TargetInvalid, match="symbolic link"):
        convert(source, tmp_path / "link", replace=True)
    (tmp_path / "into").symlink_to(source, target_is_directory=True)
    with pytest.raises(TargetInvalid):
        convert(source, tmp_path / "into" / "b")
    (tmp_path / "hole").symlink_to(tmp_path / "nowhere")
    with pytest.raises(TargetInvalid, match="symbolic link"):
        convert(source, tmp_path / "hole")
    (tmp_path / ".b.sllm-partial").symlink_to(source)
    with pytest.raises(TargetInvalid, match="in the way"):
        convert(source, tmp_path / "b")
    assert stored(source) == ODD


def test_a_source_of_links_into_the_replaced_target_is_refused(tmp_path: Path) -> None:
    convert(stock_folder(tmp_path / "a", ODD), tmp_path / "b")
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("config.json", "model.safetensors"):
        (linked / name).symlink_to(tmp_path / "b" / name)
    with pytest.raises(TargetInvalid, match="is a link into"):
        convert(linked, tmp_path / "b", replace=True)
    convert(linked, tmp_path / "c")
    assert stored(tmp_path / "c") == ODD


def test_impossible_targets_and_numbers_are_refused(tmp_path: Path) -> None:
    source = stock_folder(tmp_path / "a", ODD)
    with pytest.raises(TargetInvalid, match="does not exist"):
        convert(source, tmp_path / "no" / "b")
    with pytest.raises(CheckpointInvalid):
        convert(tmp_path / "missing", tmp_path / "b")
    (tmp_path / "plain").touch()
    with pytest.raises(CheckpointMissing):
        convert(tmp_path / "plain", tmp_path / "b")
    for chunk_bytes in (0, 2048, 5000, 2**31):
        with pytest.raises(InvalidInput, match="a chunk"):
            convert(source, tmp_path / "b", chunk_bytes=chunk_bytes)
    for count in (0, -1, 257):
        with pytest.raises(InvalidInput, match="out of bounds"):
            convert(source, tmp_path / "b", partitions=count)
        with pytest.raises(InvalidInput, match="out of bounds"):
            convert(source, tmp_path / "b", tensor_parallel=count)
    with pytest.raises(InvalidInput, match="not both"):
        convert(source, tmp_path / "b", partitions=2, tensor_parallel=2)
    assert not (tmp_path / "b").exists() and leftovers(tmp_path) == []


def test_a_tensor_that_only_looks_like_a_pad_is_refused(tmp_path: Path) -> None:
    source = stock_folder(tmp_path / "a", {"__pad_0__": ("F32", [100], noise(400, 1)), "x": ("U8", [1], b"a")})
    with pytest.raises(CheckpointHeaderInvalid, match="only pads"):
        convert(source, tmp_path / "b")


def test_a_source_without_tensors_or_with_a_damaged_header_is_refused(tmp_path: Path) -> None:
    source = stock_folder(tmp_path / "a", ODD)
    (source / "model.safetensors").write_bytes(framed(b"{"))
    with pytest.raises(CheckpointHeaderInvalid):
        convert(source, tmp_path / "b")
    assert leftovers(tmp_path) == []
