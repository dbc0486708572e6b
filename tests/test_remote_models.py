"""Models that are nowhere on the node: started from a web server or another node, pulled, and found again."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from clusters import eventually
from conftest import SMALL, StartNode
from fault_proxy import Fault, FaultProxy
from safetensors.torch import load_file, save_file
from web_server import WebServer

from sllm_actor.checkpoint.convert import convert
from sllm_actor.sources.builtin import BUILTIN
from sllm_actor.testing.node_process import NodeProcess, running_node
from sllm_actor.units import KIB, MIB

pytestmark = pytest.mark.usefixtures("warm_starts")

WEIGHTS = "model.safetensors"
QUESTION, ANSWER = "What is 47 + 35?", "82"


@pytest.fixture
def served(web: WebServer, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The demo model, converted, in a folder of the web server."""
    folder = serve(web, tmp_path, request.node.name)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def serve(web: WebServer, tmp_path: Path, name: str, *, is_deep: bool = False) -> Path:
    """Put a demo model of its own into a folder of the web server; a deep one has all layers twice, and no sense."""
    folder = web.folder / str(abs(hash(name)))
    stock = shutil.copytree(BUILTIN["demo"], tmp_path / f"stock-{folder.name}")
    # No two tests have the same model: what one has stored is of no use to another.
    config = json.loads((stock / "config.json").read_text())
    config["served_for"] = name
    if is_deep:
        layers = config["num_hidden_layers"]
        config["num_hidden_layers"] = 2 * layers
        tensors = load_file(stock / WEIGHTS)
        for key, tensor in list(tensors.items()):
            if key.startswith("model.layers."):
                number, rest = key.removeprefix("model.layers.").split(".", 1)
                tensors[f"model.layers.{int(number) + layers}.{rest}"] = tensor.clone()
        save_file(tensors, stock / WEIGHTS, {"format": "pt"})
    (stock / "config.json").write_text(json.dumps(config))
    convert(stock, folder, chunk_bytes=256 * KIB)
    return folder


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with running_node(tmp_path_factory.mktemp("shared"), *SMALL) as node:
        yield node


@pytest.fixture
def shared(running: NodeProcess) -> Iterator[NodeProcess]:
    """A node for the tests that leave it as others can use it; it has no model `demo`."""
    yield running
    running.request("DELETE", "/admin/models/demo")


def tiers(node: NodeProcess) -> dict[str, Any]:
    answer: dict[str, Any] = node.call("GET", "/admin/tiers")
    return answer


def load_tiers(node: NodeProcess) -> set[str]:
    """From where the newest request's model came."""
    newest = node.call("GET", "/admin/requests")["requests"][0]
    return {span["tier"] for span in newest["spans"] if span["name"] == "load"}


def pull(node: NodeProcess, source: str, name: str = "demo") -> list[dict[str, Any]]:
    return list(lines(node, source, name))


