"""deploy/kubernetes: valid for Kubernetes, right for a node, and each part right for the others."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kustomized import Manifest, compose, merge
from metadata_stores import UNPACKED

from sllm_actor.config import Config, resolve
from sllm_actor.domain import check_node_id
from sllm_actor.errors import ConfigInvalid
from sllm_actor.frontend.app import OPEN_PATHS
from sllm_actor.frontend.keys import Key, digest_of, new_key, read_keys, written
from sllm_actor.metadata.etcd_address import parse_endpoints
from sllm_actor.node.secret_files import read_cluster_secret
from sllm_actor.runtime import ActorSystem
from sllm_actor.testing.etcd import etcd_program
from sllm_actor.units import parse_bytes

ROOT = Path(__file__).parent.parent
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("base", "overlays/cpu", "overlays/cpu-huge-pages", "overlays/gpu")
# The oldest that is still offered by those who run clusters for others, and the newest that the validator knows.
VERSIONS = ("1.31", "1.37")
# Of the pod's memory, what is left to processes beside the pool, keys and values, pulls and grammars.
SHARE_FOR_PROCESSES = 0.2
REFERENCE = re.compile(r"\$\(([A-Za-z0-9_]+)\)")


class Composed:
    """An overlay's objects, and what they say of nodes and of etcd."""

    def __init__(self, folder: Path, overlay: str) -> None:
        self.objects = compose(folder / overlay)
        self.node = self.one("StatefulSet", "sllm-node")
        self.etcd = self.one("StatefulSet", "sllm-etcd")

    def one(self, kind: str, name: str) -> Manifest:
        (found,) = (made for made in self.of(kind) if made["metadata"]["name"] == name)
        return found

    def of(self, kind: str) -> list[Manifest]:
        return [made for made in self.objects if made["kind"] == kind]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of deploy/kubernetes in which the operator has made the secrets."""
    folder = tmp_path_factory.mktemp("deploy") / "kubernetes"
    shutil.copytree(KUBERNETES, folder)
    key = Key(name="ops", sha256=digest_of(new_key()), admin=True)
    for name, text in (("api-keys.toml", written([key])), ("cluster-secret", f"{new_key()}\n")):
        path = folder / "base" / "secrets" / name
        path.write_text(text)
        path.chmod(0o600)
    return folder


@pytest.fixture(scope="module", params=OVERLAYS)
def composed(request: pytest.FixtureRequest, filled: Path) -> Composed:
    return Composed(filled, request.param)


def pod(workload: Manifest) -> Manifest:
    spec: Manifest = workload["spec"]["template"]["spec"]
    return spec


def container(workload: Manifest) -> Manifest:
    (found,) = pod(workload)["containers"]
    assert isinstance(found, dict)
    return found


def labels(workload: Manifest) -> dict[str, str]:
    found: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return found


def ports(workload: Manifest) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container(workload)["ports"]}


def environment(workload: Manifest, ordinal: int = 0) -> dict[str, str]:
    """Give the variables of one pod as the kubelet would: a reference sees what stands before it."""
    name = f"{workload['metadata']['name']}-{ordinal}"
    facts = {"metadata.name": name, "metadata.namespace": workload["metadata"]["namespace"]}
    found: dict[str, str] = {}
    for variable in container(workload)["env"]:
        field = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        value = facts[field] if field else REFERENCE.sub(lambda match: found[match.group(1)], variable["value"])
        found[variable["name"]] = value
    return found


def config(composed: Composed, folder: Path, ordinal: int = 0) -> Config:
    """Give what a node makes of its pod's file and variables, through its own loader."""
    file = folder / "node.toml"
    file.write_text(composed.one("ConfigMap", "sllm-node")["data"]["node.toml"])
    return resolve(file, environment(composed.node, ordinal)).config


def quantity(text: str) -> int:
    return parse_bytes(f"{text}B")


