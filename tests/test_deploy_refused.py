"""Checkpoints that can't be served are refused when they are deployed, by a type that says why."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from sllm_actor.sources.builtin import BUILTIN
from sllm_actor.testing.node_process import NodeProcess


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that would be served as it is."""
    copied = tmp_path / "model"
    shutil.copytree(BUILTIN["demo"], copied)
    return copied


def refusal(node: NodeProcess, source: Path | str) -> dict[str, Any]:
    before = node.call("GET", "/admin/models")
    reply = node.request("POST", "/admin/models", {"source": str(source), "name": "refused"})
    assert reply.status == 400, reply
    after = node.call("GET", "/admin/models")
    names = [[status["model"]["name"] for status in answer["models"]] for answer in (before, after)]
    assert names[0] == names[1], "nothing was registered"
    error: dict[str, Any] = reply.json()["error"]
    return error


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_untouched_folder_is_accepted(node: NodeProcess, folder: Path) -> None:
    node.deploy(folder, "accepted")
    node.call("DELETE", "/admin/models/accepted")


def test_a_missing_folder(node: NodeProcess, tmp_path: Path) -> None:
    error = refusal(node, tmp_path / "absent")
    assert error["code"] == "checkpoint_missing"
    assert "absent" in error["message"]


def test_an_empty_folder(node: NodeProcess, tmp_path: Path) -> None:
    assert refusal(node, tmp_path)["code"] == "checkpoint_empty"


def test_a_truncated_file(node: NodeProcess, folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    error = refusal(node, folder)
    assert error["code"] == "checkpoint_truncated"
    assert "model.safetensors" in error["message"]


def test_a_header_that_lies_about_its_length(node: NodeProcess, folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", 2**40) + weights.read_bytes()[8:])
    assert refusal(node, folder)["code"] in ("checkpoint_header_invalid", "checkpoint_truncated")


def test_a_header_that_lies_about_a_shape(node: NodeProcess, folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"F32"', b'"F16"', 1))
    assert refusal(node, folder)["code"] == "checkpoint_header_invalid"


def test_a_pickle_is_refused_with_a_way_to_convert_it(node: NodeProcess, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error = refusal(node, folder)
    assert error["code"] == "pickle_checkpoint"
    assert "sllm-node convert" in error["message"]


def test_a_missing_config(node: NodeProcess, folder: Path) -> None:
    (folder / "config.json").unlink()
    assert refusal(node, folder)["code"] == "checkpoint_config_invalid"


def test_an_architecture_that_is_not_served_is_named_beside_those_that_are(node: NodeProcess, folder: Path) -> None:
    change_config(folder, architectures=["T5ForConditionalGeneration"])
    error = refusal(node, folder)
    assert error["code"] == "unsupported_architecture"
    assert "T5ForConditionalGeneration" in error["message"]
    assert "LlamaForCausalLM" in error["message"]


def test_a_config_that_does_not_fit_the_weights(node: NodeProcess, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    change_config(folder, num_hidden_layers=config["num_hidden_layers"] + 1)
    error = refusal(node, folder)
    assert error["code"] == "checkpoint_invalid"
    assert f"layers.{config['num_hidden_layers']}" in error["message"]


def test_a_config_of_which_no_model_can_be_built(node: NodeProcess, folder: Path) -> None:
    change_config(folder, num_attention_heads=0)
    assert refusal(node, folder)["code"] == "checkpoint_config_invalid"


def test_a_folder_without_a_tokenizer(node: NodeProcess, folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert refusal(node, folder)["code"] == "tokenizer_invalid"


def test_a_chat_template_that_is_no_template(node: NodeProcess, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for x in %}")
    assert refusal(node, folder)["code"] == "tokenizer_invalid"


def test_a_model_larger_than_the_host_pool(node: NodeProcess, folder: Path) -> None:
    # A hole in a file takes no room on the disk: 100 MB of zeros as one more tensor.
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    begin = len(data) - 8 - length
    header["extra"] = {"dtype": "U8", "shape": [100_000_000], "data_offsets": [begin, begin + 100_000_000]}
    packed = json.dumps(header).encode()
    with weights.open("wb") as opened:
        opened.write(struct.pack("<Q", len(packed)) + packed + data[8 + length :])
        opened.truncate(8 + len(packed) + begin + 100_000_000)
    error = refusal(node, folder)
    assert error["code"] == "model_too_large"
    assert "host_pool_bytes" in error["message"]


@pytest.mark.parametrize("name", ["", "../up", "a b", "a/b/c", "x" * 200, "ünï", "a..b", "-", ".hidden"])
def test_a_name_outside_the_alphabet(node: NodeProcess, name: str) -> None:
    reply = node.request("POST", "/admin/models", {"source": "builtin:demo", "name": name})
    assert (reply.status, reply.json()["error"]["code"]) == (400, "invalid_name")


@pytest.mark.parametrize("source", ["builtin:none", "ftp://host/model", "hf://owner", "s3://", "", "a\x00b"])
def test_a_source_that_names_no_folder(node: NodeProcess, source: str) -> None:
    assert refusal(node, source)["code"] in ("source_invalid", "checkpoint_missing")


@pytest.mark.parametrize("keep_alive", ["soon", -1, "5 parsecs", []])
def test_a_keep_alive_that_is_no_duration(node: NodeProcess, keep_alive: Any) -> None:
    reply = node.request(
        "POST", "/admin/models", {"source": "builtin:demo", "name": "refused", "keep_alive": keep_alive}
    )
    assert (reply.status, reply.json()["error"]["param"]) == (400, "keep_alive")
