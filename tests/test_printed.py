"""What verbs print with `--json` is what is declared of it, field by field, and the manual has all of it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import click
import from_code
import msgspec
import pytest
from typer.testing import CliRunner

from sllm_actor.cli.main import app
from sllm_actor.cli.printed import PRINTED, Failed, Migrated
from sllm_actor.cli.show import print_json
from sllm_actor.frontend.openapi import describe
from sllm_actor.sources.builtin import BUILTIN
from sllm_actor.testing.node_process import CLI, NodeProcess


def printed(*words: str | Path, status: int = 0) -> list[Any]:
    """Run a verb in this process, and give each line that it prints, held to what is declared of the verb."""
    ran = CliRunner().invoke(app, [*map(str, words), "--json"], catch_exceptions=False)
    assert ran.exit_code == status, ran.output
    verb = next(verb for verb in (" ".join(map(str, words[:2])), str(words[0])) if verb in PRINTED)
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    for line in lines:
        msgspec.convert(line, PRINTED[verb] if status in (0, 4) else Failed)
    return lines


def test_every_verb_is_declared_and_described() -> None:
    assert set(PRINTED) == set(from_code.verbs())
    page = from_code.json_reference()
    for verb in PRINTED:
        assert f"| `{verb}` |" in page
    assert "| `hint` | string |  |" in page
    assert not [verb for verb, command in from_code.verbs().items() if not takes_json(command)]


def takes_json(command: click.Command) -> bool:
    return any("--json" in param.opts for param in command.params)


def test_what_verbs_print_that_ask_a_node_is_what_is_declared(node: NodeProcess) -> None:
    at = ("--url", node.url)
    assert printed("deploy", "builtin:demo", "--name", "p", *at)[0]["model"]["name"] == "p"
    assert [line["status"] for line in printed("pull", BUILTIN["demo"], "--name", "p", "--replace", *at)][::2] == [
        "registered",
        "success",
    ]
    asked = printed("run", "p", "Add 1 and 1.", *at)[0]
    assert printed("explain", asked["timeline"]["request_id"], *at)[0]["decision"]["outcome"] == "started"
    assert printed("ps", *at)[0]["instances"]
    assert printed("top", "--once", *at)[0]["instances"]
    assert printed("pin", "p", "--tier", "host", *at) == [{"pinned": "p", "tiers": ["host"]}]
    assert printed("unpin", "p", "--tier", "host", *at) == [{"unpinned": "p", "tiers": ["host"]}]
    assert printed("evict", "p", *at, status=1)[0]["error"]["code"] == "conflict"
    assert printed("stop", "p", *at) == [{"stopped": 1, "ended_starts": 0}]
    for status in printed("ls", *at)[0]["models"]:  # Other tests' models of this node have the same bytes.
        printed("stop", status["model"]["name"], *at)
    printed("evict", "p", *at)
    assert "p" in {status["model"]["name"] for status in printed("ls", *at)[0]["models"]}
    assert printed("rm", "p", *at) == [{"removed": "p"}]


def test_what_verbs_print_that_are_about_nodes_is_what_is_declared(node: NodeProcess) -> None:
    at = ("--url", node.url)
    try:
        printed("cordon", "node-1", *at)
        assert printed("status", *at)[0]["nodes"][0]["cordoned"]
        printed("notice", "node-1", "--seconds", "5", *at)
        printed("drain", "node-1", *at)
    finally:
        printed("uncordon", "node-1", *at)


def test_a_move_is_declared_as_the_endpoint_describes_it() -> None:
    answer = describe()["paths"]["/admin/requests/{request_id}/migrate"]["post"]["responses"]["200"]
    schema = answer["content"]["application/json"]["schema"]
    schema = describe()["components"]["schemas"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    assert set(schema["properties"]) == {field.name for field in msgspec.structs.fields(Migrated)}


def test_what_verbs_print_that_need_no_node_is_what_is_declared(tmp_path: Path) -> None:
    printed("version")
    printed("convert", BUILTIN["demo"], tmp_path / "converted")
    assert printed("verify", tmp_path / "converted")[0]["digests_checked"]
    assert not printed("verify", BUILTIN["demo"])[0]["digests_checked"]
    printed("verify", tmp_path / "none", status=1)
    printed("calibrate", "--size", "8MiB", "--seconds", "0.01", "--data-dir", tmp_path / "data")
    printed("doctor", "--set", "host_pool_bytes=64MiB", "--port", "0", "--data-dir", tmp_path / "none", status=4)
    printed("simulate", "--seconds", "5", "--rate", "0.4")
    keys = ("--api-key-file", tmp_path / "keys")
    printed("keys", "create", "alice", "--requests-per-minute", "3", *keys)
    assert printed("keys", "list", *keys)[0]["keys"][0]["requests_per_minute"] == 3
    printed("keys", "revoke", "alice", *keys)
    assert printed("keys", "revoke", "alice", *keys, status=1)[0]["error"]["code"] == "config_invalid"


@pytest.mark.usefixtures("warm_starts")
def test_a_node_that_starts_tells_so_as_is_declared(tmp_path: Path) -> None:
    words: list[str | Path] = [
        CLI,
        "start",
        "--json",
        "--port",
        "0",
        "--data-dir",
        tmp_path,
        "--set",
        "host_pool_bytes=64MiB",
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as starting:
        assert starting.stdout is not None
        msgspec.json.decode(starting.stdout.readline(), type=PRINTED["start"])
        starting.terminate()
        assert starting.wait(120) == 0


def test_a_field_that_is_not_declared_is_noticed() -> None:
    with pytest.raises(msgspec.ValidationError, match="color"):
        msgspec.convert({"version": "1", "color": "red"}, PRINTED["version"])
    with pytest.raises(msgspec.ValidationError, match="version"):
        msgspec.convert({}, PRINTED["version"])


def test_what_is_no_number_is_json_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("inf"), "b": [float("nan"), 1.5]})
    assert json.loads(capsys.readouterr().out) == {"a": "forever", "b": [None, 1.5]}
