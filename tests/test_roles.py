"""Nodes that each have one role: the one leads, the other answers clients, the third runs the models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from clusters import ANSWER, CHAT, QUESTION, eventually
from conftest import SMALL
from metadata_stores import UNPACKED

from sllm_actor.config import Config
from sllm_actor.errors import ConfigInvalid
from sllm_actor.testing.node_cluster import NodeCluster, running_cluster
from sllm_actor.testing.node_process import Reply

KNOBS = (*SMALL, "listen=tcp://127.0.0.1:0", "lease_ttl_s=2", "warm_engines=1")
LEADS, GATEWAY, WORKER = "leads", "gateway", "worker"


@pytest.fixture(scope="module")
def cluster(warm_starts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeCluster]:
    folder, knobs = tmp_path_factory.mktemp("roles"), [*KNOBS, "roles=controller"]
    with running_cluster(folder, UNPACKED, [LEADS], knobs) as running:
        running.start(GATEWAY, knobs=["roles=gateway"])
        running.start(WORKER, knobs=["roles=worker"])
        eventually(lambda: all(len(running.shown(name)) == 3 for name in running.nodes))
        for model in ("warm", "cold"):
            running.nodes[GATEWAY].deploy("builtin:demo", model)
        yield running


def refused(reply: Reply) -> tuple[int, str]:
    return reply.status, reply.json()["error"]["code"]


def test_who_has_the_role_does_it(cluster: NodeCluster) -> None:
    assert cluster.nodes[GATEWAY].chat("warm", QUESTION) == ANSWER
    instances = cluster.nodes[LEADS].call("GET", "/admin/instances")["instances"]
    assert {one["node"] for one in instances} == {WORKER}
    shown = cluster.shown(WORKER)
    assert {name: node["roles"] for name, node in shown.items()} == {
        LEADS: ["controller"], GATEWAY: ["gateway"], WORKER: ["worker"],
    }  # fmt: skip
    assert [name for name, node in shown.items() if node["leads"]] == [LEADS]


def test_who_is_no_worker_has_no_room_and_no_engine_and_who_only_leads_no_process_at_all(cluster: NodeCluster) -> None:
    eventually(lambda: all(node["reported"] for node in cluster.shown(GATEWAY).values()))
    shown = cluster.shown(GATEWAY)
    assert {name: node["slots"] > 0 for name, node in shown.items()} == {LEADS: False, GATEWAY: False, WORKER: True}
    assert {shown[name]["host_pool_bytes"] for name in (LEADS, GATEWAY)} == {0}
    assert cluster.nodes[LEADS].children() == []
    assert cluster.nodes[WORKER].children() != []


def test_who_is_no_gateway_answers_operators_alone(cluster: NodeCluster) -> None:
    body = {"model": "warm", "messages": [{"role": "user", "content": QUESTION}]}
    for name in (LEADS, WORKER):
        node = cluster.nodes[name]
        assert [node.request("GET", path).status for path in ("/health", "/ready", "/metrics", "/admin/nodes")] == [
            200, 200, 200, 200,
        ]  # fmt: skip
        assert refused(node.request("POST", CHAT, body)) == (503, "role_missing")
        assert refused(node.request("GET", "/v1/models")) == (503, "role_missing")


def test_a_model_is_deployed_where_something_can_try_it(cluster: NodeCluster) -> None:
    body = {"source": "builtin:demo", "name": "another"}
    assert refused(cluster.nodes[LEADS].request("POST", "/admin/models", body)) == (503, "role_missing")
    assert cluster.nodes[WORKER].request("POST", "/admin/models", body).status == 201


def test_without_any_controller_what_runs_goes_on_and_a_cold_start_is_refused(cluster: NodeCluster) -> None:
    assert cluster.nodes[GATEWAY].chat("warm", QUESTION) == ANSWER
    cluster.kill(LEADS)
    eventually(lambda: "has the role controller" in cluster.log(GATEWAY).read_text())
    assert cluster.nodes[GATEWAY].chat("warm", QUESTION) == ANSWER
    body = {"model": "cold", "messages": [{"role": "user", "content": QUESTION}]}
    reply = cluster.nodes[GATEWAY].request("POST", CHAT, body)
    assert refused(reply) == (503, "no_leader")
    assert "retry-after" in {name.lower() for name in reply.headers}
    cluster.start("leads-2", knobs=["roles=controller"])
    assert cluster.nodes[GATEWAY].chat("cold", QUESTION) == ANSWER


@pytest.mark.parametrize("roles", ["", "boss", "gateway,", "gateway worker", "worker,worker,worker,worker"])
def test_roles_that_are_none_are_refused(roles: str) -> None:
    with pytest.raises(ConfigInvalid, match="roles"):
        Config(roles=roles, metadata="etcd://127.0.0.1:2379", listen="tcp://127.0.0.1:0")


def test_a_node_that_is_alone_is_its_own_controller_and_worker() -> None:
    for roles in ("gateway", "gateway,worker", "controller"):
        with pytest.raises(ConfigInvalid, match="alone"):
            Config(roles=roles)
    assert Config(roles="controller,worker").roles == "controller,worker"
