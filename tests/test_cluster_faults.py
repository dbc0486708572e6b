"""Nodes and members of etcd that are killed, held up and cut off: nobody waits in vain, and all recovers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from clusters import (
    ANSWER,
    CHAT,
    LONG,
    NAMES,
    QUESTION,
    ask,
    eventually,
    home_of,
    placed_on,
    streamed,
    under_way,
    whole,
)
from conftest import SMALL
from link_proxy import LinkProxy
from metadata_stores import UNPACKED

from sllm_actor.testing.node_cluster import NodeCluster, running_cluster
from sllm_actor.testing.node_process import living

TTL_S = 2
KNOBS = (
    *SMALL, "listen=tcp://127.0.0.1:0", f"lease_ttl_s={TTL_S}", "max_instances=2", "warm_engines=1",
    "start_timeout_s=60",
)  # fmt: skip


@pytest.fixture(scope="module")
def cluster(warm_starts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeCluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster"), UNPACKED, NAMES, KNOBS, members=3) as running:
        for name in "abc":
            running.nodes["n1"].deploy("builtin:demo", name)
        eventually(lambda: all(node.request("GET", "/v1/models/c").status == 200 for node in running.nodes.values()))
        yield running


def test_a_request_for_a_model_whose_node_was_killed_is_answered_by_another(cluster: NodeCluster) -> None:
    whole(cluster)
    leader = cluster.leader("n1")
    victim, other = [name for name in NAMES if name != leader]
    placed_on(cluster, "a", victim)
    assert cluster.nodes[other].chat("a", QUESTION) == ANSWER
    left = cluster.kill(victim)
    eventually(lambda: living(left) == [])
    assert cluster.nodes[other].chat("a", QUESTION) == ANSWER
    assert home_of(cluster, "a", other) != victim
    eventually(lambda: set(cluster.shown(other)) == {leader, other})


def test_a_stream_whose_node_is_killed_goes_on_elsewhere_with_the_same_text(cluster: NodeCluster) -> None:
    whole(cluster)
    leader = cluster.leader("n1")
    victim, other = [name for name in NAMES if name != leader]
    placed_on(cluster, "a", victim)
    undisturbed, error = streamed(cluster.nodes[other], "a", LONG)
    assert error is None
    with ThreadPoolExecutor(1) as pool:
        answer: Future[tuple[str, Any]] = pool.submit(streamed, cluster.nodes[other], "a", LONG)
        eventually(lambda: under_way(cluster.nodes[other]) > 20)
        cluster.kill(victim)
        assert answer.result() == (undisturbed, None)
    assert cluster.nodes[other].call("GET", "/admin/runtime")["starts"]["recovered"] >= 1


def test_a_node_that_is_stopped_finishes_what_its_instances_answer_for_others(cluster: NodeCluster) -> None:
    whole(cluster)
    leader = cluster.leader("n1")
    other, _ = [name for name in NAMES if name != leader]
    placed_on(cluster, "a", leader)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(streamed, cluster.nodes[other], "a", LONG)
        eventually(lambda: cluster.shown(other)[leader]["active"] == 1)
        assert cluster.stop_node(leader) == (0, [])
        text, error = answer.result()
    assert (text.split()[-1].rstrip("."), error) == ("500", None)
    assert cluster.nodes[other].chat("a", QUESTION) == ANSWER


def test_a_request_that_waits_for_a_place_outlives_the_leader(cluster: NodeCluster) -> None:
    whole(cluster)
    leader = cluster.leader("n1")
    other, third = [name for name in NAMES if name != leader]
    for name in NAMES:
        cluster.nodes[other].call("POST", f"/admin/nodes/{name}/cordon")
    eventually(lambda: all(node["cordoned"] for node in cluster.shown(other).values()))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(cluster.nodes[other].chat, "b", QUESTION)
        eventually(lambda: cluster.nodes[other].call("GET", "/admin/runtime")["waiting"].get("b") == 1)
        cluster.kill(leader)
        killed_s = time.monotonic()
        eventually(lambda: cluster.leader(other) in (other, third))
        print(f"another leads after {(time.monotonic() - killed_s) / TTL_S:.2f} lease times")
        for name in (other, third):
            cluster.nodes[other].call("POST", f"/admin/nodes/{name}/uncordon")
        assert answer.result() == ANSWER
    cluster.start(leader)
    cluster.nodes[other].call("POST", f"/admin/nodes/{leader}/uncordon")


def epoch_of(cluster: NodeCluster, name: str, asked: str) -> int:
    """Give a node's epoch, as another one says it; 0 where it has none, as between two of its lives."""
    shown = cluster.shown(asked)
    return int(shown[name]["epoch"]) if name in shown else 0


