"""Nodes whose link is parted or half open, or whose wall clocks jump: each request is answered, and nothing is left."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from clusters import ANSWER, CHAT, LONG, QUESTION, ask, eventually, home_of, streamed, under_way
from compiled import shared_library
from conftest import SMALL
from link_proxy import LinkProxy
from metadata_stores import UNPACKED

from sllm_actor.testing.etcd import running_etcd
from sllm_actor.testing.node_cluster import NodeCluster

pytestmark = pytest.mark.skipif("SLLM_NIGHTLY" not in os.environ, reason="scripts/test --nightly runs it")

NAMES = ("n1", "n2")
KNOBS = (*SMALL, "lease_ttl_s=2", "max_instances=2", "warm_engines=1", "start_timeout_s=60")
DAY_S = 86_400
# A fork server, two text processes, and an idle engine.
OWN_CHILDREN = 4
# What a request may be told while the nodes can't reach each other.
TYPED = ("no_leader", "node_unreachable", "node_down", "no_capacity", "deadline_exceeded")


class Pair(NamedTuple):
    """Two nodes, each reached through a proxy of its own; their wall clocks are off by what is in the file."""

    cluster: NodeCluster
    links: dict[str, LinkProxy]
    offset: Path

    def set_clocks(self, offset_s: int) -> None:
        with self.offset.open("r+b") as file:
            file.write(struct.pack("<q", offset_s))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def pair(warm_starts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    shim = shared_library(folder, "clock_shim", "tests/clock_shim.cc")
    offset = folder / "offset"
    offset.write_bytes(bytes(8))
    environment = {"LD_PRELOAD": str(shim), "CLOCK_SHIM_OFFSET": str(offset)}
    with running_etcd(folder, UNPACKED) as etcd, ExitStack() as stack:
        cluster = NodeCluster(folder, etcd, KNOBS)
        stack.callback(cluster.stop)
        links: dict[str, LinkProxy] = {}
        for name in NAMES:
            port = free_port()
            links[name] = stack.enter_context(LinkProxy("127.0.0.1", port))
            knobs = [f"listen=tcp://127.0.0.1:{port}", f"advertise=tcp://127.0.0.1:{links[name].port}"]
            cluster.start(name, knobs=knobs, environment=environment)
        for name in "ab":
            cluster.nodes["n1"].deploy("builtin:demo", name)
        made = Pair(cluster, links, offset)
        check_whole(made)
        yield made


def check_whole(pair: Pair) -> None:
    """See that both know each other, one leads, every instance is somebody's alone, and every engine somebody's."""
    cluster = pair.cluster
    for asked in NAMES:
        eventually(partial(is_whole, cluster, asked))
        assert cluster.nodes[asked].chat("a", QUESTION) == cluster.nodes[asked].chat("b", QUESTION) == ANSWER
    views = [cluster.nodes[name].call("GET", "/admin/instances")["instances"] for name in NAMES]
    names = [one["instance_id"] for one in views[0]]
    assert len(set(names)) == len(names)
    assert sorted(names) == sorted(one["instance_id"] for one in views[1])
    for name in NAMES:
        eventually(partial(has_no_orphans, cluster, name))


def is_whole(cluster: NodeCluster, asked: str) -> bool:
    shown = cluster.shown(asked)
    return (
        sorted(shown) == list(NAMES)
        and all(node["reported"] for node in shown.values())
        and sum(node["leads"] for node in shown.values()) == 1
        and not any(node["active"] for node in shown.values())
    )


def has_no_orphans(cluster: NodeCluster, name: str) -> bool:
    """Tell whether a node's processes are those of its instances, and those that it has without any."""
    node = cluster.nodes[name]
    running = [one["pid"] for one in node.call("GET", "/admin/instances")["instances"] if one["node"] == name]
    children = node.children()
    return set(running) <= set(children) and len(children) == len(running) + OWN_CHILDREN


def placed(pair: Pair, home: str) -> None:
    """Have model a run on one node alone."""
    (other,) = set(NAMES) - {home}
    node = pair.cluster.nodes[home]
    for name in NAMES:
        pair.cluster.nodes[name].call("POST", "/admin/models/a/unload")
    node.call("POST", f"/admin/nodes/{other}/cordon")
    eventually(lambda: bool(pair.cluster.shown(home)[other]["cordoned"]))
    assert node.chat("a", QUESTION) == ANSWER
    node.call("POST", f"/admin/nodes/{other}/uncordon")
    assert home_of(pair.cluster, "a", home) == home


@pytest.fixture(scope="module")
def wanted(pair: Pair) -> str:
    text, error = streamed(pair.cluster.nodes["n1"], "a", LONG)
    assert error is None
    return text


def check_stream_over(pair: Pair, wanted: str, gateway: str, home: str, fault: str) -> None:
    """Break the link under a stream; it goes on, and so do both nodes for whoever asks them."""
    placed(pair, home)
    node = pair.cluster.nodes[gateway]
    with ThreadPoolExecutor(3) as pool:
        answer = pool.submit(streamed, node, "a", LONG)
        eventually(lambda: under_way(node) > 20)
        if fault == "half open":
            assert sum(link.half_open() for link in pair.links.values()) >= 1
        else:
            for link in pair.links.values():
                link.cut()
        asked = [pool.submit(one.request, "POST", CHAT, ask("a")) for one in pair.cluster.nodes.values()]
        replies = [one.result() for one in asked]
        assert answer.result() == (wanted, None)
    for reply in replies:
        body = reply.json()
        assert reply.status == 200 or body["error"]["code"] in TYPED, body


@pytest.mark.parametrize("fault", ["partition", "half open"])
def test_a_stream_outlives_the_link_to_its_node_and_both_are_members_again(fault: str, pair: Pair, wanted: str) -> None:
    try:
        check_stream_over(pair, wanted, "n1", "n2", fault)
    finally:
        for link in pair.links.values():
            link.mend()
    check_whole(pair)


def test_wall_clocks_that_jump_move_nothing_but_the_dates(pair: Pair, wanted: str) -> None:
    placed(pair, "n2")
    leader, node = pair.cluster.leader("n1"), pair.cluster.nodes["n1"]
    epochs = {name: one["epoch"] for name, one in pair.cluster.shown("n1").items()}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(streamed, node, "a", LONG)
        eventually(lambda: under_way(node) > 20)
        for offset_s in (DAY_S, -DAY_S):
            pair.set_clocks(offset_s)
            created = node.call("POST", CHAT, ask("b"))["created"]
            assert abs(created - time.time() - offset_s) < DAY_S / 2, "the shim has set it"
        assert answer.result() == (wanted, None)
    check_whole(pair)
    assert pair.cluster.leader("n1") == leader
    assert {name: one["epoch"] for name, one in pair.cluster.shown("n1").items()} == epochs
    pair.set_clocks(0)
