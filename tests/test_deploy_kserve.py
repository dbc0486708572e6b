"""deploy/kserve: valid for KServe and Kubernetes, and a node starts as the runtime says."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from conftest import SMALL

from sllm_actor.cli.configuring import configure
from sllm_actor.config import Config
from sllm_actor.errors import ConfigInvalid
from sllm_actor.frontend.app import OPEN_PATHS
from sllm_actor.frontend.keys import Key, digest_of, new_key, written
from sllm_actor.node.first_models import first_models
from sllm_actor.sources.builtin import BUILTIN
from sllm_actor.testing.node_process import CLI, NodeProcess
from sllm_actor.units import parse_bytes

Manifest = dict[str, Any]
KSERVE = Path(__file__).parent.parent / "deploy" / "kserve"
SCHEMAS = json.loads((Path(__file__).parent / "kserve" / "crds.json").read_text())
MODEL_FOLDER = "/mnt/models"
VERSIONS = ("1.31", "1.37")


def read(name: str) -> Manifest:
    made = yaml.safe_load((KSERVE / name).read_text())
    assert isinstance(made, dict)
    return made


@pytest.fixture
def runtime() -> Manifest:
    return read("runtime.yaml")


@pytest.fixture
def service() -> Manifest:
    return read("inference-service.yaml")


def container(runtime: Manifest) -> Manifest:
    (found,) = runtime["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def strict(schema: Any) -> Any:
    """Refuse fields that the schema does not name, as `kubectl apply` does."""
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(part) for name, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and "x-kubernetes-preserve-unknown-fields" not in schema:
        made["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
        made.setdefault("additionalProperties", False)
    return made


def check(made: Manifest) -> None:
    jsonschema.validate(made, strict(SCHEMAS[f"{made['apiVersion']} {made['kind']}"]))


def pod(runtime: Manifest, service: Manifest) -> Manifest:
    """Give the pod that KServe makes of both: the runtime's, with what the predictor says above it."""
    own = {"model", "minReplicas", "maxReplicas"}
    predictor = {name: part for name, part in service["spec"]["predictor"].items() if name not in own}
    known = {name: runtime["spec"][name] for name in ("containers", "volumes")}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "qwen"}, "spec": known | predictor}


def config(runtime: Manifest, service: Manifest) -> Config:
    """Give what a node makes of the arguments, through the command's own reading of them."""
    given = [argument.removeprefix("--").split("=", 1) for argument in arguments(runtime, service)]
    extra = [value for name, value in given if name == "set"]
    flags: dict[str, Any] = {name: value for name, value in given if name != "set"}
    flags["key_file"] = flags.pop("api-key-file")
    port, data_dir = int(flags.pop("port")), flags.pop("data-dir")
    return configure(None, data_dir, extra, port=port, **flags).config


def arguments(runtime: Manifest, service: Manifest) -> list[str]:
    verb, *given = (one.replace("{{.Name}}", service["metadata"]["name"]) for one in container(runtime)["args"])
    assert verb == "start" and all(re.fullmatch(r"--[a-z-]+=\S+", one) for one in given)
    return given


