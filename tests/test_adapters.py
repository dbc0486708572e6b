"""LoRA adapters on a real node: deployed beside their base, asked by name, loaded, dropped, and what goes wrong."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from clusters import eventually
from conftest import SMALL
from hub_server import HubServer, Repo
from lora_adapters import change_adapter, merged, save_adapter
from web_server import WebServer

from sllm_actor.sources.builtin import BUILTIN
from sllm_actor.testing.node_process import CLI, NodeProcess, running_node

pytestmark = pytest.mark.usefixtures("warm_starts")

BASE = BUILTIN["demo"]
TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters of the demo model, and the model that one of them amounts to."""
    made = tmp_path_factory.mktemp("adapters")
    found = {name: save_adapter(made / name, BASE, TARGETS, seed=k) for k, name in enumerate(("sql", "poems", "math"))}
    found["merged"] = merged(BASE, found["sql"], made / "merged")
    for file in BASE.iterdir():
        if not (found["merged"] / file.name).exists() and file.name != "sllm.json":
            shutil.copy(file, found["merged"])
    return found


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


@pytest.fixture(scope="module")
def lora_node(
    tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path], hub: HubServer
) -> Iterator[NodeProcess]:
    """A node with the demo model, three adapters, and room for two of them in an engine; it knows the Hub."""
    own = tmp_path_factory.mktemp("node")
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(own / "home"), "NETRC": str(own / "none")}
    knobs = (*SMALL, "max_adapters_per_instance=2", "source_allow_private_redirects=true")
    with running_node(own / "data", *knobs, environment=environment) as node:
        node.deploy("builtin:demo", "demo")
        node.deploy(folders["merged"], "merged")
        for name in ("sql", "poems", "math"):
            node.deploy(folders[name], name, base="demo")
        yield node
        assert node.stop() == (0, [])


