"""Verification of converted folders, and both verbs at the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import folder_of, noise
from converted import Described, leftovers, stock_folder, stored
from typer.testing import CliRunner

from sllm_actor.checkpoint.convert import convert
from sllm_actor.checkpoint.digests import digest
from sllm_actor.checkpoint.manifest import DEFAULT_CHUNK_BYTES
from sllm_actor.checkpoint.verify import MAX_NAMED, verify
from sllm_actor.cli.checkpoints import DEFAULT_CHUNK
from sllm_actor.cli.main import app
from sllm_actor.errors import CheckpointCorrupt, CheckpointInvalid, CheckpointTruncated
from sllm_actor.units import parse_bytes

TENSORS: dict[str, Described] = {f"layers.{k}.w": ("U8", [20_000], noise(20_000, k)) for k in range(4)}
CHUNK = 4096


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = stock_folder(tmp_path / "a", TENSORS)
    (source / "tokenizer.json").write_text('{"a": 1}')
    return convert(source, tmp_path / "b", partitions=2, chunk_bytes=CHUNK).path


def flip(path: Path, at: int) -> bytes:
    """Change one bit and return the chunk as it is now."""
    with path.open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ 8]))
        opened.seek(at // CHUNK * CHUNK)
        return opened.read(CHUNK)


def test_a_whole_folder_is_in_order_and_every_byte_was_read(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = verify(folder, lambda done, total: seen.append((done, total)))
    listed = [path for path in folder.iterdir() if path.name != "sllm.json"]
    size_bytes = sum(path.stat().st_size for path in listed)
    assert (found.files, found.size_bytes) == (len(listed), size_bytes)
    assert seen[-1] == (size_bytes, size_bytes) and seen == sorted(seen)
    assert found.model_id == json.loads((folder / "sllm.json").read_text())["model_id"]


@pytest.mark.parametrize("at", [CHUNK, 3 * CHUNK - 1, 40_000])
def test_a_flipped_bit_is_named_by_file_chunk_and_both_digests(folder: Path, at: int) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    should = json.loads((folder / "sllm.json").read_text())["files"][1]["digests"][at // CHUNK]
    has = digest(flip(path, at)).hex()
    assert has != should
    with pytest.raises(CheckpointCorrupt) as refused:
        verify(folder)
    place = f"{path.name} chunk {at // CHUNK} (from byte {at // CHUNK * CHUNK})"
    assert f"{place} has digest {has} and should have {should}" in refused.value.message
    flip(path, at)
    assert verify(folder).model_id


def test_several_damages_are_named_together_up_to_a_bound(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    chunks = range(1, path.stat().st_size // CHUNK + 1)
    for chunk in chunks:
        flip(path, min(chunk * CHUNK, path.stat().st_size - 1))
    flip(folder / "model-00002-of-00002.safetensors", CHUNK)
    with pytest.raises(CheckpointCorrupt) as refused:
        verify(folder)
    assert refused.value.message.count(" chunk ") == MAX_NAMED and len(chunks) > MAX_NAMED
    assert refused.value.message.endswith(f"and {len(chunks) + 1 - MAX_NAMED} more")


def test_a_changed_tokenizer_of_the_same_size_is_found(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"a": 2}')
    with pytest.raises(
        CheckpointCorrupt, match=r"tokenizer\.json has digest [0-9a-f]{32} and should have [0-9a-f]{32}"
    ):
        verify(folder)


def test_a_truncated_file_is_refused_before_it_is_read(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    seen: list[int] = []
    with pytest.raises(CheckpointTruncated, match=path.name):
        verify(folder, lambda done, total: seen.append(done))
    assert seen == []


def test_a_digest_that_was_changed_is_found_by_the_model_id(folder: Path) -> None:
    path = folder / "sllm.json"
    content = json.loads(path.read_text())
    content["files"][0]["digests"][1] = "0" * 32
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointInvalid, match="model id"):
        verify(folder)


def test_of_a_stock_folder_only_headers_are_checked_and_the_result_says_so(tmp_path: Path) -> None:
    source = folder_of(tmp_path, 300, 400)
    found = verify(source)
    assert (found.model_id, found.digests, found.size_bytes) == (None, 0, 700)
    os.truncate(source / "model-00001-of-00002.safetensors", 299)
    with pytest.raises(CheckpointTruncated):
        verify(source)


def test_verification_is_cancelled_by_what_the_report_raises(folder: Path) -> None:
    def cancel(done_bytes: int, total_bytes: int) -> None:
        raise InterruptedError

    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(InterruptedError):
        verify(folder, cancel)
    assert sorted(path.name for path in folder.iterdir()) == before


# ---- the command line ----


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def json_of(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
    ran = subprocess.run(
        [sys.executable, "-c", "from sllm_actor.cli.main import main; main()", *map(str, arguments), "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    (line,) = ran.stdout.splitlines()
    assert ran.stderr == ""
    parsed: dict[str, Any] = json.loads(line)
    return ran.returncode, parsed


def test_convert_and_verify_at_the_command_line(tmp_path: Path) -> None:
    source = stock_folder(tmp_path / "a", TENSORS)
    code, made = json_of("convert", source, tmp_path / "b", "--partitions", "2", "--chunk-bytes", "8KiB")
    assert code == 0
    assert made["path"] == str(tmp_path / "b") and made["chunk_bytes"] == 8192 and made["tensors"] == 4
    assert made["partition"] == {"kind": "layers", "count": 2} and len(made["files"]) == 2
    assert made["origin"]["format"] == "safetensors"
    code, found = json_of("verify", tmp_path / "b")
    assert code == 0 and found["model_id"] == made["model_id"] and found["digests_checked"] > 4
    assert stored(tmp_path / "b") == TENSORS
    code, found = json_of("verify", source)
    assert code == 0 and found["model_id"] is None and found["digests_checked"] == 0


def test_people_are_told_what_was_made_and_what_is_wrong(tmp_path: Path) -> None:
    source = stock_folder(tmp_path / "a", TENSORS)
    assert "[bold]" in run("convert", source, tmp_path / "[bold]b")[1]
    assert "[bold]" in run("convert", source, tmp_path / "[bold]b")[1], "refused now, and still named in full"
    code, said = run("convert", source, tmp_path / "b", "--tensor-parallel", "1")
    assert code == 0 and "4 tensors, 84.2 kB, one file" in said and "model id" in said
    code, said = run("verify", tmp_path / "b")
    assert code == 0 and "every byte of" in said
    code, said = run("verify", source)
    assert code == 0 and "there are no digests" in said
    flip(tmp_path / "b" / "model.safetensors", 5000)
    code, said = run("verify", tmp_path / "b")
    assert code == 1 and "chunk 0" in said
    assert leftovers(tmp_path) == []


def test_refusals_have_exit_code_1_and_wrong_usage_2(tmp_path: Path) -> None:
    source = stock_folder(tmp_path / "a", TENSORS)
    (tmp_path / "b").mkdir()
    code, said = json_of("convert", source, tmp_path / "b")
    assert (code, said["error"]["code"], said["error"]["param"]) == (1, "target_exists", "target")
    assert run("convert", source, tmp_path / "b", "--replace")[0] == 0
    assert json_of("verify", tmp_path / "nowhere")[1]["error"]["code"] == "checkpoint_missing"
    assert run("convert", source, tmp_path / "c", "--chunk-bytes", "5000")[0] == 1
    assert run("convert", source, tmp_path / "c", "--chunk-bytes", "much")[0] == 2
    assert run("convert", source, tmp_path / "c", "--partitions", "0")[0] == 2
    assert run("convert", source, tmp_path / "c", "--partitions", "2", "--tensor-parallel", "2")[0] == 2
    assert run("convert", source)[0] == 2
    assert not (tmp_path / "c").exists()


def test_help_has_an_example_and_the_default_is_that_of_the_format() -> None:
    for verb in ("convert", "verify"):
        code, said = run(verb, "--help")
        assert code == 0 and f"Example: sllm-node {verb} ./opt-125m" in said
    assert parse_bytes(DEFAULT_CHUNK) == DEFAULT_CHUNK_BYTES
