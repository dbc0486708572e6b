"""`sllm-node top`: what it draws at which size, and what it lives through."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_server import RawServer, Request
from rich.console import Console
from terminals import in_terminal
from test_cli import UNREACHABLE, cli, cli_json

from sllm_actor.cli.fitting import Column, fitted, shares
from sllm_actor.cli.seen import Seen, SeenRequest
from sllm_actor.cli.token_rates import TokenRates, rates_between, rates_so_far
from sllm_actor.cli.top_view import Glance, draw
from sllm_actor.testing.node_process import CLI, NodeProcess

GIB = 1024**3
CTRL_C = b"\x03"
JSON = {"Content-Type": "application/json"}
REVOKED = json.dumps({"error": {"message": "no key", "code": "invalid_api_key"}}).encode()
LONG = {"model": "demo", "messages": [{"role": "user", "content": "Count from 1 to 200."}]}


def shown(drawn: Any, width: int) -> list[str]:
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as captured:
        console.print(drawn)
    return [line.rstrip() for line in captured.get().splitlines()]


def request(name: str, tokens: int, instance: str = "", first_s: float = 0.0, end_s: float = 0.0) -> dict[str, Any]:
    return {
        "request_id": name, "model": "qwen", "cold": True, "arrived_s": 90.0, "spans": [], "first_token_s": first_s,
        "end_s": end_s, "prompt_tokens": 3, "generated_tokens": tokens, "outcome": "", "instance_id": instance,
        "node": "n1" if instance else "",
    }  # fmt: skip


def node(name: str, **other: Any) -> dict[str, Any]:
    plain = {
        "node": name, "leads": False, "cordoned": False, "reported": True, "instances": 1, "active": 1, "slots": 4,
        "host_pool_bytes": 2 * GIB, "checkpoints": 1, "roles": ["controller", "gateway", "worker"],
        "host_fingerprints": ["f"], "ssd_fingerprints": ["f"], "starting": [],
    }  # fmt: skip
    return plain | other


def glance(nodes: int = 2, streams: int = 2, trouble: str = "", parts: dict[str, Any] | None = None) -> Glance:
    """A cluster whose model is at 45 % of a load, for a request that has waited 10 s."""
    requests = [request(f"req-{number:04}", 20, f"qwen-{number}", 95.0) for number in range(streams)]
    seen: dict[str, Any] = {
        "node": {"node": "n0", "version": "1", "ready": True, "waiting": {"qwen": 2}, "failed_starts": {}},
        "nodes": [node(f"n{number}", leads=not number) for number in range(nodes)],
        "models": [
            {"name": "qwen", "fingerprint": "f", "size_bytes": GIB, "state": "loading", "loading_bytes": GIB // 20 * 9}
        ],
        "tiers": {
            "host_bytes": 2 * GIB, "host_free_bytes": GIB, "ssd_used_bytes": GIB, "ssd_quota_bytes": 64 * GIB,
        },
        "instances": [
            {"instance_id": one["instance_id"], "model": "qwen", "node": "n1", "active": 1} for one in requests
        ],
        "requests": [*requests, request("waits", 0)], "problems": {},
    } | (parts or {})  # fmt: skip
    read = msgspec.convert(seen, Seen)
    return Glance("http://h:8400", read, rates_so_far(read.requests, 100.0), 100.0, trouble)


# What it draws.


def test_a_glance_has_nodes_starts_with_their_progress_instances_and_streams() -> None:
    text = "\n".join(shown(draw(glance(), 120, 40), 120))
    assert "n0 at http://h:8400: healthy" in text
    assert "2 nodes, 2 of 8 instances, 2 streams, 1 waiting, 8 tokens/s" in text
    assert "ready, leads" in text
    assert "1.1 GB of 2.1 GB" in text
    assert "████" in text
    assert "45% of 1.1 GB" in text
    assert "10.00 s" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["req-0001", "qwen", "n1", "20", "4.0", "5.00", "s", "10.00", "s"] in rows
    assert ["qwen-1", "qwen", "n1", "busy", "1", "4.0"] in rows


def test_what_is_not_well_is_said_at_the_top() -> None:
    silent = [node("n0"), node("n1", reported=False)]
    assert "no report from n1" in shown(draw(glance(parts={"nodes": silent}), 80, 24), 80)[0]
    assert shown(draw(glance(trouble="no news for 3 s"), 80, 24), 80)[2] == "no news for 3 s"
    assert "tiers: too slow" in shown(draw(glance(parts={"problems": {"tiers": "too slow"}}), 80, 24), 80)[0]


@settings(max_examples=30)
@given(st.integers(40, 200), st.integers(8, 60), st.integers(1, 40), st.integers(0, 40))
def test_no_size_is_too_small_for_whole_ids_and_nothing_goes_over_an_edge(
    width: int, height: int, nodes: int, streams: int
) -> None:
    lines = shown(draw(glance(nodes=nodes, streams=streams), width, height), width)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert not [word for line in lines for word in line.split() if word.startswith("req-") and len(word) != 8]
    assert "n0" in [line.split()[0] for line in lines[2:] if line]


def test_columns_go_by_their_rank_until_the_table_fits_and_the_first_one_never() -> None:
    columns = (Column("ID"), Column("SECOND", 2), Column("THIRD", 1))
    rows = [("i" * 20, "s" * 20, "t" * 20)]
    assert shown(fitted(columns, rows, 80), 80)[0].split() == ["ID", "SECOND", "THIRD"]
    assert shown(fitted(columns, rows, 50), 50)[0].split() == ["ID", "THIRD"]
    assert "".join(shown(fitted(columns, rows, 10), 10)) == "ID" + "i" * 20


@given(st.lists(st.integers(4, 50), max_size=5), st.integers(0, 100))
def test_lines_are_shared_out_up_to_what_is_wanted_and_there(wanted: list[int], room: int) -> None:
    given_ = shares(wanted, room, 4)
    assert sum(given_) <= room
    assert all(lines == 0 or 4 <= lines <= want for lines, want in zip(given_, wanted, strict=True))
    left = room - sum(given_)
    assert not left or left < 4 or given_ == wanted


def test_a_rate_is_of_the_tokens_since_the_look_before() -> None:
    told = [request("a", 30, "i", 1.0), request("b", 10, "i", 1.0), request("c", 8, "j", 1.0, end_s=2.0)]
    now = msgspec.convert(told, list[SeenRequest])
    rates = rates_between({"a": 20, "c": 4}, now, 2.0)
    assert rates == TokenRates(2.0, 12.0, {"i": 10.0, "j": 2.0}, {"a": 5.0, "b": 5.0})
    assert rates_between({"a": 99}, now[:1], 2.0).in_all == 0.0
    assert rates_so_far(now, 11.0).requests == {"a": 3.0, "b": 1.0}


# What it lives through.


@contextmanager
def asked_again_and_again(node: NodeProcess) -> Iterator[None]:
    """The demo model answers meanwhile, one long answer after the other."""
    enough = threading.Event()

    def ask() -> None:
        while not enough.is_set():
            node.request("POST", "/v1/chat/completions", LONG, {"X-Request-Id": "a-long-answer"})

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        enough.set()
        asking.join()


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (132, 43), (60, 14)])
def test_a_real_node_is_shown_in_a_terminal_and_ctrl_c_ends_it_well(
    node: NodeProcess, columns: int, lines: int
) -> None:
    with in_terminal([CLI, "top", "--url", node.url, "--interval", "0.2"], columns, lines) as terminal:
        text = terminal.until(lambda text: "healthy" in text and "ready, leads" in text)
        assert text.splitlines()[0].startswith("node-1 at http://127.0.0.1:")
        terminal.type(CTRL_C)
        assert terminal.ended() == 0
    # What was in the terminal before is there again, and so is the cursor.
    assert terminal.raw.rindex(b"\x1b[?1049l") > terminal.raw.rindex(b"\x1b[?1049h")
    assert terminal.raw.rindex(b"\x1b[?25h") > terminal.raw.rindex(b"\x1b[?25l")


def test_a_stream_is_seen_while_it_runs(node: NodeProcess) -> None:
    with in_terminal([CLI, "top", "--url", node.url, "--interval", "0.1"], 100, 24) as terminal:
        terminal.until(lambda text: "healthy" in text)
        with asked_again_and_again(node):
            terminal.until(lambda text: "a-long-answer" in text and "demo-" in text)


def test_another_size_of_the_terminal_is_followed_at_once(node: NodeProcess) -> None:
    with in_terminal([CLI, "top", "--url", node.url, "--interval", "3600"], 120, 30) as terminal:
        assert "SSD" in terminal.until(lambda text: "ready, leads" in text)
        terminal.resize(30, 12)
        narrow = terminal.until(lambda text: "ready, leads" in text and "SSD" not in text)
        assert "NODE" in narrow
        terminal.resize(120, 30)
        terminal.until(lambda text: "SSD" in text)
        terminal.type(CTRL_C)
        assert terminal.ended() == 0


def snapshot(node: NodeProcess) -> bytes:
    """What a node tells first of all."""
    connection = node.connect()
    connection.request("GET", "/admin/events")
    answer = connection.getresponse()
    event = b"".join(iter(answer.readline, b"\n")) + b"\n"
    connection.close()
    return event


def test_a_gateway_that_goes_away_and_comes_back_is_shown_again(node: NodeProcess) -> None:
    told = snapshot(node)
    refused = json.dumps({"error": {"message": "it is stopping", "code": "draining"}}).encode()

    seen = threading.Event()

    def answer(request: Request) -> None:
        if request.number == 2:
            request.reply(503, JSON, refused)
            return
        if request.number > 1:
            seen.wait(60)
        request.reply(200, {"Content-Type": "text/event-stream", "Content-Length": None}, told)
        if request.number > 1:
            request.hold()

    with RawServer(answer) as server, in_terminal([CLI, "top", "--url", server.url], 100, 24) as terminal:
        text = terminal.until(lambda text: "no news for" in text)
        assert "ready, leads" in text
        seen.set()
        terminal.until(lambda text: "healthy" in text)
        terminal.type(CTRL_C)
        assert terminal.ended() == 0


def test_a_node_that_tells_what_this_version_can_not_read_ends_it_and_is_no_traceback(node: NodeProcess) -> None:
    told = snapshot(node).replace(b'"ready":true', b'"ready":"surely","more":1')
    events = {"Content-Type": "text/event-stream", "Content-Length": None}
    with RawServer(lambda request: request.reply(200, events, told)) as server:
        error = cli_json("top", "--once", "--url", server.url, status=1)["error"]
    assert error["message"].startswith("the node tells what this version can't read: Expected `bool`")


def test_no_node_and_a_wrong_key_end_it_before_it_has_begun() -> None:
    assert cli_json("top", *UNREACHABLE, status=3)["error"]["code"] == "node_unreachable"
    with RawServer(lambda request: request.reply(401, JSON, REVOKED)) as server:
        with in_terminal([CLI, "top", "--url", server.url], 80, 24) as terminal:
            assert terminal.ended() == 1
        assert "no key" in terminal.text


def test_a_key_that_is_revoked_meanwhile_ends_it(node: NodeProcess) -> None:
    told = snapshot(node) + b"event: error\ndata: " + REVOKED + b"\n\n"
    events = {"Content-Type": "text/event-stream", "Content-Length": None}
    with RawServer(lambda request: request.reply(200, events, told)) as server:
        with in_terminal([CLI, "top", "--url", server.url], 80, 24) as terminal:
            assert terminal.ended() == 1
        assert "no key" in terminal.text


def test_one_look_is_text_in_a_pipe_and_json_for_programs(node: NodeProcess) -> None:
    assert "node-1" in cli("top", "--url", node.url).stdout
    look = cli_json("top", "--once", "--url", node.url)
    assert {"models", "nodes", "instances", "requests", "tiers", "problems", "node", "rates"} <= set(look)
    assert look["rates"]["over_s"] == 0.0


def test_json_comes_line_by_line_until_it_is_interrupted(node: NodeProcess) -> None:
    words: list[str | Path] = [CLI, "top", "--json", "--interval", "0.1", "--url", node.url]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as looking:
        assert looking.stdout is not None
        looks = [json.loads(looking.stdout.readline()) for _ in range(2)]
        looking.send_signal(signal.SIGINT)
        looking.stdout.read()
        assert looking.wait(60) == 0
    assert looks[0]["rates"]["over_s"] == 0.0 < looks[1]["rates"]["over_s"]
