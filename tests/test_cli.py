"""The command line, run as people and programs run it."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from raw_server import RawServer, Request
from terminals import in_terminal

from sllm_actor.cli.printed import PRINTED, Failed
from sllm_actor.cli.show import table
from sllm_actor.sources.builtin import BUILTIN
from sllm_actor.testing.node_process import CLI, NodeProcess

UNREACHABLE = ["--url", "http://127.0.0.1:9"]


def cli(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    ran = subprocess.run([CLI, *arguments], capture_output=True, text=True, timeout=120, input=stdin)
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran


def cli_json(*arguments: str | Path, stdin: str = "", status: int = 0) -> Any:
    ran = cli(*arguments, "--json", stdin=stdin)
    assert ran.returncode == status, ran
    answer = json.loads(ran.stdout)
    msgspec.convert(answer, Failed if "error" in answer else PRINTED[str(arguments[0])])
    return answer


def test_a_model_is_deployed_listed_asked_stopped_and_removed(node: NodeProcess) -> None:
    at = ["--url", node.url]
    deployed = cli_json("deploy", "builtin:demo", "--name", "cli/demo", "--keep-alive", "1h", *at)["model"]
    assert (deployed["architecture"], deployed["keep_alive_s"]) == ("LlamaForCausalLM", 3600)
    listed = {status["model"]["name"]: status["state"] for status in cli_json("ls", *at)["models"]}
    assert listed["cli/demo"] in ("cold", "host")
    answer = cli_json("run", "cli/demo", "What is 47 + 35?", *at)
    assert (answer["text"], answer["finish_reason"]) == ("47 + 35 = 82", "stop")
    assert answer["timeline"]["cold"]
    assert [i["model"] for i in cli_json("ps", *at)["instances"] if i["model"] == "cli/demo"] == ["cli/demo"]
    assert cli_json("stop", "cli/demo", *at) == {"stopped": 1, "ended_starts": 0}
    assert cli_json("rm", "cli/demo", *at) == {"removed": "cli/demo"}
    assert cli_json("rm", "cli/demo", *at, status=1)["error"]["code"] == "model_not_found"


def test_people_get_tables_and_text(node: NodeProcess) -> None:
    at = ["--url", node.url]
    assert cli("run", "demo", "What is 47 + 35?", *at).stdout == "47 + 35 = 82\n"
    shown = cli("run", "demo", "Add 1 and 1.", "--timeline", *at).stdout
    assert "1 + 1 = 2" in shown
    assert "first token after" in shown
    assert "prefill" in shown
    assert "demo" in cli("ls", *at).stdout
    assert "INSTANCE" in cli("ps", *at).stdout
    assert cli("version").stdout.startswith("sllm_actor ")


def test_a_piped_prompt_is_answered(node: NodeProcess) -> None:
    assert cli("run", "demo", "--url", node.url, stdin="What is 47 + 35?").stdout == "47 + 35 = 82\n"


def test_a_terminal_shows_that_a_source_is_looked_at_until_it_has_been() -> None:
    looked = threading.Event()

    def answer(request: Request) -> None:
        looked.wait(60)
        request.reply(400, {"Content-Type": "application/json"}, b'{"error": {"message": "no", "code": "gone"}}')

    with RawServer(answer) as server:
        words: list[str | Path] = [CLI, "deploy", "hf://a/b", "--url", server.url]
        with in_terminal(words, 80, 24) as terminal:
            terminal.until(lambda text: "looking at hf://a/b 0:00:00" in text)
            looked.set()
            assert terminal.ended() == 1
    assert terminal.lines[0] == "error: no"


def test_deploying_the_same_again_changes_nothing_and_something_else_is_refused(
    node: NodeProcess, tmp_path: Path
) -> None:
    at = ["--url", node.url]
    first = cli_json("deploy", "builtin:demo", *at)
    assert cli_json("deploy", "builtin:demo", *at) == first
    shutil.copytree(BUILTIN["demo"], tmp_path / "other")
    error = cli_json("deploy", tmp_path / "other", "--name", "demo", *at, status=1)["error"]
    assert (error["code"], error["param"]) == ("model_exists", "name")


@pytest.mark.parametrize(
    "arguments",
    [["ls"], ["ps"], ["stop", "x"], ["rm", "x"], ["run", "x", "y"], ["deploy", "builtin:demo"]],
    ids=lambda arguments: arguments[0],
)
def test_no_node_is_an_exit_code_of_its_own(arguments: list[str]) -> None:
    assert cli_json(*arguments, *UNREACHABLE, status=3)["error"]["code"] == "node_unreachable"
    ran = cli(*arguments, *UNREACHABLE)
    assert ran.returncode == 3
    assert "sllm-node start" in ran.stderr


def test_a_url_needs_no_scheme(node: NodeProcess) -> None:
    assert cli_json("ls", "--url", node.url.removeprefix("http://"))["models"]
    assert cli_json("ls", "--url", "127.0.0.1:9", status=3)["error"]["message"].startswith(
        "no node answers at http://127.0.0.1:9: Connection refused; "
    )


REGISTERED = b'{"status": "registered", "model": {"name": "m"}}\n{"status": "pulling", "completed": 67, "total": 250}\n'


@pytest.mark.parametrize(
    ("arguments", "body"),
    [
        (["pull", "http://h/m/"], REGISTERED),
        (["run", "m", "hello"], b'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": null}]}\n\n'),
        (["ls"], b'{"models": ['),
    ],
    ids=["pull", "run", "ls"],
)
def test_a_node_that_goes_away_in_the_middle_of_an_answer_is_no_traceback(arguments: list[str], body: bytes) -> None:
    def answer(request: Request) -> None:
        known = b'{"models": [{"model": {"name": "m", "chat": true}}]}'
        if arguments[0] != "ls" and request.path == "/admin/models":
            request.reply(200, {"Content-Type": "application/json"}, known)
        else:
            request.reply(200, {"Content-Type": "application/json", "Content-Length": len(body) + 1}, body)

    with RawServer(answer) as server:
        ran = cli(*arguments, "--url", server.url)
        assert ran.returncode == 3
        assert "went away in the middle of its answer" in ran.stderr
        assert ("at 67 B of 250 B; the same command goes on" in ran.stderr) == (arguments[0] == "pull")
        ran = cli(*arguments, "--url", server.url, "--json")
        assert ran.returncode == 3
        assert json.loads(ran.stdout.splitlines()[-1])["error"]["code"] == "node_unreachable"


def test_in_a_chat_an_interrupt_ends_the_answer_alone() -> None:
    def answer(request: Request) -> None:
        if request.path == "/admin/models":
            request.reply(200, {"Content-Type": "application/json"}, b'{"models": []}')
            return
        event = b'data: {"choices": [{"delta": {"content": "begun\\n"}, "finish_reason": null}]}\n\n'
        request.reply(200, {"Content-Type": "text/event-stream", "Content-Length": None}, event)
        request.hold()

    ours, theirs = pty.openpty()
    with RawServer(answer) as server:
        words = [str(CLI), "run", "m", "--url", server.url]
        with subprocess.Popen(words, stdin=theirs, stdout=subprocess.PIPE, text=True) as chat:
            assert chat.stdout is not None
            for _ in range(2):
                os.write(ours, b"hello\n")
                while "begun" not in chat.stdout.readline():
                    pass
                chat.send_signal(signal.SIGINT)
            os.write(ours, b"/bye\n")
            assert chat.wait(60) == 0
    for end in (ours, theirs):
        os.close(end)


def test_what_is_no_node_is_told_so() -> None:
    with RawServer(lambda request: request.reply(200, {"Content-Type": "text/html"}, b"<p>")) as server:
        assert cli_json("ls", "--url", server.url, status=3)["error"]["message"].endswith(
            "is no node; name one with --url"
        )


def test_a_pull_that_is_interrupted_says_how_far_it_was() -> None:
    def answer(request: Request) -> None:
        request.reply(200, {"Content-Type": "application/x-ndjson", "Content-Length": None}, REGISTERED)
        request.hold()

    with RawServer(answer) as server:
        words = [str(CLI), "pull", "http://h/m/", "--json", "--url", server.url]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as pulling:
            assert pulling.stdout is not None
            while '"completed": 67' not in pulling.stdout.readline():
                pass
            pulling.send_signal(signal.SIGINT)
            _, told = pulling.communicate(timeout=60)
        assert pulling.returncode == 130
        assert "stopped at 67 B of 250 B; the same command goes on from there" in told


def test_wrong_usage_is_an_exit_code_of_its_own() -> None:
    assert cli("deploy").returncode == 2
    assert cli("start", "--port", "many").returncode == 2
    assert cli("nonsense").returncode == 2
    assert cli("run", "x", *UNREACHABLE, stdin="\n").returncode == 2
    asked = cli("pull", "Qwen/Qwen2.5-0.5B-Instruct", *UNREACHABLE)
    assert asked.returncode == 2
    assert "hf://Qwen/Qwen2.5-0.5B-Instruct" in asked.stderr


def test_short_help_and_whole_knob_names_in_a_pipe(tmp_path: Path) -> None:
    assert "Usage" in cli("ls", "-h").stdout
    shown = cli("doctor", "--port", "0", "--data-dir", tmp_path).stdout.splitlines()
    assert [line.split()[1] for line in shown if line.startswith("source_allow_private_redirects")] == ["False"]
    assert [line.split()[1] for line in shown if line.startswith("host_pool_bytes")] == ["2GiB"]


def test_a_row_of_a_table_stays_one_line_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """A screen's 80 columns are no reason to fold what a program or a file reads."""
    table(("NAME", "REASON"), [("n" * 60, "because " * 20)])
    assert [line.count("because") for line in capsys.readouterr().out.splitlines()] == [0, 20]


def test_an_unknown_knob_is_named() -> None:
    error = cli_json("start", "--set", "speed=11", status=1)["error"]
    assert (error["code"], error["param"]) == ("config_invalid", "speed")


def test_doctor_finds_this_machine_fit_and_shows_every_knob_with_its_origin(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('keep_alive_s = "2m"\n')
    # The disk of a new data folder has not been measured.
    report = cli_json("doctor", "--config", file, "--port", "0", "--data-dir", tmp_path / "data", status=4)
    assert report["healthy"]
    knobs = {knob["name"]: (knob["value"], knob["origin"]) for knob in report["knobs"]}
    assert knobs["keep_alive_s"] == (120, str(file))
    assert knobs["port"] == (0, "flag")
    assert knobs["warm_engines"][1] == "default"


def test_doctor_says_what_would_keep_a_node_from_starting(node: NodeProcess, tmp_path: Path) -> None:
    port = node.url.rpartition(":")[2]
    report = cli_json("doctor", "--port", port, "--data-dir", tmp_path, status=1)
    assert not report["healthy"]
    assert [check["check"] for check in report["checks"] if check["level"] == "error"] == ["port"]
