"""Running answers that move between real nodes: their clients see one stream, and the text is the undisturbed one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from clusters import CHAT, NAMES, ask, eventually, home_of, placed_on, streamed, under_way, whole
from conftest import SMALL
from lora_adapters import save_adapter
from metadata_stores import UNPACKED

from sllm_actor.sources.builtin import BUILTIN
from sllm_actor.testing.node_cluster import NodeCluster, running_cluster
from sllm_actor.testing.node_process import CLI, NodeProcess, living

TTL_S = 2
KNOBS = (
    *SMALL, "listen=tcp://127.0.0.1:0", f"lease_ttl_s={TTL_S}", "max_instances=2", "warm_engines=1",
    "start_timeout_s=60",
)  # fmt: skip
LONG = "Count from 1 to 300."


@pytest.fixture(scope="module")
def cluster(warm_starts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeCluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster"), UNPACKED, NAMES, KNOBS) as running:
        for name in "abc":
            running.nodes["n1"].deploy("builtin:demo", name)
        eventually(lambda: all(node.request("GET", "/v1/models/c").status == 200 for node in running.nodes.values()))
        yield running


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(12) as made:
        yield made


def begun(cluster: NodeCluster, pool: ThreadPoolExecutor, gateway: str, model: str) -> tuple[Future[Any], str]:
    """Begin a long stream, and wait until it has some tokens; give it, and the request's id."""
    node = cluster.nodes[gateway]
    stream = pool.submit(streamed, node, model, LONG)
    eventually(lambda: under_way(node) > 20)
    return stream, str(node.call("GET", "/admin/requests")["requests"][0]["request_id"])


@pytest.fixture(scope="module")
def wanted(cluster: NodeCluster) -> str:
    """What an undisturbed stream says."""
    text, error = streamed(cluster.nodes["n1"], "a", LONG)
    assert error is None
    return str(text)


def moves(cluster: NodeCluster, asked: str) -> list[dict[str, Any]]:
    """List the moves under way between any nodes, as one of them knows it."""
    found: list[dict[str, Any]] = cluster.nodes[asked].call("GET", "/admin/migrations")["migrations"]
    return found


def test_an_answer_moves_where_it_is_told_to_and_its_client_sees_one_stream(
    cluster: NodeCluster, pool: ThreadPoolExecutor, wanted: str
) -> None:
    whole(cluster)
    placed_on(cluster, "a", "n2")
    stream, request_id = begun(cluster, pool, "n1", "a")
    ran = subprocess.run(
        [CLI, "migrate", request_id, "--to", "n3", "--url", cluster.nodes["n3"].url], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert f"{request_id} goes on at n3" in ran.stdout
    assert stream.result() == (wanted, None)
    timeline = cluster.nodes["n1"].call("GET", f"/admin/requests/{request_id}")
    assert (timeline["node"], timeline["outcome"]) == ("n3", "finished")
    assert "migration" in [span["name"] for span in timeline["spans"]]


# What the frontend makes of tokens: several choices, a stop string over a border of tokens, a grammar, probabilities.
WISHES: tuple[dict[str, Any], ...] = (
    {"n": 2, "temperature": 1.5, "seed": 5, "max_tokens": 300, "ignore_eos": True},
    {"stop": ["149, 15"]},
    {"logprobs": True, "top_logprobs": 2, "max_tokens": 300},
    {
        "temperature": 1.0, "seed": 3, "max_tokens": 300,
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "numbers",
                "schema": {"type": "array", "items": {"type": "integer"}, "minItems": 120, "maxItems": 120},
            },
        },
    },
)  # fmt: skip


def choices_of(cluster: NodeCluster, wish: dict[str, Any]) -> Any:
    return cluster.nodes["n1"].call("POST", CHAT, ask("a", LONG) | {"temperature": 0} | wish)["choices"]


def without_probabilities(choices: Any) -> tuple[Any, list[float]]:
    """Part answers from their log-probabilities, which may differ in the last digits."""
    found = [token for choice in choices for token in (choice.pop("logprobs", None) or {}).get("content", ())]
    return choices, [token["logprob"] for token in found]