def lines(node: NodeProcess, source: str, name: str = "demo") -> Iterator[dict[str, Any]]:
    connection = node.connect()
    try:
        body = json.dumps({"name": name, "source": source})
        connection.request("POST", "/admin/pull", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        for line in response:
            yield json.loads(line)
    finally:
        connection.close()


def stored(node: NodeProcess) -> list[bool]:
    """Whether each entry of the SSD is whole."""
    return [entry["done_bytes"] == entry["size_bytes"] for entry in tiers(node)["ssd"]]


def until_stored(node: NodeProcess) -> None:
    """Wait until the SSD has its copy: a pull waits for just that."""
    (model,) = node.call("GET", "/admin/models")["models"]
    assert pull(node, model["model"]["source"], model["model"]["name"])[-1] == {"status": "success"}


@contextmanager
def proxied(web: WebServer, served: Path, fault: Fault, *, after: int) -> Iterator[tuple[FaultProxy, str]]:
    """The model behind a proxy that does something to all reads of the weights from byte `after` on."""

    def choose(request: Any) -> Fault | None:
        found = request.headers.get("range", "")
        begin = int(found.removeprefix("bytes=").partition("-")[0] or 0)
        return fault if WEIGHTS in request.path and begin >= after else None

    with FaultProxy(web.port, choose=choose) as proxy:
        yield proxy, f"{proxy.url}/ranges/{served.name}/"


def test_a_model_starts_from_a_web_server_and_later_without_it(
    web: WebServer, served: Path, start_node: StartNode
) -> None:
    url = web.url(served.name)
    with start_node() as node:
        assert node.deploy(url, "demo")["source"] == url
        assert node.call("GET", "/admin/models")["models"][0]["state"] == "remote"
        assert ANSWER in node.chat("demo", QUESTION)
        assert load_tiers(node) == {"source"}
        until_stored(node)
        assert stored(node) == [True]
        (held,) = tiers(node)["host"]
        assert (held["models"], [holder["who"] for holder in held["held_by"]]) == (["demo"], ["demo-1"])
        node.call("POST", "/admin/models/demo/unload")
        assert node.call("GET", "/admin/models")["models"][0]["state"] == "host"
    shutil.rmtree(served)
    with start_node() as node:
        assert node.call("GET", "/admin/models")["models"][0]["state"] == "ssd"
        assert ANSWER in node.chat("demo", QUESTION)
        assert not load_tiers(node) & {"source", "host memory"}


def test_a_web_server_without_ranges_will_do(web: WebServer, served: Path, shared: NodeProcess) -> None:
    shared.deploy(web.url(served.name, "whole"), "demo")
    assert ANSWER in shared.chat("demo", QUESTION)


def test_a_pull_shows_how_far_it_is_and_a_start_after_it_needs_no_source(
    web: WebServer, served: Path, start_node: StartNode
) -> None:
    with start_node() as node:
        told = pull(node, web.url(served.name))
        assert told[0]["status"] == "registered"
        assert told[0]["model"]["name"] == "demo"
        assert told[-1] == {"status": "success"}
        progress = [line for line in told if line["status"] == "pulling"]
        size_bytes = (served / WEIGHTS).stat().st_size
        assert [line["total"] for line in progress] == [size_bytes] * len(progress)
        assert progress[-1]["completed"] == size_bytes
        shutil.rmtree(served)
        assert ANSWER in node.chat("demo", QUESTION)


def test_the_command_pulls_and_lists_what_each_tier_holds(web: WebServer, served: Path, start_node: StartNode) -> None:
    with start_node() as node:

        def command(*arguments: str) -> str:
            words = [str(Path(sys.executable).with_name("sllm-node")), *arguments, "--url", node.url]
            return subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout

        assert "pulled" in command("pull", web.url(served.name), "--name", "org/demo")
        assert json.loads(command("pull", web.url(served.name), "--name", "org/demo", "--json").splitlines()[-1]) == {
            "status": "success"
        }
        shown = command("ps")
        assert "TIER" in shown
        assert "org/demo" in shown
        assert " ssd " in command("ls")


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "left"])
def test_a_pull_that_is_interrupted_goes_on_where_it_was(
    web: WebServer, served: Path, start_node: StartNode, kill: bool
) -> None:
    with proxied(web, served, Fault(stall_after_bytes=1000), after=2 * MIB) as (proxy, url):
        with start_node() as node:
            seen: list[int] = []
            for line in lines(node, url):
                seen.append(line.get("completed", 0))
                if seen[-1] >= 2 * MIB:
                    break
            assert max(seen) >= 2 * MIB
            if kill:
                node.process.send_signal(signal.SIGKILL)
                node.process.wait(60)
        proxy.choose = None
        with start_node() as node:
            if kill:
                assert stored(node) == [False]
            told = pull(node, url)
            progress = [line["completed"] for line in told if line["status"] == "pulling"]
            assert told[-1] == {"status": "success"}
            assert stored(node) == [True]
            assert progress[0] >= 2 * MIB, "what was stored is told at once, and not fetched again"
            assert ANSWER in node.chat("demo", QUESTION)


def test_wrong_bytes_are_an_error_that_names_file_and_chunk_and_cost_nothing(
    web: WebServer, served: Path, shared: NodeProcess
) -> None:
    with proxied(web, served, Fault(corrupt_byte=17), after=MIB) as (proxy, url):
        shared.deploy(url, "demo")
        reply = shared.request("POST", "/v1/completions", {"model": "demo", "prompt": "1"})
        error = reply.json()["error"]
        assert error["code"] == "checkpoint_corrupt"
        assert WEIGHTS in error["message"]
        assert "chunk" in error["message"]
        assert not [entry for entry in tiers(shared)["host"] if entry["models"]]
        told = pull(shared, url)
        assert told[-1]["error"]["code"] == "checkpoint_corrupt"
        proxy.choose = None
        assert ANSWER in shared.chat("demo", QUESTION)


def test_a_damaged_chunk_and_a_cut_connection_are_read_again(web: WebServer, served: Path, shared: NodeProcess) -> None:
    size_bytes = (served / WEIGHTS).stat().st_size
    faults = [Fault(corrupt_byte=5), Fault(cut_after_bytes=99_000), Fault(cut_after_bytes=0, reset=True)]
    lock = threading.Lock()

    def choose(request: Any) -> Fault | None:
        begins_late = "bytes=0-" not in request.headers.get("range", "")
        with lock:
            return faults.pop() if faults and WEIGHTS in request.path and begins_late else None

    with FaultProxy(web.port, choose=choose) as proxy:
        shared.deploy(f"{proxy.url}/ranges/{served.name}/", "demo")
        assert ANSWER in shared.chat("demo", QUESTION)
        assert faults == []
        (entry,) = [entry for entry in tiers(shared)["host"] if entry["models"]]
        assert entry["size_bytes"] == size_bytes


