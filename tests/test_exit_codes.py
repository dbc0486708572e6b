"""What each exit code means, and what errors say to do next."""

from __future__ import annotations

import json
import re
from pathlib import Path

import from_code
import pytest
from raw_server import RawServer
from terminals import in_terminal
from test_cli import UNREACHABLE, cli, cli_json

from sllm_actor.cli.exit_codes import MEANINGS, ExitCode
from sllm_actor.cli.hints import HINTS
from sllm_actor.cli.names import nearest
from sllm_actor.errors import BY_CODE
from sllm_actor.testing.node_process import CLI, NodeProcess

ROOT = Path(__file__).parent.parent
DOCTOR = ("doctor", "--port", "0", "--set", "host_pool_bytes=64MiB")


def test_the_manuals_table_is_the_programs() -> None:
    page = (ROOT / "docs/cli.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", page, re.MULTILINE)
    assert rows == [(str(code.value), MEANINGS[code]) for code in ExitCode]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (ExitCode.DONE, ["version"]),
        (ExitCode.REFUSED, ["verify", "no-such-folder"]),
        (ExitCode.USAGE, ["ls", "--no-such-flag"]),
        (ExitCode.NO_NODE, ["ls", *UNREACHABLE]),
    ],
)
def test_a_verb_ends_with_the_code_of_what_became_of_it(code: ExitCode, words: list[str]) -> None:
    assert cli(*words).returncode == code


def test_doctor_ends_with_the_code_of_its_worst_finding(tmp_path: Path) -> None:
    # The disk of a new folder has not been measured, which is a warning.
    assert cli(*DOCTOR, "--data-dir", tmp_path).returncode == ExitCode.WARNINGS
    (tmp_path / "file").touch()
    assert cli(*DOCTOR, "--data-dir", tmp_path / "file" / "data").returncode == ExitCode.REFUSED


def test_ctrl_c_at_a_verb_that_has_not_ended_is_a_code_of_its_own() -> None:
    with (
        RawServer(lambda request: request.hold()) as server,
        in_terminal([CLI, "ls", "--url", server.url], 80, 24) as terminal,
    ):
        while not server.asked:
            assert terminal.is_running()
        terminal.type(b"\x03")
        assert terminal.ended() == ExitCode.INTERRUPTED
    assert "Traceback" not in terminal.text


def test_a_name_that_is_mistyped_is_answered_with_the_one_that_was_meant(node: NodeProcess) -> None:
    at = ("--url", node.url)
    assert "did you mean demo?" in cli("stop", "demmo", *at).stderr
    assert "did you mean demo?" in cli("run", "demmo", "hello", *at).stderr
    assert "did you mean node-1?" in cli("cordon", "node-2", *at).stderr
    told = cli("rm", "nothing-like-it", *at).stderr
    assert "did you mean" not in told
    assert "'sllm-node ls'" in told
    error = cli_json("stop", "demmo", *at, status=1)["error"]
    assert (error["code"], error["hint"].partition("?")[0]) == ("model_not_found", "did you mean demo")


def test_a_node_that_does_not_tell_its_names_keeps_nobody_waiting() -> None:
    refused = json.dumps({"error": {"message": "no", "code": "model_not_found"}}).encode()
    with RawServer(
        lambda request: (
            request.hold()
            if request.path == "/v1/models"
            else request.reply(404, {"Content-Type": "application/json"}, refused)
        )
    ) as server:
        told = cli("stop", "demmo", "--url", server.url)
    assert told.returncode == ExitCode.REFUSED
    assert "next: 'sllm-node ls'" in told.stderr


def test_the_nearest_name_begins_alike_or_is_written_alike() -> None:
    assert nearest("run-1", ["run-2345", "run-1234"]) == "did you mean run-1234?"
    assert nearest("qwne", ["demo", "qwen"]) == "did you mean qwen?"
    assert nearest("llama", ["demo", "qwen"]) == ""


def test_hints_are_for_errors_that_there_are_and_name_verbs_that_there_are() -> None:
    assert set(HINTS) <= set(BY_CODE)
    for hint in HINTS.values():
        for verb in re.findall(r"'sllm-node (\w+)", hint):
            assert verb in {one.partition(" ")[0] for one in from_code.verbs()}