def test_a_leader_that_was_held_up_leads_no_more_and_comes_back_as_a_member(cluster: NodeCluster) -> None:
    whole(cluster)
    leader = cluster.leader("n1")
    other, _ = [name for name in NAMES if name != leader]
    placed_on(cluster, "a", leader)
    before = cluster.shown(other)[leader]["epoch"]
    cluster.hold_up(leader)
    try:
        eventually(lambda: cluster.leader(other) not in ("", leader))
        assert cluster.nodes[other].chat("a", QUESTION) == ANSWER
        assert cluster.nodes[other].chat("b", QUESTION) == ANSWER
    finally:
        cluster.go_on(leader)
    eventually(lambda: epoch_of(cluster, leader, other) > before)
    assert cluster.leader(leader) == cluster.leader(other) != leader
    assert cluster.nodes[leader].chat("c", QUESTION) == ANSWER


def test_a_leader_that_is_cut_off_from_etcd_is_followed_and_its_node_serves_again_when_it_is_back(
    cluster: NodeCluster,
) -> None:
    whole(cluster)
    with LinkProxy("127.0.0.1", cluster.etcd.members[0].port) as proxy:
        assert cluster.stop_node("n1") == (0, [])
        cluster.start("n1", knobs=[f"metadata=etcd://127.0.0.1:{proxy.port}"])
        for name in ("n2", "n3"):  # Whoever came first leads.
            assert cluster.stop_node(name) == (0, [])
        cluster.start("n2", "n3")
        whole(cluster)
        assert cluster.leader("n2") == "n1"
        placed_on(cluster, "a", "n1")
        before = cluster.shown("n2")["n1"]["epoch"]
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(streamed, cluster.nodes["n1"], "a", LONG)
            eventually(lambda: under_way(cluster.nodes["n1"]) > 0)
            proxy.cut()
            eventually(lambda: cluster.leader("n2") in ("n2", "n3"))
            assert cluster.nodes["n2"].chat("b", QUESTION) == ANSWER
            assert cluster.nodes["n3"].chat("a", QUESTION) == ANSWER
            text, error = answer.result()
            assert (text.split()[-1].rstrip("."), error) == ("500", None)
        proxy.mend()
        eventually(lambda: epoch_of(cluster, "n1", "n2") > before)
        assert cluster.leader("n1") == cluster.leader("n2") != "n1"
        assert cluster.nodes["n1"].chat("c", QUESTION) == ANSWER
        instances = cluster.nodes["n2"].call("GET", "/admin/instances")["instances"]
        assert len({one["instance_id"] for one in instances}) == len(instances)
        cluster.stop_node("n1")
    whole(cluster)


def test_without_a_quorum_of_etcd_what_runs_goes_on_and_a_cold_start_is_refused(cluster: NodeCluster) -> None:
    whole(cluster)
    placed_on(cluster, "a", "n1")
    killed = cluster.etcd.members[:2]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(streamed, cluster.nodes["n2"], "a", LONG)
        for member in killed:
            member.kill()
        eventually(lambda: not any(node["reported"] for node in cluster.shown("n3").values()))
        reply = cluster.nodes["n3"].request("POST", CHAT, ask("b"))
        assert (reply.status, reply.json()["error"]["code"]) == (503, "no_leader")
        assert int(reply.headers["Retry-After"]) >= 1
        assert cluster.nodes["n3"].chat("a", QUESTION) == ANSWER
        text, error = answer.result()
        assert (text.split()[-1].rstrip("."), error) == ("500", None)
    cluster.etcd.start(*killed)
    eventually(lambda: cluster.nodes["n3"].request("POST", CHAT, ask("b")).status == 200)
    whole(cluster)
