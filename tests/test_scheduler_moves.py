"""Real nodes make room: a running answer moves, or waits for its turn, and its client sees one stream."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from clusters import ask, eventually, home_of, streamed, under_way
from conftest import SMALL
from metadata_stores import UNPACKED
from safetensors.numpy import load_file, save_file
from test_metrics import look, value

from sllm_actor.sources.builtin import BUILTIN
from sllm_actor.testing.node_cluster import NodeCluster, running_cluster
from sllm_actor.testing.node_process import CLI, NodeProcess, running_node
from sllm_actor.testing.questions import count, is_right

KNOBS = (
    *SMALL, "listen=tcp://127.0.0.1:0", "lease_ttl_s=2", "max_instances=1", "warm_engines=1", "start_timeout_s=60",
)  # fmt: skip
# Less than the tall model takes, and enough for the other one.
SMALL_POOL = "host_pool_bytes=16MiB"
TIMES = 8
COUNT = count(1, 300)
LONG = COUNT.prompt


def tall(folder: Path) -> Path:
    """Make a model of the demo's layers, each several times: it says nothing of sense, and is as much larger."""
    shutil.copytree(BUILTIN["demo"], folder)
    config = json.loads((folder / "config.json").read_text())
    layers, (weights,) = config["num_hidden_layers"], folder.glob("*.safetensors")
    tensors = load_file(weights)
    for name, tensor in list(tensors.items()):
        before, found, rest = name.partition("layers.")
        number, _, what = rest.partition(".")
        for time in range(1, TIMES if found else 1):
            tensors[f"{before}layers.{int(number) + time * layers}.{what}"] = tensor
    save_file(tensors, weights, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers * TIMES}))
    return folder


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


@pytest.fixture(scope="module")
def cluster(warm_starts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeCluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with running_cluster(folder, UNPACKED, ("n1",), KNOBS) as running:
        running.start("n2", knobs=(SMALL_POOL,))
        running.nodes["n1"].deploy("builtin:demo", "a")
        running.nodes["n1"].deploy(tall(folder / "tall"), "tall")
        eventually(lambda: running.nodes["n2"].request("GET", "/v1/models/tall").status == 200)
        eventually(lambda: [node["reported"] for node in running.shown("n2").values()] == [True, True])
        yield running


def runs_on_n1(cluster: NodeCluster) -> None:
    """Have `a` alone run, and on the first node."""
    for model in ("a", "tall"):
        cluster.nodes["n1"].call("POST", f"/admin/models/{model}/unload")
    cluster.nodes["n1"].call("POST", "/admin/nodes/n1/uncordon")
    cluster.nodes["n1"].call("POST", "/admin/nodes/n2/cordon")
    eventually(lambda: [one["cordoned"] for one in cluster.shown("n1").values()] == [False, True])
    assert cluster.nodes["n1"].chat("a", "What is 2 + 3?") == "2 + 3 = 5"
    cluster.nodes["n1"].call("POST", "/admin/nodes/n2/uncordon")
    eventually(lambda: not cluster.shown("n1")["n2"]["cordoned"])
    assert home_of(cluster, "a", "n1") == "n1"


def streaming_from_n1(cluster: NodeCluster, pool: ThreadPoolExecutor) -> tuple[NodeProcess, Future[tuple[str, Any]]]:
    """Have `a` answer on the first node whom its client asks through the second."""
    runs_on_n1(cluster)
    n2 = cluster.nodes["n2"]
    stream = pool.submit(streamed, n2, "a", LONG)
    eventually(lambda: under_way(n2) > 20)
    return n2, stream


def posted(node: NodeProcess, request_id: str, body: dict[str, Any]) -> int:
    return node.request("POST", "/v1/chat/completions", body, {"X-Request-Id": request_id}).status


def test_a_running_answer_moves_away_from_where_another_model_has_to_start(
    cluster: NodeCluster, pool: ThreadPoolExecutor
) -> None:
    n2, stream = streaming_from_n1(cluster, pool)
    moving = str(n2.call("GET", "/admin/requests")["requests"][0]["request_id"])
    assert posted(n2, "for-tall", ask("tall") | {"max_tokens": 3}) == 200
    running = not stream.done()
    text, error = stream.result()
    assert (error, running) == (None, True)
    assert is_right(COUNT, text)
    assert (home_of(cluster, "tall", "n2"), home_of(cluster, "a", "n2")) == ("n1", "n2")
    decision = n2.call("GET", "/admin/explain/for-tall")["decision"]
    assert (decision["chosen"]["action"], decision["outcome"]) == ("migrate", "started")
    assert [(one["request_id"], one["node"]) for one in decision["moved"]] == [(moving, "n2")]
    assert [term["name"] for term in decision["chosen"]["terms"]][1].startswith("resume a-")
    spans = n2.call("GET", "/admin/requests/for-tall")["spans"]
    assert "making room" in [span["name"] for span in spans]
    leader = cluster.nodes[cluster.leader("n2")]
    assert value(look(leader), "rooms_made_total", outcome="migrate") == 1


def test_a_node_under_notice_gives_its_answers_away_and_says_how_many(
    cluster: NodeCluster, pool: ThreadPoolExecutor
) -> None:
    n2, stream = streaming_from_n1(cluster, pool)
    ran = subprocess.run(
        [CLI, "notice", "n1", "--seconds", "60", "--json", "--url", n2.url], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == {"node": "n1", "moved": 1, "stopped": 1, "left": 0}
    running = not stream.done()
    text, error = stream.result()
    assert (error, running, is_right(COUNT, text)) == (None, True, True)
    assert cluster.shown("n2")["n1"]["cordoned"]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/admin/nodes/n9/notice?seconds=5", 404, "node_not_found"),
        ("/admin/nodes/n1/notice?seconds=0", 400, "invalid_request"),
        ("/admin/nodes/n1/notice?seconds=nan", 400, "invalid_request"),
        ("/admin/nodes/n1/notice?seconds=3601", 400, "invalid_request"),
        ("/admin/nodes/n1/notice", 400, "invalid_request"),
    ],
)
def test_a_notice_that_makes_no_sense_is_refused(cluster: NodeCluster, path: str, status: int, code: str) -> None:
    refused = cluster.nodes["n2"].request("POST", path)
    assert (refused.status, refused.json()["error"]["code"]) == (status, code)


def test_a_more_urgent_request_has_an_answer_ended_which_then_goes_on_and_its_client_sees_one_stream(
    warm_starts: None, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    with running_node(tmp_path, *SMALL, "max_instances=1", "placement_policy=preempt") as node:
        node.deploy("builtin:demo", "a")
        node.deploy("builtin:demo", "b")
        stream = pool.submit(streamed, node, "a", LONG, priority=5)
        eventually(lambda: under_way(node) > 20)
        assert posted(node, "no-more-urgent", ask("b") | {"priority": 5, "max_tokens": 1, "keep_alive": 0}) == 200
        assert is_right(COUNT, stream.result()[0])
        stream = pool.submit(streamed, node, "a", LONG, priority=5)
        eventually(lambda: under_way(node) > 20)
        assert posted(node, "urgent", ask("b") | {"priority": 0}) == 200
        running = not stream.done()
        text, error = stream.result()
        assert (error, running, is_right(COUNT, text)) == (None, True, True)
        seen = look(node)
        assert value(seen, "preemptions_total") == value(seen, "rooms_made_total", outcome="preempt") == 1
        decision = node.call("GET", "/admin/explain/urgent")["decision"]
        assert decision["chosen"]["action"] == "preempt"