def test_a_source_that_is_gone_is_said_in_the_answer_and_a_later_request_works(
    web: WebServer, served: Path, shared: NodeProcess
) -> None:
    shared.deploy(web.url(served.name), "demo")
    away = served.with_name(f"{served.name}-away")
    served.rename(away)
    reply = shared.request("POST", "/v1/completions", {"model": "demo", "prompt": "1"})
    assert reply.json()["error"]["code"] == "source_missing"
    away.rename(served)
    assert ANSWER in shared.chat("demo", QUESTION)


def test_an_origin_that_changes_is_told_from_what_was_registered(
    web: WebServer, served: Path, shared: NodeProcess
) -> None:
    shared.deploy(web.url(served.name), "demo")
    weights = served / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    os.utime(weights, (1, 1))
    reply = shared.request("POST", "/v1/completions", {"model": "demo", "prompt": "1"})
    assert reply.json()["error"]["code"] == "source_changed"


def test_one_copy_serves_two_names(web: WebServer, served: Path, start_node: StartNode) -> None:
    with start_node() as node:
        pull(node, web.url(served.name), "one")
        pull(node, web.url(served.name), "two")
        (entry,) = tiers(node)["ssd"]
        assert entry["models"] == ["one", "two"]
        node.call("DELETE", "/admin/models/one")
        assert tiers(node)["ssd"][0]["models"] == ["two"]
        assert ANSWER in node.chat("two", QUESTION)


def test_a_model_larger_than_the_quota_starts_and_is_not_stored(
    web: WebServer, served: Path, start_node: StartNode
) -> None:
    with start_node("ssd_quota_bytes=0") as node:
        told = pull(node, web.url(served.name))
        assert told[-1]["error"]["code"] == "model_too_large"
        assert ANSWER in node.chat("demo", QUESTION)
        assert tiers(node)["ssd"] == []


def test_what_a_smaller_quota_gives_up_is_told_by_its_name(web: WebServer, served: Path, tmp_path: Path) -> None:
    with running_node(tmp_path / "data", *SMALL) as node:
        pull(node, web.url(served.name))
    with (tmp_path / "log").open("w") as log, running_node(tmp_path / "data", *SMALL, "ssd_quota_bytes=0", log=log):
        pass
    assert "demo (3.4 MB) was given up on the SSD: the quota of 0 B does not hold it" in (tmp_path / "log").read_text()


