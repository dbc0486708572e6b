"""Streams whose gateway is lost, with real nodes and a real etcd: their clients go on at another one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from clusters import QUESTION, eventually
from conftest import SMALL
from metadata_stores import UNPACKED
from streams import CHAT, DONE, reading, rest, some, whole

from sllm_actor.testing.node_cluster import NodeCluster, running_cluster

NAMES = ("n1", "n2")
KNOBS = (
    *SMALL, "listen=tcp://127.0.0.1:0", "lease_ttl_s=2", "max_instances=2", "warm_engines=1", "start_timeout_s=60",
    "stream_log_lag_s=0.1",
)  # fmt: skip
ASKED = {
    "model": "a",
    "messages": [{"role": "user", "content": "Count from 1 to 120."}],
    "temperature": 0.8,
    "seed": 7,
    "stream_options": {"include_usage": True},
}


@pytest.fixture(scope="module")
def cluster(warm_starts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeCluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster"), UNPACKED, NAMES, KNOBS) as running:
        running.nodes["n1"].deploy("builtin:demo", "a")
        eventually(lambda: all(node.request("GET", "/v1/models/a").status == 200 for node in running.nodes.values()))
        yield running


def placed_on(cluster: NodeCluster, home: str) -> None:
    """Have the model run on one node, and both know of each other."""
    eventually(lambda: all(len(cluster.shown(name)) == 2 and cluster.leader(name) for name in NAMES))
    cluster.nodes[home].call("POST", "/admin/models/a/unload")
    (other,) = set(NAMES) - {home}
    cluster.nodes[home].call("POST", f"/admin/nodes/{other}/cordon")
    cluster.nodes[home].chat("a", QUESTION)
    cluster.nodes[home].call("POST", f"/admin/nodes/{other}/uncordon")


def test_a_client_that_comes_back_to_another_gateway_ends_its_stream_at_the_first(cluster: NodeCluster) -> None:
    placed_on(cluster, "n1")
    _, undisturbed = whole(cluster.nodes["n2"], CHAT, ASKED)
    with reading(cluster.nodes["n1"], CHAT, ASKED) as stream:
        first = some(stream, 20)
        second = rest(cluster.nodes["n2"], stream.stream_id, first[-1].id)
        left = list(stream.events)
    assert [event.choices() for event in first + second] == [event.choices() for event in undisturbed]
    # It may have been through already.
    assert left[-1].data == DONE or left[-1].error() == "stream_taken"


def test_without_etcd_streams_go_on_and_new_ones_can_not_be_gone_on_with(cluster: NodeCluster) -> None:
    placed_on(cluster, "n1")
    _, undisturbed = whole(cluster.nodes["n1"], CHAT, ASKED)
    with reading(cluster.nodes["n1"], CHAT, ASKED) as stream:
        first = next(stream.events)
        cluster.etcd.member.kill()
        assert [event.choices() for event in [first, *stream.events]] == [event.choices() for event in undisturbed]
    _, events = whole(cluster.nodes["n1"], CHAT, ASKED)
    assert not any(event.id for event in events)
    assert [event.choices() for event in events] == [event.choices() for event in undisturbed]
    cluster.etcd.start(cluster.etcd.member)
    eventually(lambda: cluster.nodes["n1"].request("GET", f"/v1/streams/{stream.stream_id}").status == 200)


@pytest.mark.parametrize("home", ["n2", "n1"])
def test_a_stream_whose_gateway_is_killed_goes_on_at_another_one(cluster: NodeCluster, home: str) -> None:
    if "n1" not in cluster.nodes:
        cluster.start("n1")
    placed_on(cluster, home)
    _, undisturbed = whole(cluster.nodes["n2"], CHAT, ASKED)
    with reading(cluster.nodes["n1"], CHAT, ASKED) as stream:
        read = some(stream, 100)
        cluster.kill("n1")
    read += rest(cluster.nodes["n2"], stream.stream_id, read[-1].id)
    assert [event.choices() for event in read] == [event.choices() for event in undisturbed]
    again = rest(cluster.nodes["n2"], stream.stream_id)
    assert [event.choices() for event in again] == [event.choices() for event in read]
