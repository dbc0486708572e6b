"""Checkpoint folders: what is read out of them, and what is refused by name."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from checkpoints import CONFIG, entry, folder_of, framed, weight_bytes, write_config
from header_oracle import by_rust, by_us, differ
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.checkpoint.safetensors_header import DTYPE_BITS, Header, parse_header
from sllm_actor.errors import (
    CheckpointConfigInvalid,
    CheckpointEmpty,
    CheckpointHeaderInvalid,
    CheckpointInvalid,
    CheckpointMissing,
    CheckpointTruncated,
    PickleCheckpoint,
)

rust: Any = safetensors
ONE = {"a": entry("F32", [1], 0, 4)}


def parse(header: dict[str, Any] | str | bytes, data_bytes: int = 4) -> Header:
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = framed(text.encode() if isinstance(text, str) else text)
    return parse_header(raw, len(raw) + data_bytes, "x.safetensors")


# ---- headers ----


def test_a_header_gives_names_types_shapes_and_absolute_offsets() -> None:
    header = parse({"__metadata__": {"format": "pt"}, "b": entry("F16", [2, 1], 4, 8), **ONE}, 8)
    assert header.metadata == {"format": "pt"}
    assert [tensor.name for tensor in header.tensors] == ["a", "b"]
    b = header.tensors[1]
    assert (b.dtype, b.shape) == ("F16", (2, 1))
    assert (b.begin, b.end) == (header.data_begin + 4, header.data_begin + 8)


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_of_the_library_is_read(dtype: str) -> None:
    size = DTYPE_BITS[dtype]  # 8 elements of that many bits
    assert parse({"a": entry(dtype, [8], 0, size)}, size).tensors[0].dtype == dtype
    assert rust.deserialize(framed(json.dumps({"a": entry(dtype, [8], 0, size)}).encode(), bytes(size)))


def test_a_header_padded_with_spaces_is_read() -> None:
    assert parse(json.dumps(ONE) + "   ").tensors


def test_a_header_without_tensors_is_read() -> None:
    assert parse({}, 0).tensors == ()


REFUSED: dict[str, Any] = {
    "not UTF-8": b'{"\xff": 1}',
    "not begin with": " " + json.dumps(ONE),
    "not JSON": '{"a": ',
    "given twice": '{"a": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    "'a' is given twice": json.dumps(ONE)[:-1] + ", " + json.dumps(ONE)[1:],
    "__metadata__": {"__metadata__": {"a": 1}, **ONE},
    "leaves a hole": {"a": entry("F32", [1], 1, 5)},
    "overlaps": {**ONE, "b": entry("F32", [1], 2, 6)},
    "spans -1 bytes": {"a": entry("U8", [1], 0, -1)},
    "spans 4 bytes": {"a": entry("F32", [2], 0, 4)},
    "unknown dtype": {"a": entry("f32", [1], 0, 4)},
    "impossible shape": {"a": entry("U8", [2**63, 4, 0], 0, 0)},
    "impossible": {"a": entry("U8", [-1, -4], 0, 4)},
    "too many": {"a": entry("F64", [2**62], 0, 4)},
    "whole number of bytes": {"a": entry("F4", [3], 0, 2)},
    "Expected `int`, got `float`": '{"a": {"dtype": "U8", "shape": [-0], "data_offsets": [0, 0]}}',
    "unknown field": {"a": {**ONE["a"], "extra": 1}},
    "got `array`": {"a": ["F32", [1], [0, 4]]},
    "Expected `int`, got `bool`": {"a": entry("U8", [True], 0, 1)},
    "length 2": {"a": {**ONE["a"], "data_offsets": [0, 4, 4]}},
    "missing required": {"a": {"dtype": "F32", "shape": [1]}},
    "tensors end at byte": {"a": entry("U8", [3], 0, 3)},
    "it is not UTF-8": '{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    "nested too deeply": '{"a": ' * 100_000,
}


@pytest.mark.parametrize("said", REFUSED)
def test_a_lying_header_is_refused_with_the_file_and_the_reason(said: str) -> None:
    with pytest.raises(CheckpointHeaderInvalid, match=r"x\.safetensors") as refused:
        parse(REFUSED[said])
    assert said in refused.value.message


def test_a_header_longer_than_any_may_be_is_refused_before_it_is_read() -> None:
    with pytest.raises(CheckpointHeaderInvalid, match="100000001"):
        parse_header((100_000_001).to_bytes(8, "little"), 10**12)


def test_a_file_that_ends_in_its_header_is_truncated() -> None:
    with pytest.raises(CheckpointTruncated, match="has 7 bytes"):
        parse_header(b"", 7)
    with pytest.raises(CheckpointTruncated, match="has 20 bytes and its header alone needs 108"):
        parse_header((100).to_bytes(8, "little"), 20)


def test_a_file_that_ends_in_its_tensors_is_truncated() -> None:
    with pytest.raises(CheckpointTruncated, match=r"x\.safetensors has \d+ bytes and its tensors need \d+"):
        parse(ONE, 3)
    assert parse(ONE, 4).tensors


TENSORS = st.lists(
    st.tuples(st.text(max_size=4), st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.integers(0, 4), max_size=3)),
    max_size=4,
    unique_by=lambda tensor: tensor[0],
)
SCRAPS = st.sampled_from(
    [
        b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u00", b"\\ud800", b"0", b"-", b"-0", b"1", b"8",
        b".0", b"e1", b" ", b"\n", b"\0", b"\xff", b"\xc3\xa9", b"null", b"true", b"NaN", b"1e999",
        b"18446744073709551616",
        b'"F32"', b'"x":1,', b'"dtype":"U8",', b'"__metadata__":{},', b'"__metadata__":null,',
        b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},',
    ]
)  # fmt: skip
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), SCRAPS), max_size=3)


def header_text(tensors: list[tuple[str, str, list[int]]]) -> tuple[bytes, int]:
    described, at = {}, 0
    for name, dtype, shape in tensors:
        bits = DTYPE_BITS[dtype]
        for length in shape:
            bits *= length
        described[name] = entry(dtype, shape, at, at + bits // 8)
        at += bits // 8
    return json.dumps(described, separators=(",", ":"), ensure_ascii=len(tensors) % 2 == 0).encode(), at


@settings(max_examples=1500, deadline=None)
@given(TENSORS, EDITS, st.integers(-1, 1))
def test_headers_are_accepted_and_refused_as_the_rust_library_does(
    tensors: list[tuple[str, str, list[int]]], edits: list[tuple[float, int, bytes]], more_bytes: int
) -> None:
    header, data_bytes = header_text(tensors)
    for where, removed, scrap in edits:
        at = int(where * len(header))
        header = header[:at] + scrap + header[at + removed :]
    size_bytes = max(0, data_bytes + (more_bytes if edits else 0))
    # Bytes that differ show where a tensor was thought to begin.
    assert not differ(framed(header, bytes(at % 251 for at in range(size_bytes))))


@pytest.mark.parametrize(
    "header",
    [
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
        '{"__metadata__":{"k":"1","k":"2"},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        ' {"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        '{"a":["U8",[1],[0,1]]}',
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":{"y":[null]}}}',
        '{"a":{"dtype":{"U8":null},"shape":[1],"data_offsets":[0,1]}}',
    ],
)
def test_what_we_are_stricter_in_is_what_the_rust_library_lets_pass(header: str) -> None:
    raw = framed(header.encode(), b"x")
    assert by_rust(raw) is not None and by_us(raw)[0] is None
    assert not differ(raw)


# ---- folders ----


def test_a_folder_of_one_file_is_described(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3, 2), "y": torch.zeros(5, dtype=torch.int8)}, tmp_path / "model.safetensors")
    write_config(tmp_path)
    found = read_folder(tmp_path)
    stat = (tmp_path / "model.safetensors").stat()
    (file,) = found.files
    assert (file.name, file.size_bytes) == ("model.safetensors", stat.st_size)
    assert (file.mtime_ns, file.inode) == (stat.st_mtime_ns, stat.st_ino)
    assert {(tensor.name, tensor.dtype, tensor.shape) for tensor in file.header.tensors} == {
        ("x", "F32", (3, 2)),
        ("y", "I8", (5,)),
    }
    assert (found.dtype, found.architectures, found.config) == ("F32", ("OPTForCausalLM",), CONFIG)
    assert found.size_bytes == stat.st_size
    assert found.file_path(file) == tmp_path / "model.safetensors"


def test_offsets_point_at_the_bytes_of_the_tensor(tmp_path: Path) -> None:
    save_file({"x": torch.arange(7.0), "y": torch.arange(3)}, tmp_path / "model.safetensors")
    write_config(tmp_path)
    (file,) = read_folder(tmp_path).files
    raw = (tmp_path / "model.safetensors").read_bytes()
    span = {tensor.name: raw[tensor.begin : tensor.end] for tensor in file.header.tensors}
    assert torch.frombuffer(bytearray(span["x"]), dtype=torch.float32).equal(torch.arange(7.0))
    assert torch.frombuffer(bytearray(span["y"]), dtype=torch.int64).equal(torch.arange(3))


def test_shards_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    found = read_folder(folder_of(tmp_path, 300, 400, 500))
    assert [file.size_bytes for file in found.files] == [300, 400, 500]
    assert found.size_bytes == 1200


def test_a_whole_set_of_shards_needs_no_index_and_a_part_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, 300, 400)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert len(read_folder(tmp_path).files) == 2
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointTruncated, match="1 of 2 shards"):
        read_folder(tmp_path)


def test_a_lone_first_shard_of_one_is_read(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(weight_bytes(300))
    assert read_folder(tmp_path).size_bytes == 300


def test_a_folder_of_links_as_the_hub_cache_has_them_is_read(tmp_path: Path) -> None:
    snapshot = folder_of(tmp_path / "snapshots" / "abc", 300)
    (tmp_path / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).rename(tmp_path / "blobs" / name)
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    found = read_folder(snapshot)
    assert found.files[0].inode == (tmp_path / "blobs" / "model.safetensors").stat().st_ino
    assert found.files[0].name == "model.safetensors"


def test_the_fingerprint_is_kept_by_reading_and_moving_and_changed_by_writing(tmp_path: Path) -> None:
    first = read_folder(folder_of(tmp_path / "a", 300)).fingerprint
    assert len(first) == 32 and first == read_folder(tmp_path / "a").fingerprint
    (tmp_path / "a").rename(tmp_path / "b")
    assert first == read_folder(tmp_path / "b").fingerprint
    os.utime(tmp_path / "b" / "model.safetensors", ns=(1, 1))
    second = read_folder(tmp_path / "b").fingerprint
    write_config(tmp_path / "b", {**CONFIG, "vocab_size": 17})
    assert len({first, second, read_folder(tmp_path / "b").fingerprint}) == 3


def test_no_folder_and_no_weights_are_two_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissing):
        read_folder(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointMissing):
        read_folder(tmp_path / "file")
    with pytest.raises(CheckpointEmpty):
        read_folder(tmp_path)
    write_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(framed(b"{}"))
    with pytest.raises(CheckpointEmpty, match="no tensors"):
        read_folder(tmp_path)


def test_a_truncated_file_is_named_with_both_sizes(tmp_path: Path) -> None:
    folder_of(tmp_path, 300)
    os.truncate(tmp_path / "model.safetensors", 299)
    with pytest.raises(CheckpointTruncated, match=r"model\.safetensors has 299 bytes and its tensors need 300"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "a/b.safetensors", ".hidden.safetensors", "x.bin", "x\n.safetensors", 7]
)
def test_an_index_that_names_a_file_outside_the_alphabet_is_refused(tmp_path: Path, name: object) -> None:
    folder_of(tmp_path, 300, 400)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight.1": name}}))
    with pytest.raises(CheckpointConfigInvalid, match="impossible name"):
        read_folder(tmp_path)


def test_an_index_is_held_to_what_the_shards_say(tmp_path: Path) -> None:
    folder_of(tmp_path, 300, 400)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**good, "weight.1": good["weight.2"]}}))
    with pytest.raises(CheckpointHeaderInvalid, match=r"'weight\.1' in model-00002"):
        read_folder(tmp_path)
    index.write_text(json.dumps({"weight_map": {**good, "weight.3": "missing.safetensors"}}))
    with pytest.raises(CheckpointTruncated, match=r"missing\.safetensors"):
        read_folder(tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointConfigInvalid, match="weight_map"):
        read_folder(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, 300, 400)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(weight_bytes(400, name="weight.1"))
    with pytest.raises(CheckpointHeaderInvalid, match="is in both"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "text", [None, "", "[]", "{", "\udcff", '{"x": "' + "y" * 1_000_000 + '"}', '{"architectures": "OPT"}']
)
def test_a_config_that_cannot_be_used_is_refused(tmp_path: Path, text: str | None) -> None:
    folder_of(tmp_path, 300)
    (tmp_path / "config.json").unlink()
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointConfigInvalid, match=r"config\.json"):
        read_folder(tmp_path)


def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(tmp_path: Path) -> None:
    folder_of(tmp_path, 300)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointInvalid, match="not a regular file"):
        read_folder(tmp_path)


def test_pickled_weights_are_refused_with_a_command_that_converts_them(tmp_path: Path) -> None:
    source = tmp_path / "it's pickled"
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(source)
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(PickleCheckpoint, match="never loaded") as refused:
        read_folder(source)
    program, *arguments = shlex.split(refused.value.message.splitlines()[-1])
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True)
    target = source.with_name("it's pickled-safetensors")
    converted = read_folder(target)
    assert (converted.dtype, converted.architectures) == ("BF16", ("LlamaForCausalLM",))
    assert sorted(path.name for path in target.glob("*.bin")) == []
    assert (target / "tokenizer.json").exists()


def test_one_file_of_safetensors_beside_a_pickle_is_enough(tmp_path: Path) -> None:
    folder_of(tmp_path, 300)
    (tmp_path / "pytorch_model.bin").touch()
    assert read_folder(tmp_path).size_bytes == 300
