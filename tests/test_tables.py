"""Tables of the command line in terminals that are narrow for them: what is to be copied stays whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from terminals import in_terminal
from test_cli import cli_json

from sllm_actor.cli.fitting import Column, fitted
from sllm_actor.testing.node_process import CLI, NodeProcess

LONG = "mistral-7b-instruct-v0.3-customer-support-german-2026-11"
REQUEST = "a-request-of-the-support-team-0123456789-0123456789-0123456789"
WORDS = st.lists(st.text("abc-/", min_size=1, max_size=30), min_size=1, max_size=6).map(" ".join)


@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=5), st.integers(20, 200))
def test_no_word_of_a_table_is_folded_whatever_the_width(rows: list[tuple[str, str, str]], width: int) -> None:
    columns = (Column("FIRST"), Column("SECOND", 1, wraps=True), Column("THIRD", 2, wraps=True))
    console = Console(width=10_000, color_system=None)
    with console.capture() as captured:
        console.print(fitted(columns, rows, width, may_fold=False))
    lines = captured.get().splitlines()
    words = {word for line in lines for word in line.split()}
    shown = [name in lines[0].split() for name in ("FIRST", "SECOND", "THIRD")]
    assert shown[0] and shown[1] >= shown[2]
    for row in rows:
        assert {word for at, cell in enumerate(row) if shown[at] for word in cell.split()} <= words
    widest = max(len(line.rstrip()) for line in lines)
    assert widest <= width or shown == [True, False, False]


@pytest.fixture(scope="module")
def busy(node: NodeProcess) -> NodeProcess:
    node.deploy("builtin:demo", LONG)
    body = {"model": LONG, "messages": [{"role": "user", "content": "Add 1 and 1."}]}
    assert node.request("POST", "/v1/chat/completions", body, {"X-Request-Id": REQUEST}).status == 200
    return node


@pytest.mark.parametrize(
    ("verb", "whole"),
    [
        (("ls",), [LONG]), (("ps",), [f"{LONG}-", "node-1"]), (("status",), ["node-1"]),
        (("explain", REQUEST), [LONG, REQUEST, "node-1"]),
    ],
)  # fmt: skip
def test_what_is_copied_is_whole_in_eighty_columns(busy: NodeProcess, verb: tuple[str, ...], whole: list[str]) -> None:
    with in_terminal([CLI, *verb, "--url", busy.url], 80, 50) as terminal:
        assert terminal.ended() == 0
    # A line that is full goes on in the next one: who selects both copies it as one.
    text = "".join(line if len(line) == 80 else f"{line}\n" for line in terminal.lines)
    for name in whole:
        assert name in text, terminal.text
    head = next((line.split() for line in terminal.lines if "NODE" in line.split() or "NAME" in line.split()), [])
    assert all(len(word) > 1 for word in head), terminal.text


def test_where_there_is_room_all_columns_are_there(busy: NodeProcess) -> None:
    with in_terminal([CLI, "ls", "--url", busy.url], 160, 50) as terminal:
        assert terminal.ended() == 0
    assert terminal.lines[0].split() == ["NAME", "STATE", "SIZE", "ARCHITECTURE", "DTYPE", "CONTEXT", "KEEP", "ALIVE"]
    cli_json("stop", LONG, "--url", busy.url)
    cli_json("rm", LONG, "--url", busy.url)