def test_whatever_is_asked_of_an_answer_holds_when_it_moves(cluster: NodeCluster, pool: ThreadPoolExecutor) -> None:
    whole(cluster)
    placed_on(cluster, "a", "n2")
    node = cluster.nodes["n1"]
    undisturbed = [one.result() for one in [pool.submit(choices_of, cluster, wish) for wish in WISHES]]
    assert [len(choices) for choices in undisturbed] == [2, 1, 1, 1]
    assert undisturbed[0][0]["message"] != undisturbed[0][1]["message"]
    assert undisturbed[1][0]["message"]["content"].endswith("148, ")
    answers = [pool.submit(choices_of, cluster, wish) for wish in WISHES]
    requests = len(WISHES) + 1
    eventually(lambda: len(running(node)) == requests and all(one["generated_tokens"] > 10 for one in running(node)))
    moves = [
        pool.submit(node.request, "POST", f"/admin/requests/{one['request_id']}/migrate", {"to": "n3"})
        for one in running(node)
    ]
    assert sum(move.result().status == 200 for move in moves) >= 2
    for answer, wanted in zip(answers, undisturbed, strict=True):
        found, logprobs = without_probabilities(answer.result())
        right, its_logprobs = without_probabilities(wanted)
        assert found == right
        assert logprobs == pytest.approx(its_logprobs, abs=1e-3)


