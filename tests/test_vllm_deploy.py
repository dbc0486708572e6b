"""A node whose models have vLLM as their backend, a strict stand-in for it: deployed, asked, refused."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from tiny_models import change_config, save_model

from sllm_actor.testing.node_process import NodeProcess, running_node

STANDIN = Path(__file__).parent / "vllm_standin"


@pytest.fixture(scope="module")
def house(warm_starts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    folder, path = tmp_path_factory.mktemp("house"), os.pathsep.join([str(STANDIN), os.environ.get("PYTHONPATH", "")])
    knobs = (*SMALL, f"vllm_python={sys.executable}")
    with running_node(folder / "data", *knobs, environment={"PYTHONPATH": path}) as node:
        yield node


def refused(node: NodeProcess, path: str, body: dict[str, Any]) -> tuple[int, str, str]:
    reply = node.request("POST", path, body)
    error = reply.json()["error"]
    return reply.status, error["code"], error["param"]


def test_a_model_is_deployed_and_answers_with_vllm_as_its_backend(house: NodeProcess) -> None:
    model = house.deploy("builtin:demo", "fast", backend="vllm")
    assert model["backend"] == "vllm"
    body = {"model": "fast", "prompt": [5, 6, 7], "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    answer = house.call("POST", "/v1/completions", body)
    assert answer["usage"]["completion_tokens"] == 5
    events = list(house.stream("/v1/completions", body | {"stream": True}))
    assert "".join(event["choices"][0]["text"] for event in events if event["choices"]) == answer["choices"][0]["text"]
    wrong = {"model": "fast", "prompt": "a", "response_format": {"type": "json_object"}}
    assert refused(house, "/v1/completions", wrong)[:2] == (400, "backend_invalid")
    embed = {"model": "fast", "input": "a"}
    assert house.request("POST", "/v1/embeddings", embed).status == 400


def test_what_is_refused_when_it_is_deployed(house: NodeProcess, node: NodeProcess, tmp_path: Path) -> None:
    folder = save_model(tmp_path, "LlamaForCausalLM")
    body = {"source": str(folder), "name": "m", "backend": "vllm"}
    assert refused(node, "/admin/models", body) == (400, "backend_invalid", "backend")
    assert refused(node, "/admin/models", body | {"backend": "another"})[0] == 400
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert refused(house, "/admin/models", body) == (400, "backend_invalid", "backend")