def test_both_objects_are_valid_for_kserve(runtime: Manifest, service: Manifest) -> None:
    check(runtime)
    check(service)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("runtime.yaml", {"supportedModelFormat": []}),
        ("runtime.yaml", {"supportedModelFormats": [{"version": "1"}]}),
        ("inference-service.yaml", {"predictor": {"model": {"modelFormat": {"name": "sllm"}, "storageURI": "hf://a"}}}),
        ("inference-service.yaml", {"predictor": {"minReplicas": "1"}}),
    ],
)
def test_the_validation_itself_sees_what_kserve_does_not_know(name: str, wrong: Manifest) -> None:
    made = read(name)
    made["spec"] |= wrong
    with pytest.raises(jsonschema.ValidationError):
        check(made)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_pod_that_becomes_of_them_is_valid_for_old_and_new_kubernetes(
    runtime: Manifest, service: Manifest, version: str
) -> None:
    made = pod(runtime, service)
    kubernetes_validate.validate(made, version, strict=True)
    wrong = copy.deepcopy(made)
    wrong["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_the_service_names_the_runtime_and_a_format_that_it_has(runtime: Manifest, service: Manifest) -> None:
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    formats = {(one["name"], one["version"]) for one in runtime["spec"]["supportedModelFormats"]}
    assert (model["modelFormat"]["name"], model["modelFormat"]["version"]) in formats
    assert container(runtime)["name"] == "kserve-container"
    # What KServe's own runtimes are chosen for stays theirs.
    chosen = {one["name"] for one in runtime["spec"]["supportedModelFormats"] if one["autoSelect"]}
    assert chosen == {"sllm"}


def test_ports_probes_and_paths_agree_with_the_node_that_is_started(runtime: Manifest, service: Manifest) -> None:
    found, node = config(runtime, service), container(runtime)
    assert [port["containerPort"] for port in node["ports"]] == [found.port]
    assert runtime["spec"]["annotations"]["prometheus.kserve.io/port"] == str(found.port)
    for probe, path in (("startupProbe", "/health"), ("readinessProbe", "/ready"), ("livenessProbe", "/health")):
        assert node[probe]["httpGet"] == {"path": path, "port": found.port} and path in OPEN_PATHS
    mounted = {mount["mountPath"]: mount["name"] for mount in node["volumeMounts"]}
    assert mounted[str(Path(found.api_key_file).parent)] == "keys"
    assert mounted[str(Path(found.data_dir).parent)] == "data"
    assert {volume["name"] for volume in runtime["spec"]["volumes"]} == set(mounted.values())
    assert first_models(found.models) == {service["metadata"]["name"]: MODEL_FOLDER}


def test_what_a_node_takes_fits_its_pod_and_its_end(runtime: Manifest, service: Manifest) -> None:
    found, limits = config(runtime, service), container(runtime)["resources"]["limits"]
    assert container(runtime)["resources"]["requests"] == limits
    assert found.engine_threads == int(limits["cpu"])
    taken = found.host_pool_bytes + found.kv_cache_bytes + found.pull_memory_bytes + found.grammar_memory_bytes
    assert taken <= 0.8 * parse_bytes(f"{limits['memory']}B") and not found.huge_pages
    pause_s = float(container(runtime)["lifecycle"]["preStop"]["exec"]["command"][1])
    needed_s = pause_s + found.drain_timeout_s + found.engine_stop_timeout_s
    assert service["spec"]["predictor"]["terminationGracePeriodSeconds"] >= needed_s + 10
    assert service["spec"]["predictor"]["securityContext"]["fsGroup"] > 0


@pytest.mark.usefixtures("warm_starts")
def test_a_node_that_is_started_with_the_runtimes_arguments_answers_for_the_services_model(
    runtime: Manifest, service: Manifest, tmp_path: Path
) -> None:
    key = new_key()
    keys = tmp_path / "api-keys.toml"
    keys.write_text(written([Key(name="ops", sha256=digest_of(key), admin=True)]))
    keys.chmod(0o600)
    here = {
        config(runtime, service).api_key_file: str(keys), "/var/lib/sllm": str(tmp_path),
        "--host=0.0.0.0": "--host=127.0.0.1", "--port=8400": "--port=0", MODEL_FOLDER: str(BUILTIN["demo"]),
    }  # fmt: skip
    command = [str(CLI), "start", "--json"]
    for argument in arguments(runtime, service):
        for there, mine in here.items():
            argument = argument.replace(there, mine)
        command.append(argument)
    command += [f"--set={knob}" for knob in SMALL]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        try:
            node = NodeProcess(process, ready["url"])
            body = {"model": "qwen", "messages": [{"role": "user", "content": "Add 2 and 2."}]}
            assert node.request("GET", "/ready").status == 200
            assert node.request("POST", "/v1/chat/completions", body).status == 401
            answer = node.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {key}"})
            assert answer.json()["choices"][0]["message"]["content"] == "2 + 2 = 4"
        finally:
            process.terminate()
    assert process.returncode == 0


@pytest.mark.parametrize("text", ["qwen", "qwen=", "=/models", "a b=/models", "qwen=/a,qwen=/b"])
def test_models_of_a_configuration_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigInvalid, match="models: ") as refused:
        first_models(text)
    assert refused.value.param == "models"


def test_models_stand_in_order_with_spaces_where_one_likes() -> None:
    assert first_models("") == {}
    found = first_models("b=hf://owner/name@main, a = /srv/a=b,")
    assert list(found.items()) == [("b", "hf://owner/name@main"), ("a", "/srv/a=b")]


def test_a_node_that_only_leads_takes_no_models() -> None:
    with pytest.raises(ConfigInvalid, match="models: a node that only leads"):
        Config(models="a=/b", roles="controller", metadata="etcd://127.0.0.1:1", listen="tcp://127.0.0.1:0")


@pytest.mark.usefixtures("warm_starts")
def test_a_model_that_cannot_be_registered_ends_the_start_and_says_which(start_node: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="models: ghost=/nowhere: "), start_node("models=ghost=/nowhere"):
        pass