def test_an_answer_with_an_adapter_moves_where_its_base_runs_and_the_adapter_comes_with_it(
    cluster: NodeCluster, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    whole(cluster)
    node, wish = cluster.nodes["n1"], {"temperature": 0, "max_tokens": 700, "ignore_eos": True}
    node.deploy(save_adapter(tmp_path / "tuned", BUILTIN["demo"], ("q_proj", "v_proj")), "tuned", base="a")
    eventually(lambda: all(one.request("GET", "/v1/models/tuned").status == 200 for one in cluster.nodes.values()))
    placed_on(cluster, "a", "n2")
    plain, undisturbed = (streamed(node, model, LONG, **wish) for model in ("a", "tuned"))
    assert undisturbed[1] is None and undisturbed != plain
    stream = pool.submit(streamed, node, "tuned", LONG, **wish)
    eventually(lambda: under_way(node) > 20)
    request_id = node.call("GET", "/admin/requests")["requests"][0]["request_id"]
    assert node.call("POST", f"/admin/requests/{request_id}/migrate", {"to": "n3"})["node"] == "n3"
    running = not stream.done()
    assert stream.result() == undisturbed
    assert running
    assert node.call("GET", f"/admin/requests/{request_id}")["node"] == "n3"
    cluster.nodes["n3"].call("DELETE", "/admin/models/tuned")


def running(node: NodeProcess) -> list[dict[str, Any]]:
    shown = node.call("GET", "/admin/requests")["requests"]
    return [one for one in shown if one["outcome"] == "running"]


def test_a_move_that_makes_no_sense_is_refused_and_the_answer_goes_on(
    cluster: NodeCluster, pool: ThreadPoolExecutor
) -> None:
    whole(cluster)
    placed_on(cluster, "a", "n2")
    stream, request_id = begun(cluster, pool, "n1", "a")
    path = f"/admin/requests/{request_id}/migrate"
    errors = [
        cluster.nodes["n1"].request("POST", where, {"to": to}).json()["error"]["code"]
        for where, to in ((path, "n2"), (path, "n9"), ("/admin/requests/nobody/migrate", "n3"))
    ]
    assert errors == ["already_there", "node_not_found", "request_not_found"]
    assert not stream.done()
    assert stream.result()[1] is None


def test_a_drained_node_is_empty_long_before_its_answers_end(
    cluster: NodeCluster, pool: ThreadPoolExecutor, wanted: str
) -> None:
    whole(cluster)
    placed_on(cluster, "a", "n2")
    streams = [begun(cluster, pool, gateway, "a")[0] for gateway in ("n1", "n3", "n1")]
    drained = cluster.nodes["n1"].call("POST", "/admin/nodes/n2/drain")
    running = [not stream.done() for stream in streams]
    assert drained["stopped"] == 1
    assert home_of(cluster, "a", "n1") != "n2"
    assert [stream.result() for stream in streams] == [(wanted, None)] * 3
    assert running == [True] * 3
    cluster.nodes["n1"].call("POST", "/admin/nodes/n2/uncordon")


def test_a_node_that_is_stopped_gives_its_answers_away(
    cluster: NodeCluster, pool: ThreadPoolExecutor, wanted: str
) -> None:
    whole(cluster)
    placed_on(cluster, "a", "n2")
    stream, request_id = begun(cluster, pool, "n1", "a")
    status, left = cluster.stop_node("n2")
    running = not stream.done()
    assert (status, left) == (0, [])
    assert stream.result() == (wanted, None)
    assert running
    assert cluster.nodes["n1"].call("GET", f"/admin/requests/{request_id}")["node"] != "n2"


def test_where_the_destination_hangs_the_answer_goes_on_at_the_source(
    cluster: NodeCluster, pool: ThreadPoolExecutor, wanted: str
) -> None:
    whole(cluster)
    placed_on(cluster, "a", "n2")
    stream, request_id = begun(cluster, pool, "n1", "a")
    cluster.hold_up("n3")
    move = pool.submit(cluster.nodes["n1"].request, "POST", f"/admin/requests/{request_id}/migrate", {"to": "n3"})
    eventually(lambda: len(moves(cluster, "n2")) == 1)
    (shown,) = moves(cluster, "n2")
    assert (shown["request_id"], shown["source"], shown["coordinator"]) == (request_id, "n2", "n1")
    assert stream.result() == (wanted, None)
    cluster.go_on("n3")
    assert move.result().status >= 400
    eventually(lambda: moves(cluster, "n2") == [])


def test_a_move_to_a_node_that_was_just_killed_is_refused_while_the_answer_goes_on(
    cluster: NodeCluster, pool: ThreadPoolExecutor, wanted: str
) -> None:
    whole(cluster)
    placed_on(cluster, "a", "n2")
    stream, request_id = begun(cluster, pool, "n1", "a")
    cluster.kill("n3")
    eventually(lambda: not cluster.shown("n1").get("n3", {}).get("reported"))
    reply = cluster.nodes["n1"].request("POST", f"/admin/requests/{request_id}/migrate", {"to": "n3"})
    running = not stream.done()
    assert reply.json()["error"]["code"] in ("destination_failed", "node_not_found")
    assert stream.result() == (wanted, None)
    assert running


def test_a_stream_whose_node_hangs_goes_on_elsewhere_while_that_node_still_hangs(
    cluster: NodeCluster, pool: ThreadPoolExecutor, wanted: str
) -> None:
    whole(cluster)
    placed_on(cluster, "a", "n2")
    stream, request_id = begun(cluster, pool, "n1", "a")
    cluster.hold_up("n2")
    assert stream.result() == (wanted, None)
    assert cluster.nodes["n1"].call("GET", f"/admin/requests/{request_id}")["node"] != "n2"
    cluster.go_on("n2")
    whole(cluster)


@pytest.mark.parametrize("killed", ["source", "destination"])
def test_once_it_has_moved_either_node_may_die(
    cluster: NodeCluster, pool: ThreadPoolExecutor, wanted: str, killed: str
) -> None:
    whole(cluster)
    placed_on(cluster, "a", "n2")
    stream, request_id = begun(cluster, pool, "n1", "a")
    cluster.nodes["n1"].call("POST", f"/admin/requests/{request_id}/migrate", {"to": "n3"})
    assert not stream.done()
    left = cluster.kill({"source": "n2", "destination": "n3"}[killed])
    assert stream.result() == (wanted, None)
    eventually(lambda: living(left) == [])


def test_a_rolling_restart_under_load_drops_nothing(
    cluster: NodeCluster, pool: ThreadPoolExecutor, wanted: str
) -> None:
    for name in NAMES:
        whole(cluster)
        others = [other for other in NAMES if other != name]
        placed_on(cluster, "a", name)
        streams = [pool.submit(streamed, cluster.nodes[other], "a", LONG) for other in others]
        for other in others:
            eventually(lambda other=other: under_way(cluster.nodes[other]) > 5)  # type: ignore[misc]
        assert cluster.stop_node(name) == (0, [])
        running = [not stream.done() for stream in streams]
        # Who comes while it is away is answered, too.
        streams.append(pool.submit(streamed, cluster.nodes[others[0]], "b", LONG))
        cluster.start(name)
        assert [stream.result() for stream in streams] == [(wanted, None)] * len(streams)
        assert any(running)
