"""`sllm-node deploy --config`: what ServerlessLLM's files ask for is done, refused by name, or warned of."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from lora_adapters import save_adapter

from sllm_actor.cli.sllm_config import MAX_CONFIG_BYTES, Deployment, parse_deployment, read_deployment
from sllm_actor.domain import Backend
from sllm_actor.errors import ConfigInvalid
from sllm_actor.sources.builtin import BUILTIN
from sllm_actor.testing.node_process import CLI, NodeProcess


def theirs(**changes: Any) -> dict[str, Any]:
    """Give what ServerlessLLM's documents have, with other values in it; a dictionary's are put into its own."""
    config: dict[str, Any] = {
        "model": "facebook/opt-1.3b",
        "backend": "transformers",
        "num_gpus": 1,
        "auto_scaling_config": {
            "metric": "concurrency", "target": 3, "min_instances": 1, "max_instances": 4, "keep_alive": 60,
        },
        "backend_config": {
            "pretrained_model_name_or_path": "facebook/opt-1.3b",
            "device_map": "auto",
            "torch_dtype": "float16",
            "hf_model_class": "AutoModelForCausalLM",
        },
    }  # fmt: skip
    for name, value in changes.items():
        config[name] = config[name] | value if isinstance(config.get(name), dict) else value
    return config


def parsed(config: object) -> Deployment:
    return parse_deployment(json.dumps(config).encode())


def test_every_field_of_their_example_has_its_counterpart() -> None:
    plan = parsed(
        theirs(backend_config={"enable_lora": True, "lora_adapters": {"sql": "crumb/opt-lora", "own": "/srv/own"}})
    )
    assert plan.model == {
        "name": "facebook/opt-1.3b",
        "source": "hf://facebook/opt-1.3b",
        "keep_alive": 60,
        "min_instances": 1,
        "max_instances": 4,
        "target_concurrency": 3,
        "backend": "sllm",
    }
    assert plan.adapters == (
        {"name": "sql", "source": "hf://crumb/opt-lora", "base": "facebook/opt-1.3b"},
        {"name": "own", "source": "/srv/own", "base": "facebook/opt-1.3b"},
    )
    assert plan.dtype == "F16"
    assert [warning.split(":")[0] for warning in plan.warnings] == ["num_gpus"]


def test_what_a_file_leaves_out_is_as_their_default_file_has_it() -> None:
    plan = parsed({"model": "facebook/opt-125m"})
    assert plan.model == {
        "name": "facebook/opt-125m",
        "source": "hf://facebook/opt-125m",
        "keep_alive": 0,
        "min_instances": 0,
        "max_instances": 10,
        "target_concurrency": 1,
        "backend": "sllm",
    }
    assert [warning.split(":")[0] for warning in plan.warnings] == ["backend", "num_gpus"]


def test_vllm_serves_it_where_the_file_or_the_command_line_names_it() -> None:
    assert parsed(theirs(backend="vllm")).model["backend"] == "vllm"
    named = json.dumps(theirs(backend="vllm")).encode()
    assert parse_deployment(named, Backend.SLLM).model["backend"] == "sllm"
    unnamed = json.dumps({"model": "facebook/opt-125m", "num_gpus": 0}).encode()
    told = parse_deployment(unnamed, Backend.VLLM)
    assert (told.model["backend"], told.warnings) == ("vllm", ())


def test_what_vllm_is_not_given_here_is_refused_before_anything_is_registered() -> None:
    adapters = {"enable_lora": True, "lora_adapters": {"a": "b/c"}}
    with pytest.raises(ConfigInvalid) as refused:
        parsed(theirs(backend="vllm", backend_config=adapters))
    assert refused.value.param == "backend_config.lora_adapters"
    with pytest.raises(ConfigInvalid) as refused:
        parsed(theirs(backend="vllm", backend_config={"task": "embed"}))
    assert refused.value.param == "backend_config.task"
    both = json.dumps(theirs(backend="vllm", backend_config=adapters)).encode()
    assert len(parse_deployment(both, Backend.SLLM).adapters) == 1


def test_a_folder_that_is_there_is_taken_before_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facebook" / "opt-1.3b").mkdir(parents=True)
    assert parsed(theirs()).model["source"] == str(tmp_path / "facebook" / "opt-1.3b")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"placement_config": {"target_nodes": ["0"]}}, "placement_config"),
        ({"placement_config": {"local_disk": ["0"], "memory_pool": ["1"]}}, "placement_config"),
        ({"router_config": {"migration_delta": 10}}, "router_config"),
        ({"scheduler_config": {"alpha": 0.01, "beta": 0.1}}, "scheduler_config"),
        ({"backend_config": {"enforce_eager": True}}, "backend_config.enforce_eager"),
        ({"backend_config": {"enable_prefix_caching": False}}, "backend_config.enable_prefix_caching"),
        ({"backend_config": {"load_format": "serverless_llm"}}, "backend_config.load_format"),
        ({"backend_config": {"lora_adapters": {"a": "b/c"}}}, "backend_config.lora_adapters"),
    ],
)
def test_what_is_harmless_is_warned_of(changes: dict[str, Any], said: str) -> None:
    plan = parsed(theirs(num_gpus=0, **changes))
    assert [warning.split(":")[0] for warning in plan.warnings] == [said]
    assert plan.adapters == ()


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": ""}, "model"),
        ({"model": 1}, "model"),
        ({"backend": "dummy"}, "backend"),
        ({"num_gpus": 2}, "num_gpus"),
        ({"num_gpus": -1}, "num_gpus"),
        ({"num_gpus": True}, "num_gpus"),
        ({"auto_scaling_config": {"metric": "latency"}}, "auto_scaling_config.metric"),
        ({"auto_scaling_config": {"target": 0}}, "auto_scaling_config.target"),
        ({"auto_scaling_config": {"max_instances": 0}}, "auto_scaling_config.max_instances"),
        ({"auto_scaling_config": {"min_instances": 5}}, "auto_scaling_config.max_instances"),
        ({"auto_scaling_config": {"keep_alive": -1}}, "auto_scaling_config.keep_alive"),
        ({"auto_scaling_config": {"scale_up_delay": 3}}, "auto_scaling_config.scale_up_delay"),
        ({"backend_config": {"pretrained_model_name_or_path": "gpt2"}}, "backend_config.pretrained_model_name_or_path"),
        ({"backend_config": {"device_map": {"": 0}}}, "backend_config.device_map"),
        ({"backend_config": {"torch_dtype": "int8"}}, "backend_config.torch_dtype"),
        ({"backend_config": {"hf_model_class": "AutoModelForSeq2SeqLM"}}, "backend_config.hf_model_class"),
        ({"backend_config": {"quantization_config": {"load_in_8bit": True}}}, "backend_config.quantization_config"),
        ({"backend_config": {"precision": "int8"}}, "backend_config.precision"),
        ({"backend_config": {"tensor_parallel_size": 2}}, "backend_config.tensor_parallel_size"),
        ({"backend_config": {"max_model_len": 512}}, "backend_config.max_model_len"),
        ({"backend_config": {"trust_remote_code": True}}, "backend_config.trust_remote_code"),
        ({"backend_config": {"task": "classify"}}, "backend_config.task"),
        ({"backend_config": {"enable_lora": True, "lora_adapters": {"a": "x"}}}, "backend_config.lora_adapters.a"),
        ({"ft_backend": "peft_lora"}, "ft_backend"),
        ({"placement_config": {"racks": []}}, "placement_config.racks"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigInvalid) as refused:
        parsed(theirs(**changes))
    assert refused.value.param == param


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"model": "a/b", "model": "c/d"}', b'{"num_gpus": 1}']
)
def test_what_is_no_configuration_is_refused(raw: bytes) -> None:
    with pytest.raises(ConfigInvalid):
        parse_deployment(raw)


def test_a_file_that_is_missing_or_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="No such file"):
        read_deployment(tmp_path / "none.json", {}, named=False)
    (tmp_path / "long.json").write_bytes(b" " * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(ConfigInvalid, match="longer than"):
        read_deployment(tmp_path / "long.json", {}, named=False)


def deploy(*arguments: str | Path, status: int = 0) -> Any:
    ran = subprocess.run([CLI, "deploy", *arguments, "--json"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == status and "Traceback" not in ran.stderr, ran
    return json.loads(ran.stdout)


def test_their_file_registers_a_model_and_its_adapters_at_a_node(node: NodeProcess, tmp_path: Path) -> None:
    base = BUILTIN["demo"]
    adapter = save_adapter(tmp_path / "adapter", base, ["q_proj"])
    backend = {
        "pretrained_model_name_or_path": str(base),
        "enable_lora": True,
        "lora_adapters": {"two": str(adapter)},
    }
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps(theirs(auto_scaling_config={"min_instances": 0}, backend_config=backend)))
    made = deploy("--config", file, "--name", "theirs/one", "--max-instances", "2", "--url", node.url)
    assert (made["model"]["name"], made["model"]["source"]) == ("theirs/one", str(base))
    assert made["model"]["scaling"] == {"min_instances": 0, "max_instances": 2, "target_concurrency": 3}
    assert made["model"]["keep_alive_s"] == 60
    assert [(model["name"], model["base"]) for model in made["adapters"]] == [("two", "theirs/one")]
    assert [warning.split(":")[0] for warning in made["warnings"]] == ["num_gpus", "backend_config.torch_dtype"]


def test_a_folder_on_the_command_line_stands_above_the_files(node: NodeProcess, tmp_path: Path) -> None:
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps(theirs(model="their/demo", auto_scaling_config={"min_instances": 0})))
    made = deploy("builtin:demo", "--config", file, "--url", node.url)
    assert (made["model"]["name"], made["model"]["source"]) == ("their/demo", str(BUILTIN["demo"]))


def test_a_node_without_vllm_refuses_a_file_that_names_it_and_says_what_to_do(
    node: NodeProcess, tmp_path: Path
) -> None:
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps(theirs(model="their/fast", backend="vllm", auto_scaling_config={"min_instances": 0})))
    error = deploy("builtin:demo", "--config", file, "--url", node.url, status=1)["error"]
    assert (error["code"], error["param"]) == ("backend_invalid", "backend")
    assert "--backend sllm" in error["hint"]
    made = deploy("builtin:demo", "--config", file, "--backend", "sllm", "--url", node.url)
    assert made["model"]["backend"] == "sllm"


def test_a_refused_file_registers_nothing(node: NodeProcess, tmp_path: Path) -> None:
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps(theirs(num_gpus=4)))
    error = deploy("--config", file, "--url", node.url, status=1)["error"]
    assert (error["code"], error["param"]) == ("config_invalid", "num_gpus")
    assert subprocess.run([CLI, "deploy", "--url", node.url], capture_output=True, timeout=60).returncode == 2