def test_a_node_starts_a_model_from_another_node(start_node: StartNode, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_text("a secret that two nodes share")
    knobs = ("listen=tcp://127.0.0.1:0", f"cluster_secret_file={secret}")
    with (
        running_node(tmp_path / "holder", *SMALL, "node_id=holder", *knobs) as holder,
        start_node("node_id=wanting", *knobs) as wanting,
    ):
        holder.deploy("builtin:demo", "org/demo")
        address = holder.address.replace("tcp://", "")
        wanting.deploy(f"sllm://{address}/org/demo", "demo")
        assert ANSWER in wanting.chat("demo", QUESTION)
        assert load_tiers(wanting) == {"source"}
        # And from there on to a third name, out of host memory or from the SSD: never from the card's stand-ins.
        until_stored(wanting)
        wanted = wanting.address.replace("tcp://", "")
        holder.deploy(f"sllm://{wanted}/demo", "again")
        assert ANSWER in holder.chat("again", QUESTION)


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a\x00b", "a" * 300, "d\u0435mo", "a/../b", "a//b"])
def test_a_name_that_is_none_is_refused_before_anything_is_fetched(node: NodeProcess, name: str) -> None:
    reply = node.request("POST", "/admin/pull", {"name": name, "source": "http://127.0.0.1:9/model/"})
    assert reply.status == 400
    assert reply.json()["error"]["code"] == "invalid_name"


@pytest.mark.parametrize("source", ["http://user:secret@127.0.0.1:9/m/", "ftp://h/m", "https://", "sllm://x", "s3://"])
def test_a_source_that_is_none_is_refused_without_repeating_its_password(node: NodeProcess, source: str) -> None:
    reply = node.request("POST", "/admin/pull", {"name": "m", "source": source})
    assert reply.status == 400
    assert reply.json()["error"]["code"] == "source_invalid"
    assert "secret" not in reply.body.decode()


def connections_to(port: int) -> int:
    """Count the established connections from this machine to a port of it."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[2].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


@pytest.mark.parametrize("how", ["leave", "stop", "rm"])
def test_a_start_that_nobody_waits_for_ends_its_download_and_keeps_what_has_come(
    web: WebServer, served: Path, start_node: StartNode, how: str
) -> None:
    with proxied(web, served, Fault(stall_after_bytes=1000), after=2 * MIB) as (proxy, url), start_node() as node:
        node.deploy(url, "demo")
        asking = node.connect()
        body = json.dumps({"model": "demo", "prompt": QUESTION})
        asking.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        eventually(lambda: any(0 < entry["done_bytes"] < entry["size_bytes"] for entry in tiers(node)["ssd"]))
        assert connections_to(proxy.port)
        if how == "leave":
            asking.close()
        elif how == "stop":
            assert node.call("POST", "/admin/models/demo/unload") == {"stopped": 0, "ended_starts": 1}
        else:
            node.call("DELETE", "/admin/models/demo")
        if how != "leave":
            reply = asking.getresponse()
            assert (reply.status, json.loads(reply.read())["error"]["code"]) == (409, "conflict")
            asking.close()
        while any(entry["leases"] for entry in tiers(node)["ssd"]) or connections_to(proxy.port):
            pass
        assert stored(node) == [False]
        assert tiers(node)["ssd"][0]["done_bytes"]
        if how == "leave":
            proxy.choose = None
            assert ANSWER in node.chat("demo", QUESTION)


def test_who_closes_the_connection_ends_the_pull(web: WebServer, served: Path, start_node: StartNode) -> None:
    with proxied(web, served, Fault(stall_after_bytes=1000), after=2 * MIB) as (_, url), start_node() as node:
        connection = node.connect()
        body = json.dumps({"name": "demo", "source": url})
        connection.request("POST", "/admin/pull", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert json.loads(response.readline())["status"] == "registered"
        connection.close()
        # The partial is given free as soon as the pull has ended: until then it counts as leased.
        while any(entry["leases"] for entry in tiers(node)["ssd"]):
            pass
        with pytest.raises(http.client.HTTPException):
            connection.getresponse()


def test_a_node_that_stops_leaves_a_pull_and_says_that_it_can_be_gone_on_with(
    web: WebServer, served: Path, start_node: StartNode
) -> None:
    stalled = proxied(web, served, Fault(stall_after_bytes=1000), after=2 * MIB)
    with stalled as (_, url), start_node("drain_timeout_s=3000") as node:
        told = lines(node, url)
        while next(told).get("completed", 0) < 2 * MIB:
            pass
        node.process.terminate()
        *_, last = told
        assert last["error"]["code"] == "draining"
        assert "goes on from there" in last["error"]["message"]
        assert node.process.wait(300) == 0


def outcome_of(node: NodeProcess, request_id: str) -> str:
    """What was decided for a request; nothing as long as there is no such decision."""
    reply = node.request("GET", f"/admin/explain/{request_id}")
    decision = reply.json()["decision"] if reply.status == 200 else None
    return decision["outcome"] if decision else ""


def test_a_device_goes_on_serving_while_the_bytes_of_another_model_come(
    web: WebServer, tmp_path: Path, start_node: StartNode
) -> None:
    """The only one: the first model holds it, and the other one's bytes take some seconds."""
    slow = Fault(bytes_per_s=250e3)
    here, there = (serve(web, tmp_path, f"{name} of two", is_deep=True) for name in ("first", "second"))
    with (
        proxied(web, here, slow, after=0) as (_, first),
        proxied(web, there, slow, after=0) as (_, second),
        start_node("max_instances=1", "bytes_first_s=0.5") as node,
        ThreadPoolExecutor(1) as pool,
    ):
        node.deploy(first, "first")
        # How fast bytes come is known once some have.
        node.chat("first", QUESTION, max_tokens=1)
        node.deploy(second, "second")
        body = {"model": "second", "prompt": "1 + 1", "max_tokens": 1}
        asking = pool.submit(node.request, "POST", "/v1/completions", body, {"X-Request-Id": "far"})
        eventually(lambda: outcome_of(node, "far") == "fetching")
        near = {"model": "first", "prompt": "1 + 1", "max_tokens": 1}
        assert node.request("POST", "/v1/completions", near, {"X-Request-Id": "near"}).status == 200
        assert not asking.done()
        assert "running instance first-1" in node.call("GET", "/admin/explain/near")["text"]
        assert asking.result().status == 200
        assert node.call("GET", "/admin/explain/far")["decision"]["fetched_s"] > 0
        shown = node.request("GET", "/metrics").body.decode()
    assert 'sllm:bytes_first_total{outcome="come"} 1.0' in shown