def ask(node: NodeProcess, model: str, **options: Any) -> str:
    body = {"model": model, "prompt": "What is 3 + 4?", "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    answer = node.call("POST", "/v1/completions", body | options)
    assert answer["model"] == model
    return str(answer["choices"][0]["text"])


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(*arguments: str) -> str:
    """Run the command and give what it prints."""
    ran = subprocess.run([str(CLI), *arguments], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def refused(node: NodeProcess, source: Path | str, name: str, **options: Any) -> tuple[int, str, str]:
    reply = node.request("POST", "/admin/models", {"source": str(source), "name": name, **options})
    error = reply.json()["error"]
    return reply.status, error["code"], error["message"]


def adapters_held(node: NodeProcess) -> dict[str, int]:
    """Count the leases on the memory of each adapter that host memory has."""
    host = node.call("GET", "/admin/tiers")["host"]
    # What was removed may be there still, under no name.
    named = [(name, entry["leases"]) for entry in host for name in entry["models"]]
    return {name: leases for name, leases in named if name in ("sql", "poems", "math")}


def test_an_adapter_answers_as_the_merged_model_on_the_bases_instance(lora_node: NodeProcess) -> None:
    wanted, plain = ask(lora_node, "merged"), ask(lora_node, "demo")
    assert ask(lora_node, "sql") == wanted != plain
    lora_node.call("POST", "/admin/models/demo/unload")
    assert ask(lora_node, "sql") == wanted, "with a base that was not running"
    instances = lora_node.call("GET", "/admin/instances")["instances"]
    assert sorted(instance["model"] for instance in instances) == ["demo", "merged"]


def test_more_adapters_at_once_than_an_engine_has_room_for_are_all_answered(lora_node: NodeProcess) -> None:
    names = ["sql", "poems", "math", "demo"] * 4
    alone = {name: ask(lora_node, name) for name in names[:4]}
    assert len(set(alone.values())) == 4
    with ThreadPoolExecutor(len(names)) as threads:
        assert list(threads.map(lambda name: ask(lora_node, name), names)) == [alone[name] for name in names]
    held = adapters_held(lora_node)
    assert sum(held.values()) == 2, held


def test_models_are_listed_with_their_parents_and_requests_under_the_adapters_name(lora_node: NodeProcess) -> None:
    ask(lora_node, "sql")
    cards = {card["id"]: card for card in lora_node.call("GET", "/v1/models")["data"]}
    assert {name: card["parent"] for name, card in cards.items()} == {
        "demo": None, "merged": None, "sql": "demo", "poems": "demo", "math": "demo",
    }  # fmt: skip
    statuses = {status["model"]["name"]: status for status in lora_node.call("GET", "/admin/models")["models"]}
    assert statuses["sql"]["state"] == "running"
    timeline = lora_node.call("GET", "/admin/requests")["requests"][0]
    assert timeline["model"] == "sql"
    metrics = lora_node.request("GET", "/metrics").body.decode()
    assert 'model_name="sql"' in metrics


def test_a_base_with_adapters_is_neither_removed_nor_replaced(lora_node: NodeProcess, folders: dict[str, Path]) -> None:
    reply = lora_node.request("DELETE", "/admin/models/demo")
    assert (reply.status, reply.json()["error"]["code"]) == (409, "conflict")
    assert "math, poems, sql" in reply.json()["error"]["message"]
    status, code, message = refused(lora_node, folders["merged"], "demo", replace=True)
    assert (status, code) == (409, "conflict")
    assert "math, poems, sql" in message
    lora_node.deploy("builtin:demo", "demo")
    assert ask(lora_node, "demo")


def test_deploying_refuses_what_can_not_be_served_and_says_why(
    lora_node: NodeProcess, folders: dict[str, Path], tmp_path: Path
) -> None:
    adapter = folders["sql"]
    assert refused(lora_node, adapter, "x", base="nobody")[:2] == (404, "model_not_found")
    assert refused(lora_node, adapter, "x", base="sql")[:2] == (400, "invalid_request")
    assert refused(lora_node, folders["merged"], "x", base="demo")[:2] == (400, "invalid_request")
    unnamed = change_adapter(shutil.copytree(adapter, tmp_path / "u"), base_model_name_or_path="gone/away")
    status, code, message = refused(lora_node, unnamed, "x")
    assert (status, code) == (400, "adapter_invalid")
    assert "gone/away" in message
    assert "--base" in message
    high = save_adapter(tmp_path / "high", BASE, ["q_proj"], rank=257)
    assert "max_adapter_rank" in refused(lora_node, high, "x", base="demo")[2]
    wrong = change_adapter(shutil.copytree(adapter, tmp_path / "w"), r=5)
    assert "lora_A.weight has shape" in refused(lora_node, wrong, "x", base="demo")[2]
    assert "x" not in {card["id"] for card in lora_node.call("GET", "/v1/models")["data"]}


def test_an_adapter_finds_its_base_by_the_description_and_leaves_when_it_is_removed(
    lora_node: NodeProcess, folders: dict[str, Path], tmp_path: Path
) -> None:
    for copy, meant in enumerate((str(BASE), "demo")):
        again = change_adapter(shutil.copytree(folders["sql"], tmp_path / f"{copy}"), base_model_name_or_path=meant)
        assert lora_node.deploy(again, "again", replace=True)["base"] == "demo"
    wanted = ask(lora_node, "sql")
    assert ask(lora_node, "again") == wanted
    lora_node.call("DELETE", "/admin/models/again")
    reply = lora_node.request("POST", "/v1/completions", {"model": "again", "prompt": "x"})
    assert reply.status == 404
    assert ask(lora_node, "sql") == wanted


@pytest.mark.parametrize("kind", ["web server", "hub", "hub, its base too"])
def test_an_adapter_comes_from_a_source_as_from_its_folder(
    lora_node: NodeProcess, folders: dict[str, Path], web: WebServer, hub: HubServer, tmp_path: Path, kind: str
) -> None:
    adapter, base = folders["sql"], ["--base", "demo"]
    if kind == "web server":
        shutil.copytree(adapter, web.folder / "sql")
        source = web.url("sql")
    elif kind == "hub":
        # As people publish them: with a tokenizer, and what training has left.
        beside = {
            "tokenizer.json": b"{}",
            "README.md": b"#",
            "training_args.bin": b"x",
            "checkpoint-1/config.json": b"{}",
        }
        hub.repos["org/sql"] = Repo.of(contents_of(adapter) | beside)
        source = "hf://org/sql"
    else:
        hub.repos["org/base"] = Repo.of(contents_of(BASE))
        lora_node.deploy("hf://org/base", "of-hub")
        described = change_adapter(shutil.copytree(adapter, tmp_path / "sql"), base_model_name_or_path="org/base")
        hub.repos["org/described"] = Repo.of(contents_of(described))
        source, base = "hf://org/described", []
    try:
        ran = run("deploy", source, "--name", "elsewhere", *base, "--url", lora_node.url)
        assert f"deployed elsewhere: adapter of {'demo' if base else 'of-hub'}" in ran
        assert ask(lora_node, "elsewhere") == ask(lora_node, "sql") != ask(lora_node, "demo")
        # What was dropped comes back, from the SSD or from there.
        lora_node.call("POST", "/admin/models/elsewhere/unload")
        assert ask(lora_node, "elsewhere") == ask(lora_node, "sql")
    finally:
        lora_node.request("DELETE", "/admin/models/elsewhere")
        lora_node.request("DELETE", "/admin/models/of-hub")


def test_a_source_with_half_an_adapter_is_refused_by_what_is_missing(
    lora_node: NodeProcess, folders: dict[str, Path], web: WebServer, hub: HubServer
) -> None:
    files = contents_of(folders["sql"])
    files["adapter_model.bin"] = files.pop("adapter_model.safetensors")
    hub.repos["org/pickled"] = Repo.of(files)
    for name, content in files.items():
        (web.folder / "pickled").mkdir(exist_ok=True)
        (web.folder / "pickled" / name).write_bytes(content)
    for source in ("hf://org/pickled", web.url("pickled")):
        status, code, message = refused(lora_node, source, "x", base="demo")
        assert (status, code in ("source_invalid", "source_missing")) == (400, True)
        assert "adapter_model.safetensors" in message


def test_an_adapter_that_is_removed_while_it_answers_finishes_its_answers(
    lora_node: NodeProcess, folders: dict[str, Path]
) -> None:
    lora_node.deploy(folders["sql"], "brief", base="demo")
    body = {"model": "brief", "prompt": "What is 3 + 4?", "max_tokens": 200, "ignore_eos": True, "stream": True}
    events = lora_node.stream("/v1/completions", body)
    next(events)
    lora_node.call("DELETE", "/admin/models/brief")
    rest = list(events)
    assert not any("error" in event for event in rest)
    assert rest[-1]["choices"][0]["finish_reason"] == "length"


def test_spoiled_bytes_are_an_error_of_the_request_and_the_base_goes_on(
    lora_node: NodeProcess, folders: dict[str, Path], tmp_path: Path
) -> None:
    bad = shutil.copytree(folders["poems"], tmp_path / "bad")
    weights = bad / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-4:] = b"\xff\xff\xff\x7f"
    weights.write_bytes(raw)
    lora_node.deploy(bad, "bad", base="demo")
    reply = lora_node.request("POST", "/v1/completions", {"model": "bad", "prompt": "x"})
    assert reply.json()["error"]["code"] == "adapter_invalid"
    weights.write_bytes(raw[:-1])
    lora_node.call("POST", "/admin/models/bad/evict", {"tier": "host"})
    reply = lora_node.request("POST", "/v1/completions", {"model": "bad", "prompt": "x"})
    assert reply.json()["error"]["code"] == "checkpoint_changed"
    lora_node.call("DELETE", "/admin/models/bad")
    assert ask(lora_node, "demo")
    assert ask(lora_node, "poems")


def test_a_killed_engine_gives_the_memory_of_its_adapters_back_and_the_next_request_loads_them(
    lora_node: NodeProcess,
) -> None:
    wanted = ask(lora_node, "sql")
    assert adapters_held(lora_node)["sql"] == 1
    instances = lora_node.call("GET", "/admin/instances")["instances"]
    os.kill(next(instance["pid"] for instance in instances if instance["model"] == "demo"), signal.SIGKILL)
    eventually(lambda: not any(adapters_held(lora_node).values()))
    assert ask(lora_node, "sql") == wanted
    lora_node.call("POST", "/admin/models/sql/unload")
    assert not any(adapters_held(lora_node).values())
    assert ask(lora_node, "sql") == wanted
