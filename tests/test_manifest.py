"""sllm.json: what it says is held against the folder, and every lie in it is named."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CONFIG, noise, write_config
from converted import Described, stock_folder, write_tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_actor.checkpoint import manifest as manifests
from sllm_actor.checkpoint.convert import convert
from sllm_actor.checkpoint.digests import ChunkDigests, digest
from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.checkpoint.manifest import belongs, encode, parse_manifest, read_manifest
from sllm_actor.errors import CheckpointInvalid

TENSORS: dict[str, Described] = {
    f"model.layers.{k}.mlp.up_proj.weight": ("F32", [8, 40], noise(1280, k)) for k in range(4)
} | {"model.layers.0.self_attn.q_proj.weight": ("F32", [8, 40], noise(1280, 9))}
LLAMA = CONFIG | {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4}

Json = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = stock_folder(tmp_path / "a", TENSORS, config=LLAMA)
    (source / "tokenizer.json").write_text("{}")
    return convert(source, tmp_path / "b", chunk_bytes=4096).path


def signed(content: Json) -> Json:
    """Give changed content the model id that it now has, as docs/checkpoint_format.md describes it."""
    signed_part = {key: value for key, value in content.items() if key not in ("model_id", "origin")}
    text = json.dumps(signed_part, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return content | {"model_id": hashlib.sha256(text.encode()).hexdigest()}


def change(folder: Path, edit: Callable[[Json], object]) -> None:
    path = folder / "sllm.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(signed(content)))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointInvalid, match=r"sllm\.json") as refused:
        read_folder(folder)
    return refused.value.message


def test_a_converted_folder_has_a_digest_for_each_chunk_of_each_file(folder: Path) -> None:
    found = read_folder(folder)
    (file,) = found.files
    raw = (folder / "model.safetensors").read_bytes()
    assert found.digest_bytes == 4096
    assert file.digests == b"".join(digest(raw[at : at + 4096]) for at in range(0, len(raw), 4096))
    assert (
        found.manifest is not None
        and found.manifest.model_id == signed(json.loads((folder / "sllm.json").read_text()))["model_id"]
    )


def test_a_stock_folder_has_no_manifest_no_digests_and_one_rank(tmp_path: Path) -> None:
    found = read_folder(stock_folder(tmp_path / "a", TENSORS))
    assert (found.manifest, found.digest_bytes, found.files[0].digests, found.aliases) == (None, 0, b"", {})
    assert found.ranks == 1 and found.files_of_rank(0) == found.files


def test_a_manifest_is_written_and_read_back(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest is not None and parse_manifest(encode(manifest)) == manifest
    assert [other.name for other in manifest.others] == ["config.json", "tokenizer.json"]


def put(*path: str | int, value: Any) -> Callable[[Json], object]:
    def edit(content: Json) -> None:
        at: Any = content
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = value

    return edit


A = "model.layers.0.mlp.up_proj.weight"
LIES: dict[str, tuple[Callable[[Json], object], str]] = {
    "version": (put("format_version", value=2), "format version 2"),
    "unknown field": (put("extra", value=1), "unknown field `extra`"),
    "unknown field inside": (put("files", 0, "extra", value=1), "unknown field `extra`"),
    "missing field": (lambda content: content.pop("aliases"), "missing required field `aliases`"),
    "chunk size not a power": (put("chunk_bytes", value=4098), "not a power of two"),
    "chunk size too small": (put("chunk_bytes", value=2048), ">= 4096"),
    "chunk size too large": (put("chunk_bytes", value=2**31), "<= 1073741824"),
    "no files": (put("files", value=[]), "length >= 1"),
    "negative size": (put("files", 0, "size_bytes", value=-1), ">= 0"),
    "impossible name": (put("files", 0, "name", value="../model.safetensors"), "regex"),
    "name with a newline": (put("files", 0, "name", value="model.safetensors\n"), "regex"),
    "other name": (put("files", 0, "name", value="x.safetensors"), "none of 1 needs model.safetensors"),
    "digest in capitals": (put("files", 0, "digests", 0, value="A" * 32), "regex"),
    "digest too short": (put("files", 0, "header_digest", value="a" * 31), "regex"),
    "fewer digests": (lambda content: content["files"][0]["digests"].pop(), "has 2 digests and needs 3"),
    "more digests": (lambda content: content["files"][0]["digests"].append("0" * 32), "has 4 digests and needs 3"),
    "header digest": (put("files", 0, "header_digest", value="0" * 32), "should have " + "0" * 32),
    "other size": (put("others", 1, "size_bytes", value=3), "tokenizer.json has 2 bytes and should have 3"),
    "config digest": (put("others", 0, "digest", value="0" * 32), "config.json has digest"),
    "other twice": (lambda content: content["others"].append(content["others"][1]), "a file twice"),
    "other is code": (put("others", 1, "name", value="tokenizer.py"), "tokenizer.py is not a file that belongs"),
    "other not listed": (lambda content: content["others"].pop(), "tokenizer.json is in the folder and not listed"),
    "other is missing": (put("others", 1, "name", value="vocab.json"), "not listed"),
    "alias of nothing": (put("aliases", value={"x": "y"}), "'y', which is not stored"),
    "alias of an alias": (put("aliases", value={"x": "y", "y": A}), "itself an alias"),
    "alias that is stored": (put("aliases", value={A: A.replace("0", "1")}), "both stored and an alias"),
    "kind": (put("partition", "kind", value="rows"), "Invalid enum value"),
    "count": (put("partition", "count", value=2), "2 partitions of kind none"),
    "count out of bounds": (put("partition", "count", value=257), "<= 256"),
    "split without ranks": (put("partition", "split", value={A: 0}), "split tensors and the partition kind none"),
    "origin": (put("origin", "format", value="onnx"), "Invalid enum value"),
    "generation": (put("origin", "generation", value="new"), "regex"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_is_refused_with_what_disagrees(folder: Path, lie: str) -> None:
    assert read_folder(folder).manifest is not None
    edit, said = LIES[lie]
    change(folder, edit)
    assert said in refusal(folder)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"null", b"\xff", b'{"format_version": "1"}', b"[" * 100_000])
def test_what_is_no_manifest_is_refused(folder: Path, raw: bytes) -> None:
    (folder / "sllm.json").write_bytes(raw)
    assert "disagrees" in refusal(folder)


def test_a_model_id_that_is_not_that_of_the_content_is_refused(folder: Path) -> None:
    path = folder / "sllm.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"model_id": "0" * 64}))
    assert f"its model id is {'0' * 64} and its content has {content['model_id']}" in refusal(folder)


def test_the_origin_is_no_part_of_the_model_id(folder: Path) -> None:
    before = read_manifest(folder)
    change(folder, put("origin", "generation", value="0" * 32))
    after = read_manifest(folder)
    assert before is not None and after is not None
    assert before.model_id == after.model_id and before.origin != after.origin


def test_a_folder_that_differs_from_its_manifest_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    with pytest.raises(CheckpointInvalid, match=r"model\.safetensors has"):
        read_folder(folder)
    path.write_bytes(raw.replace(b'"F32"', b'"I32"', 1))
    assert "the header of model.safetensors has digest" in refusal(folder)
    write_tensors(path, {"x": ("U8", [1], b"x")})
    assert f"and should have {len(raw)}" in refusal(folder)
    path.unlink()
    with pytest.raises(CheckpointInvalid, match="listed and missing"):
        read_folder(folder)


def test_a_file_too_many_or_too_few_is_named(folder: Path) -> None:
    for name in ("model-00001-of-00001.safetensors", "chat_template.jinja"):
        (folder / name).write_text("x")
        assert f"{name} is in the folder and not listed" in refusal(folder)
        (folder / name).unlink()
    (folder / "README.md").write_text("free")
    assert read_folder(folder).manifest is not None
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json is listed and missing" in refusal(folder)


def test_a_changed_config_is_refused(folder: Path) -> None:
    write_config(folder, {**LLAMA, "vocab_size": 61})
    assert "config.json has digest" in refusal(folder)


def test_a_manifest_that_is_no_file_is_refused_at_once(folder: Path) -> None:
    (folder / "sllm.json").unlink()
    os.mkfifo(folder / "sllm.json")
    assert "is not a file" in refusal(folder)
    (folder / "sllm.json").unlink()
    (folder / "sllm.json").symlink_to("nowhere")
    assert "is not a file" in refusal(folder)


def test_a_manifest_beyond_the_bounds_is_neither_read_nor_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(folder)
    assert manifest is not None
    monkeypatch.setattr(manifests, "MAX_DIGESTS", 2)
    with pytest.raises(CheckpointInvalid, match="would need 3 digests; choose larger chunks"):
        encode(manifest)
    monkeypatch.setattr(manifests, "MAX_MANIFEST_BYTES", 100)
    assert "longer than 100 bytes" in refusal(folder)


def test_the_fingerprint_changes_with_the_manifest_and_with_nothing_else(folder: Path) -> None:
    first = read_folder(folder).fingerprint
    assert first == read_folder(folder).fingerprint
    change(folder, put("aliases", value={"x": A}))
    second = read_folder(folder).fingerprint
    (folder / "sllm.json").unlink()
    assert len({first, second, read_folder(folder).fingerprint}) == 3


RANK = "self_attn.q_proj.weight"
TP_LIES: dict[str, tuple[Callable[[Json], object], str]] = {
    "split of nothing": (put("partition", "split", value={"x": 0}), "'x' is split along dimension 0"),
    "dimension": (put("partition", "split", value={A: 2}), "split along dimension 2"),
    "fewer ranks": (lambda content: content["files"].pop(), "tensor_parallel of 2 needs model-rank-00000"),
    "kind": (put("partition", "kind", value="layers"), "split tensors and the partition kind layers"),
}


@pytest.mark.parametrize("lie", TP_LIES)
def test_a_manifest_of_ranks_that_lies_is_refused(folder: Path, lie: str) -> None:
    ranks = convert(folder, folder.with_name("ranks"), tensor_parallel=2).path
    found = read_folder(ranks)
    assert found.ranks == 2
    assert [found.files_of_rank(rank) for rank in (0, 1)] == [(found.files[0],), (found.files[1],)]
    edit, said = TP_LIES[lie]
    change(ranks, edit)
    assert said in refusal(ranks)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("config.json", True), ("tokenizer.model", True), ("chat_template.jinja", True), ("tokenizer.py", False),
        ("tokenizer.PKL", False), ("vocab.txt", True), ("x.model", True), ("../config.json", False),
        (".config.json", False),
        ("model.safetensors", False), ("training_args.bin", False), ("tokenizer.json\n", False), ("sllm.json", False),
    ],
)  # fmt: skip
def test_files_beside_the_weights_are_told_by_their_names(name: str, expected: bool) -> None:
    assert belongs(name) is expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=700), max_size=8), st.integers(1, 300))
def test_digests_do_not_depend_on_how_the_bytes_arrive(parts: list[bytes], chunk_bytes: int) -> None:
    fed = ChunkDigests(chunk_bytes)
    for part in parts:
        fed.update(part)
    raw = b"".join(parts)
    assert fed.finish() == tuple(digest(raw[at : at + chunk_bytes]) for at in range(0, len(raw), chunk_bytes))
