"""Three real nodes around a real etcd: what is asked of one, the cluster does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from clusters import eventually
from conftest import SMALL
from metadata_stores import UNPACKED

from sllm_actor.testing.node_cluster import NodeCluster, running_cluster
from sllm_actor.testing.node_process import running_node

NAMES = ("n1", "n2", "n3")
KNOBS = (*SMALL, "listen=tcp://127.0.0.1:0", "lease_ttl_s=2", "max_instances=2", "warm_engines=1")
QUESTION, ANSWER = "What is 2 + 3?", "2 + 3 = 5"


@pytest.fixture(scope="module")
def cluster(warm_starts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeCluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster"), UNPACKED, NAMES, KNOBS) as running:
        yield running


def deployed(cluster: NodeCluster, name: str) -> None:
    """Deploy a model through one node, and wait until all know it."""
    cluster.nodes["n1"].deploy("builtin:demo", name)
    nodes = cluster.nodes.values()
    eventually(lambda: all(node.request("GET", f"/v1/models/{name}").status != 404 for node in nodes))


def running(cluster: NodeCluster, asked: str = "n1") -> dict[str, str]:
    """Give the node of each instance."""
    instances = cluster.nodes[asked].call("GET", "/admin/instances")["instances"]
    return {one["instance_id"]: one["node"] for one in instances}


def homes(cluster: NodeCluster, model: str) -> list[str]:
    """Give the nodes that run a model, one for each instance."""
    return [node for instance_id, node in running(cluster).items() if instance_id.startswith(f"{model}-")]


def test_the_nodes_know_each_other_and_one_of_them_leads(cluster: NodeCluster) -> None:
    for name in NAMES:
        eventually(lambda name=name: all(node["reported"] for node in cluster.shown(name).values()))  # type: ignore[misc]
        shown = cluster.shown(name)
        assert list(shown) == list(NAMES)
        assert sum(node["leads"] for node in shown.values()) == 1
        assert all(node["address"].startswith("n") and node["slots"] == 2 for node in shown.values())


def test_a_model_deployed_on_one_node_is_served_through_every_node_by_one_instance(cluster: NodeCluster) -> None:
    deployed(cluster, "a")
    with ThreadPoolExecutor(len(NAMES)) as pool:
        answers = pool.map(lambda name: cluster.nodes[name].chat("a", QUESTION), NAMES)
    assert list(answers) == [ANSWER] * len(NAMES)
    for name in NAMES:
        assert len([one for one in running(cluster, name) if one.startswith("a-")]) == 1
        assert cluster.nodes[name].chat("a", QUESTION) == ANSWER
    assert cluster.nodes["n2"].call("POST", "/admin/models/a/unload")["stopped"] == 1
    assert not [one for one in running(cluster) if one.startswith("a-")]


def test_a_model_removed_through_one_node_is_gone_from_all(cluster: NodeCluster) -> None:
    deployed(cluster, "b")
    assert cluster.nodes["n3"].chat("b", QUESTION) == ANSWER
    cluster.nodes["n2"].call("DELETE", "/admin/models/b")
    nodes = cluster.nodes.values()
    eventually(lambda: all(node.request("GET", "/v1/models/b").status == 404 for node in nodes))
    eventually(lambda: not any(one.startswith("b-") for one in running(cluster)))


def test_nothing_is_started_on_a_cordoned_node_until_it_is_uncordoned(cluster: NodeCluster) -> None:
    deployed(cluster, "c")
    for name in ("n1", "n2"):
        cluster.nodes["n3"].call("POST", f"/admin/nodes/{name}/cordon")
        eventually(lambda name=name: cluster.shown("n3")[name]["cordoned"])  # type: ignore[misc]
    assert cluster.nodes["n1"].chat("c", QUESTION) == ANSWER
    assert set(running(cluster).values()) == {"n3"}
    for name in ("n1", "n2"):
        cluster.nodes["n3"].call("POST", f"/admin/nodes/{name}/uncordon")
    assert cluster.nodes["n1"].call("POST", "/admin/nodes/n3/drain") == {"drained": "n3", "stopped": 1}
    assert running(cluster) == {}
    assert cluster.nodes["n3"].chat("c", QUESTION) == ANSWER
    assert not set(running(cluster).values()) & {"n3"}
    cluster.nodes["n3"].call("POST", "/admin/nodes/n3/uncordon")


def test_a_node_that_is_not_there_is_not_found(cluster: NodeCluster) -> None:
    reply = cluster.nodes["n1"].request("POST", "/admin/nodes/n9/drain")
    assert (reply.status, reply.json()["error"]["code"]) == (404, "node_not_found")
    assert "n1, n2, n3" in reply.json()["error"]["message"]


def test_a_second_node_of_a_name_refuses_to_start(cluster: NodeCluster, tmp_path: Path) -> None:
    knobs = (*KNOBS, "node_id=n1", f"metadata={cluster.etcd.url()}")
    with pytest.raises(RuntimeError, match="another node has the id n1"), running_node(tmp_path / "twin", *knobs):
        pass
    assert cluster.nodes["n1"].chat("c", QUESTION) == ANSWER


def test_a_minimum_of_instances_runs_unasked_each_on_a_node_of_its_own(cluster: NodeCluster) -> None:
    deployed(cluster, "d")
    cluster.nodes["n2"].deploy("builtin:demo", "d", keep_alive=0, min_instances=2)
    eventually(lambda: len(homes(cluster, "d")) == 2)
    assert len(set(homes(cluster, "d"))) == 2
    for name in NAMES:
        assert cluster.nodes[name].chat("d", QUESTION) == ANSWER
    instances = running(cluster)
    cluster.nodes["n3"].deploy("builtin:demo", "d", keep_alive=0, min_instances=1)
    eventually(lambda: len(homes(cluster, "d")) == 1)
    assert running(cluster).items() <= instances.items()
    cluster.nodes["n1"].deploy("builtin:demo", "d", keep_alive=0)
    eventually(lambda: not homes(cluster, "d"))


def test_more_instances_run_while_more_ask_and_stop_when_nobody_does(cluster: NodeCluster) -> None:
    deployed(cluster, "e")
    cluster.nodes["n1"].deploy("builtin:demo", "e", keep_alive=1, max_instances=3, target_concurrency=1)
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(cluster.nodes[NAMES[k % 3]].chat, "e", "Count from 1 to 250.") for k in range(6)]
        eventually(lambda: len(homes(cluster, "e")) > 1)
        assert all(answer.result().endswith("250") for answer in answers)
    eventually(lambda: not homes(cluster, "e"))


def test_a_knob_is_changed_on_one_node_after_another_and_nothing_is_lost(cluster: NodeCluster) -> None:
    deployed(cluster, "f")
    changed, asked = threading.Event(), cluster.nodes["n3"]

    def ask_on() -> list[str]:
        answers = [asked.chat("f", QUESTION)]
        while not changed.is_set():
            answers.append(asked.chat("f", QUESTION))
        return answers

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask_on) for _ in range(2)]
        try:
            for name in ("n1", "n2"):
                asked.call("POST", f"/admin/nodes/{name}/drain")
                assert cluster.stop_node(name) == (0, [])
                cluster.start(name, knobs=["keep_alive_s=77"])
                eventually(lambda name=name: asked.request("POST", f"/admin/nodes/{name}/uncordon").status == 200)  # type: ignore[misc]
        finally:
            changed.set()
        assert all(set(one.result()) == {ANSWER} for one in asking)
    for name in ("n1", "n2"):
        assert cluster.nodes[name].deploy("builtin:demo", f"g-{name}")["keep_alive_s"] == 77
    assert not any(node["cordoned"] for node in cluster.shown("n3").values())