def volume_at(workload: Manifest, path: str) -> tuple[Manifest, str]:
    """Give the mount that `path` lies in, and the rest of the path."""
    (mount,) = (one for one in container(workload)["volumeMounts"] if Path(path).is_relative_to(one["mountPath"]))
    assert isinstance(mount, dict)
    return mount, Path(path).relative_to(mount["mountPath"]).as_posix()


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid_for_old_and_new_kubernetes(composed: Composed, version: str) -> None:
    for made in composed.objects:
        kubernetes_validate.validate(made, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_validation_itself_sees_a_misspelt_field_and_a_wrong_type(filled: Path, version: str) -> None:
    made = Composed(filled, "base").one("PodDisruptionBudget", "sllm-node")
    for spec in ({"maxUnavailible": 1}, {"maxUnavailable": 0.5}):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(made | {"spec": {"selector": made["spec"]["selector"], **spec}}, version, True)


def test_what_the_composition_does_not_understand_it_refuses(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("kind: Kustomization\nnamePrefix: other-\n")
    with pytest.raises(ValueError, match="namePrefix"):
        compose(tmp_path)
    with pytest.raises(ValueError, match="volumes: how this list is merged"):
        merge({"volumes": [{"name": "a"}]}, {"volumes": [{"name": "b"}]})


def test_the_example_is_served_by_more_than_one_node_of_names_that_nodes_may_have(
    composed: Composed, tmp_path: Path
) -> None:
    names = {check_node_id(config(composed, tmp_path, k).node_id) for k in range(composed.node["spec"]["replicas"])}
    assert len(names) >= 2


def test_a_variable_that_is_no_knob_is_refused_by_the_loader_that_these_tests_read_pods_with(
    composed: Composed, tmp_path: Path
) -> None:
    container(composed.node)["env"].append({"name": "SLLM_DRAIN_TIME", "value": "1"})
    with pytest.raises(ConfigInvalid, match="SLLM_DRAIN_TIME: there is no knob"):
        config(composed, tmp_path)
    container(composed.node)["env"].pop()


@asynccontextmanager
async def closing(system: ActorSystem) -> AsyncIterator[ActorSystem]:
    try:
        yield system
    finally:
        await system.close()


async def test_a_node_can_listen_where_its_pod_says_and_tells_others_its_own_name(
    composed: Composed, filled: Path, tmp_path: Path
) -> None:
    found = config(composed, tmp_path, 1)
    secret = read_cluster_secret(str(filled / "base/secrets/cluster-secret"))
    assert found.listen.endswith(f":{ports(composed.node)['actors']}")
    free = found.listen.rpartition(":")[0] + ":0"
    async with closing(ActorSystem(node_id=found.node_id, security=secret)) as system:
        await system.listen(free, advertise=found.advertise)
        address = system.address
    headless = composed.one("Service", composed.node["spec"]["serviceName"])
    where = f"{headless['metadata']['name']}.{headless['metadata']['namespace']}.svc"
    assert str(address) == f"sllm-node-1@tcp://sllm-node-1.{where}:{ports(composed.node)['actors']}"


async def test_without_the_secret_a_node_would_not_listen_there(composed: Composed, tmp_path: Path) -> None:
    found = config(composed, tmp_path)
    async with closing(ActorSystem(node_id=found.node_id)) as system:
        with pytest.raises(ConfigInvalid):
            await system.listen("tcp://0.0.0.0:0", advertise=found.advertise)


def test_the_file_of_secrets_that_the_node_reads_is_mounted_with_what_the_operator_made(
    composed: Composed, filled: Path, tmp_path: Path
) -> None:
    found = config(composed, tmp_path)
    (secret,) = composed.of("Secret")
    volumes = {volume["name"]: volume for volume in pod(composed.node)["volumes"]}
    for path in (found.api_key_file, found.cluster_secret_file):
        mount, key = volume_at(composed.node, path)
        volume = volumes[mount["name"]]["secret"]
        assert (volume["secretName"], key in secret["data"]) == (secret["metadata"]["name"], True)
        # Under an fsGroup the kubelet gives the group its bit, whatever stands here; nobody else may have one.
        assert volume["defaultMode"] == 0o440
        assert "subPath" not in mount
    assert read_keys(str(filled / "base/secrets/api-keys.toml")).keys[0].name == "ops"


def test_the_node_reads_its_mounted_configuration_and_writes_where_it_may(composed: Composed, tmp_path: Path) -> None:
    found, node = config(composed, tmp_path), container(composed.node)
    mount, name = volume_at(composed.node, node["args"][node["args"].index("--config") + 1])
    assert name in composed.one("ConfigMap", "sllm-node")["data"]
    assert {"name": mount["name"], "configMap": {"name": "sllm-node"}} in pod(composed.node)["volumes"]
    data, _ = volume_at(composed.node, found.data_dir)
    (claim,) = composed.node["spec"]["volumeClaimTemplates"]
    assert data["name"] == claim["metadata"]["name"]
    assert found.ssd_quota_bytes <= 0.9 * quantity(claim["spec"]["resources"]["requests"]["storage"])
    temporary, _ = volume_at(composed.node, environment(composed.node)["HOME"])
    assert any(volume["name"] == temporary["name"] and "emptyDir" in volume for volume in pod(composed.node)["volumes"])


def test_ports_of_services_probes_and_the_configuration_agree(composed: Composed, tmp_path: Path) -> None:
    found = config(composed, tmp_path)
    assert ports(composed.node) == {"http": found.port, "actors": int(found.listen.rpartition(":")[2])}
    for service in composed.of("Service"):
        (target,) = selected(composed, service["spec"]["selector"])
        for port in service["spec"]["ports"]:
            assert ports(target)[port["targetPort"]] == port["port"]
    for workload in (composed.node, composed.etcd):
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container(workload)[probe]
            assert (asked.get("httpGet") or asked["tcpSocket"])["port"] in ports(workload)


def test_probes_ask_for_what_a_node_answers_without_a_key(composed: Composed) -> None:
    node = container(composed.node)
    asked = {probe: node[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert asked == {"startupProbe": "/health", "readinessProbe": "/ready", "livenessProbe": "/health"}
    assert set(asked.values()) <= OPEN_PATHS


def selected(composed: Composed, selector: dict[str, str]) -> list[Manifest]:
    assert selector
    return [one for one in (composed.node, composed.etcd) if selector.items() <= labels(one).items()]


def selectors(composed: Composed) -> Iterator[tuple[str, dict[str, str]]]:
    """Give every selector, with the name of the workload that it is meant for."""
    for service in composed.of("Service"):
        yield ("sllm-etcd" if "etcd" in service["metadata"]["name"] else "sllm-node"), service["spec"]["selector"]
    for kind, field in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        for made in composed.of(kind):
            yield made["metadata"]["name"], made["spec"][field]["matchLabels"]
    for workload in (composed.node, composed.etcd):
        name = workload["metadata"]["name"]
        yield name, workload["spec"]["selector"]["matchLabels"]
        for spread in pod(workload).get("topologySpreadConstraints", ()):
            yield name, spread["labelSelector"]["matchLabels"]
        anti = pod(workload).get("affinity", {}).get("podAntiAffinity", {})
        for term in anti.get("requiredDuringSchedulingIgnoredDuringExecution", ()):
            yield name, term["labelSelector"]["matchLabels"]


def test_every_selector_selects_the_pods_that_it_is_for_and_no_others(composed: Composed) -> None:
    found = list(selectors(composed))
    assert len(found) == 11
    for name, selector in found:
        assert [one["metadata"]["name"] for one in selected(composed, selector)] == [name]


def test_only_nodes_reach_nodes_and_only_they_and_members_reach_etcd(composed: Composed) -> None:
    reach: set[tuple[str, str, str]] = set()
    for policy in composed.of("NetworkPolicy"):
        assert policy["spec"]["policyTypes"] == ["Ingress"]
        (target,) = selected(composed, policy["spec"]["podSelector"]["matchLabels"])
        for rule in policy["spec"]["ingress"]:
            froms = [selected(composed, one["podSelector"]["matchLabels"]) for one in rule.get("from", ())]
            names = [one["metadata"]["name"] for (one,) in froms] or ["anybody"]
            reach |= {(name, policy["metadata"]["name"], port["port"]) for name in names for port in rule["ports"]}
        assert {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]} == set(ports(target))
    assert reach == {
        ("anybody", "sllm-node", "http"), ("sllm-node", "sllm-node", "actors"), ("sllm-node", "sllm-etcd", "client"),
        ("sllm-etcd", "sllm-etcd", "client"), ("sllm-etcd", "sllm-etcd", "peer"),
    }  # fmt: skip


def test_a_pod_has_the_time_that_its_node_takes_to_finish_answers(composed: Composed, tmp_path: Path) -> None:
    found = config(composed, tmp_path)
    program, pause_s = container(composed.node)["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    needed_s = float(pause_s) + found.drain_timeout_s + found.engine_stop_timeout_s
    assert pod(composed.node)["terminationGracePeriodSeconds"] >= needed_s + 10


def test_what_a_node_takes_fits_the_memory_and_the_cores_of_its_pod(composed: Composed, tmp_path: Path) -> None:
    found, resources = config(composed, tmp_path), container(composed.node)["resources"]
    limits = resources["limits"]
    assert resources["requests"] == limits, "other pods could take what this one counts on"
    assert found.engine_threads == int(limits["cpu"])
    pool_bytes = found.host_pool_bytes
    if found.huge_pages:
        assert quantity(limits["hugepages-2Mi"]) == pool_bytes
        pool_bytes = 0
    others = found.max_instances * found.kv_cache_bytes + found.pull_memory_bytes + found.grammar_memory_bytes
    assert pool_bytes + others <= (1 - SHARE_FOR_PROCESSES) * quantity(limits["memory"])
    assert found.huge_pages == ("hugepages-2Mi" in limits), "without a limit its own pages would not be given to a pod"


def test_the_overlays_differ_as_their_names_say(filled: Path) -> None:
    limits = {name: container(Composed(filled, name).node)["resources"]["limits"] for name in OVERLAYS}
    assert [name for name in OVERLAYS if "nvidia.com/gpu" in limits[name]] == ["overlays/gpu"]
    assert [name for name in OVERLAYS if "hugepages-2Mi" in limits[name]] == ["overlays/cpu-huge-pages"]
    images = {name: container(Composed(filled, name).node)["image"] for name in OVERLAYS}
    assert (images["overlays/cpu"], images["overlays/gpu"]) == ("sllm-node:0.1.0-cpu", "sllm-node:0.1.0-cuda")
    gpu = pod(Composed(filled, "overlays/gpu").node)
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in gpu["tolerations"]


def test_pods_fit_the_restricted_standard_that_their_namespace_enforces(composed: Composed) -> None:
    (namespace,) = composed.of("Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {made["metadata"]["namespace"] for made in composed.objects if made is not namespace} == {
        namespace["metadata"]["name"]
    }
    for workload in (composed.node, composed.etcd):
        assert pod(workload)["securityContext"]["runAsNonRoot"] is True
        assert pod(workload)["securityContext"]["runAsUser"] > 0
        assert pod(workload)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod(workload)["automountServiceAccountToken"] is False
        assert container(workload)["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip


def test_services_put_no_variables_into_pods_that_a_node_would_take_for_knobs(composed: Composed) -> None:
    prefixes = [one["metadata"]["name"].upper().replace("-", "_") for one in composed.of("Service")]
    assert any(prefix.startswith("SLLM_") for prefix in prefixes)
    assert pod(composed.node)["enableServiceLinks"] is False


def test_a_drain_of_machines_leaves_etcd_its_majority_and_nodes_to_ask(composed: Composed) -> None:
    for workload in (composed.node, composed.etcd):
        budget = composed.one("PodDisruptionBudget", workload["metadata"]["name"])["spec"]["maxUnavailable"]
        replicas = workload["spec"]["replicas"]
        assert replicas - budget >= (replicas // 2 + 1 if workload is composed.etcd else 1)


def options_of_etcd(composed: Composed) -> dict[str, str]:
    variables = environment(composed.etcd)
    pairs = (argument.removeprefix("--").partition("=") for argument in container(composed.etcd)["args"])
    return {name: REFERENCE.sub(lambda match: variables[match.group(1)], value) for name, _, value in pairs}


def test_etcd_knows_every_option_that_it_is_given(composed: Composed) -> None:
    told = subprocess.run([etcd_program(UNPACKED), "--help"], capture_output=True, text=True, timeout=30, check=True)
    known = set(re.findall(r"^\s+--([a-z0-9-]+)", told.stdout + told.stderr, re.MULTILINE))
    assert options_of_etcd(composed).keys() <= known
    assert "initial-clusters" not in known


def test_members_of_etcd_find_each_other_by_the_names_of_their_pods(composed: Composed) -> None:
    options, etcd = options_of_etcd(composed), composed.etcd
    name, service, peer = etcd["metadata"]["name"], etcd["spec"]["serviceName"], ports(etcd)["peer"]
    members = [f"{name}-{k}=http://{name}-{k}.{service}:{peer}" for k in range(etcd["spec"]["replicas"])]
    assert options["initial-cluster"].split(",") == members
    assert f"{options['name']}={options['initial-advertise-peer-urls']}" == members[0]
    assert options["listen-peer-urls"] == f"http://0.0.0.0:{peer}"
    assert options["listen-client-urls"] == f"http://0.0.0.0:{ports(etcd)['client']}"
    assert options["advertise-client-urls"] == f"http://{name}-0.{service}:{ports(etcd)['client']}"
    mount, _ = volume_at(etcd, options["data-dir"])
    assert mount["name"] == etcd["spec"]["volumeClaimTemplates"][0]["metadata"]["name"]


def test_nodes_agree_by_the_members_of_etcd_that_are_deployed_beside_them(composed: Composed, tmp_path: Path) -> None:
    found, etcd = config(composed, tmp_path), composed.etcd
    name, service, client = etcd["metadata"]["name"], etcd["spec"]["serviceName"], ports(etcd)["client"]
    members = [f"{name}-{k}.{service}" for k in range(etcd["spec"]["replicas"])]
    assert [(url.scheme, url.host, url.port) for url in parse_endpoints(found.metadata)] == [
        ("http", member, client) for member in members
    ]
    # Half of a lease's time is there for members that hang, and one costs 2 s.
    assert found.lease_ttl_s >= 8


def tracked() -> list[str]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "deploy"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    return [name for name in listed.stdout.split("\0") if name]


def test_no_secret_is_in_git_and_those_that_an_operator_makes_stay_out_of_it() -> None:
    names = tracked()
    assert "deploy/kubernetes/base/kustomization.yaml" in names
    assert [name for name in names if "/secrets/" in name] == ["deploy/kubernetes/base/secrets/.gitignore"]
    for name in names:
        if name.endswith(".yaml"):
            assert "Secret" not in [made.get("kind") for made in yaml.safe_load_all((ROOT / name).read_text())]
    base: dict[str, Any] = yaml.safe_load((KUBERNETES / "base/kustomization.yaml").read_text())
    (secrets,) = base["secretGenerator"]
    assert secrets.keys() == {"name", "files", "options"}, "a secret comes from a file, and never stands there itself"
    for file in secrets["files"]:
        made = f"deploy/kubernetes/base/{file.partition('=')[2]}"
        assert subprocess.run(["git", "check-ignore", "-q", made], cwd=ROOT, check=False).returncode == 0
