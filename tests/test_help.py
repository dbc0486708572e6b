"""The help of every verb: its examples are ones, and what the shell completes."""

from __future__ import annotations

import inspect
import os
import shlex
import subprocess
from collections.abc import Iterator

import click
import from_code
import pytest
from raw_server import RawServer
from typer.testing import CliRunner

from sllm_actor.cli.main import app
from sllm_actor.testing.node_process import CLI, NodeProcess

VERBS = from_code.verbs()


def examples(command: click.Command) -> Iterator[list[str]]:
    """Give the words behind `sllm-node` of each example; those of another program behind it are left out."""
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("Example: "):
            for part in paragraph.removeprefix("Example: ").replace("\n", " ").split("&&"):
                words = shlex.split(part)
                if words[0] == "sllm-node":
                    yield words[1:]


@pytest.mark.parametrize("verb", VERBS)
def test_a_verbs_help_has_examples_that_its_command_line_takes(verb: str) -> None:
    shown = CliRunner().invoke(app, [*verb.split(), "--help"])
    assert shown.exit_code == 0
    assert f"sllm-node {verb}" in " ".join(shown.stdout.split()).partition("Example: ")[2]
    found = list(examples(VERBS[verb]))
    assert found
    for words in found:
        other = next(name for name in (" ".join(words[:2]), words[0]) if name in VERBS)
        # Every word is taken and checked, and nothing is run.
        VERBS[other].make_context(other, words[len(other.split()) :])


def test_an_example_that_is_none_is_noticed() -> None:
    with pytest.raises(Exception, match="No such option: --nmae"):
        VERBS["deploy"].make_context("deploy", ["x", "--nmae", "y"])


def completed(url: str, *words: str) -> list[str]:
    """Complete the last word as bash does, and see that nothing is said beside."""
    environment = os.environ | {
        "SLLM_URL": url, "_SLLM_NODE_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["sllm-node", *words]), "COMP_CWORD": str(len(words)),
    }  # fmt: skip
    ran = subprocess.run([CLI], capture_output=True, text=True, timeout=120, env=environment)
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout.split()


def test_names_are_completed_from_the_running_node(node: NodeProcess) -> None:
    assert completed(node.url, "run", "de") == ["demo"]
    assert completed(node.url, "drain", "node") == ["node-1"]


def test_a_node_that_is_not_there_or_says_nothing_completes_nothing_and_keeps_nobody_waiting() -> None:
    assert completed("http://127.0.0.1:9", "run", "de") == []
    assert completed("no url", "run", "de") == []
    with RawServer(lambda request: request.hold()) as server:
        assert completed(server.url, "run", "de") == []
