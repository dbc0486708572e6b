"""Clients that send too slowly, too much or nothing, and clients that read nothing: a real node, raw sockets."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web
from clusters import eventually
from conftest import SMALL

from sllm_actor.frontend.connections import Connection, ConnectionLimits, Connections
from sllm_actor.frontend.server import OTHER_FILES, within_open_files
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.testing.node_process import NodeProcess, running_node

pytestmark = pytest.mark.usefixtures("warm_starts")

CHAT = "/v1/chat/completions"
MAX_CONNECTIONS = 100
KNOBS = (
    *SMALL, "header_timeout_s=0.4", "body_timeout_s=0.4", "idle_timeout_s=3", f"max_connections={MAX_CONNECTIONS}",
    "send_buffer_bytes=4KiB", "send_timeout_s=0.4",
)  # fmt: skip
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LONG = {"model": "demo", "messages": [{"role": "user", "content": "Count from 1 to 999."}]}


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node that is impatient."""
    with running_node(tmp_path_factory.mktemp("strict"), *KNOBS) as node:
        node.deploy("builtin:demo", "demo")
        node.chat("demo", "What is 1 + 1?")
        yield node


def dial(node: NodeProcess) -> socket.socket:
    kept = node.connect()
    kept.connect()
    return cast(socket.socket, kept.sock)


def all_that_comes(sock: socket.socket, trickle: bytes = b"") -> bytes:
    """Read until the node closes; meanwhile send `trickle` byte by byte, as slowly as reads time out."""
    came, rest = b"", iter(trickle)
    sock.settimeout(0.02 if trickle else 60)
    while True:
        try:
            data = sock.recv(65536)
        except TimeoutError:
            sock.sendall(bytes([next(rest)]))
            continue
        except ConnectionResetError:
            return came
        if not data:
            return came
        came += data


def refusal(raw: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize("trickle", [b"", b"X-Padding: " + b"x" * 4000], ids=["nothing more", "byte by byte"])
def test_a_head_that_does_not_come_whole_is_a_408(strict: NodeProcess, trickle: bytes) -> None:
    with dial(strict) as sock:
        sock.sendall(HEAD)
        status, error = refusal(all_that_comes(sock, trickle))
    assert (status, error["code"], error["type"]) == (408, "request_timeout", "timeout_error")


@pytest.mark.parametrize("trickle", [b"", b"x" * 4000], ids=["nothing more", "byte by byte"])
def test_a_body_that_does_not_come_whole_is_a_408_and_ends_the_connection(strict: NodeProcess, trickle: bytes) -> None:
    with dial(strict) as sock:
        sock.sendall(HEAD + b"Content-Length: 100000\r\n\r\n{")
        status, error = refusal(all_that_comes(sock, trickle))
    assert (status, error["code"]) == (408, "request_timeout")
    assert "0.4 s" in error["message"]


def test_a_connection_that_sends_nothing_is_closed_without_a_word(strict: NodeProcess) -> None:
    with dial(strict) as sock:
        assert all_that_comes(sock) == b""


def test_a_kept_connection_serves_again_and_is_closed_when_it_idles(strict: NodeProcess) -> None:
    kept = strict.connect()
    for _ in range(3):
        kept.request("GET", "/health")
        assert kept.getresponse().read() == b'{"status":"ok"}'
    assert all_that_comes(kept.sock) == b""
    kept.close()


def test_a_thousand_clients_that_send_nothing_hurt_no_other(strict: NodeProcess) -> None:
    with ExitStack() as opened:
        silent = [opened.enter_context(dial(strict)) for _ in range(1000)]
        assert strict.chat("demo", "What is 2 + 2?") == "2 + 2 = 4"
        sockets = 0
        for entry in Path(f"/proc/{strict.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # It may be closed between being listed and being looked at.
                sockets += os.readlink(entry).startswith("socket:")
        assert sockets < MAX_CONNECTIONS + 50, "beside clients: engines, text processes, what listens"
        assert all_that_comes(silent[0]) == b"", "the one that has waited longest has made room"


def test_ten_megabytes_are_a_413(strict: NodeProcess) -> None:
    reply = strict.request("POST", CHAT, b'{"model": "' + b"x" * 10_000_000 + b'"}')
    assert (reply.status, reply.json()["error"]["code"]) == (413, "body_too_large")
    assert reply.headers["Connection"] == "close"


def test_bodies_that_come_in_have_a_bound_in_all(node: NodeProcess) -> None:
    """Sixty-four that say they will be as long as one may be fill the room; one that says nothing is taken as such."""

    def small() -> int:
        return node.request("POST", CHAT, b"{}").status

    assert small() == 400
    with ExitStack() as stack:
        for at in range(64):
            sock = stack.enter_context(dial(node))
            length = b"Content-Length: 4194304" if at else b"Transfer-Encoding: chunked"
            sock.sendall(HEAD + length + b"\r\n\r\n")
        eventually(lambda: node.request("POST", CHAT, b"{}").status != 400)
        reply = node.request("POST", CHAT, b"{}")
        assert (reply.status, reply.json()["error"]["code"]) == (503, "overloaded")
        assert reply.headers["Retry-After"] == "1"
        with dial(node) as sock:
            sock.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
            assert refusal(all_that_comes(sock))[0] == 503, "what comes of the body is read by nobody"
    eventually(lambda: small() != 503)
    assert small() == 400, "those who have left make room"


def test_chunks_without_a_length_are_a_413_where_they_get_too_long(strict: NodeProcess) -> None:
    with dial(strict) as sock:
        sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        for _ in range(5):
            sock.sendall(chunk)
        assert refusal(all_that_comes(sock))[0] == 413


@pytest.mark.parametrize(
    "content",
    [b'"\xff"', b'"\xc3\x28"', b'"\xed\xa0\x80"', rb'"\ud800"', b'"\x00"'],
    ids=["no utf-8", "torn", "surrogate", "escaped surrogate", "control"],
)
def test_text_that_is_no_unicode_is_a_400(strict: NodeProcess, content: bytes) -> None:
    body = b'{"model": "demo", "messages": [{"role": "user", "content": ' + content + b"}]}"
    reply = strict.request("POST", CHAT, body)
    assert (reply.status, reply.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03secret\r\n\r\n",
        b"GET /health HTTP/9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 9000 + b"\r\n\r\n",
        b"POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    ],
    ids=["tls", "version", "many headers", "long header", "length"],
)
def test_what_is_no_http_is_a_400_that_repeats_nothing(strict: NodeProcess, sent: bytes) -> None:
    with dial(strict) as sock:
        sock.sendall(sent)
        came = all_that_comes(sock)
    status, error = refusal(came)
    assert (status, error["code"]) == (400, "bad_http")
    assert b"secret" not in came


def test_a_client_that_reads_nothing_is_dropped_and_its_generation_cancelled(strict: NodeProcess) -> None:
    body = json.dumps(LONG | {"stream": True}).encode()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with dial(strict) as other:
            sock.connect(other.getpeername())
        sock.sendall(HEAD + b"X-Request-Id: deaf\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        timeline = {"outcome": "running"}
        while timeline["outcome"] == "running":
            reply = strict.request("GET", "/admin/requests/deaf")
            timeline = reply.json() if reply.status == 200 else timeline
        assert timeline["outcome"] == "cancelled"
        assert strict.call("GET", "/admin/instances")["instances"][0]["active"] == 0


@asynccontextmanager
async def serving(limits: ConnectionLimits) -> AsyncIterator[tuple[str, Connections, asyncio.Event]]:
    """A server whose requests wait for the event."""
    go_on = asyncio.Event()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        assert isinstance(connection, Connection)
        connection.begin()
        await go_on.wait()
        connection.end(request)
        return web.Response(text="done")

    server = web.Server(cast(Any, handle))
    connections = Connections(server, limits, SystemClock())
    tasks = TaskScope("test")
    tasks.spawn(connections.watch(), "watch")
    listening = await asyncio.get_running_loop().create_server(connections, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", connections, go_on
    finally:
        listening.close()
        await server.shutdown(1)
        await tasks.close()


async def test_busy_connections_make_no_room_and_are_never_cut_off() -> None:
    limits = ConnectionLimits(
        max_connections=2, idle_timeout_s=0.05, header_timeout_s=0.05, send_buffer_bytes=65536, send_timeout_s=1
    )  # fmt: skip
    async with serving(limits) as (url, connections, go_on), aiohttp.ClientSession() as session:
        busy = [session.get(url) for _ in range(2)]
        async with asyncio.TaskGroup() as group:
            answers = [group.create_task(request.__aenter__()) for request in busy]
            while connections.counts() != {"open": 2, "waiting": 0}:
                await asyncio.sleep(0)
            async with session.get(url) as refused:
                assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
                assert (await refused.json())["error"]["code"] == "too_many_connections"
            await asyncio.sleep(0.5)  # Longer than what those that wait are given.
            go_on.set()
        assert [await answer.result().text() for answer in answers] == ["done"] * 2
        while connections.counts()["open"]:
            await asyncio.sleep(0.01)
        assert connections.closed == {"idle": 2, "slow_head": 0, "made_room": 0, "refused": 1, "unread": 0}


def test_the_bound_on_connections_leaves_open_files_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ConnectionLimits(
        max_connections=4096, idle_timeout_s=1, header_timeout_s=1, send_buffer_bytes=65536, send_timeout_s=1
    )
    for soft, most in ((1024, 1024 - OTHER_FILES), (100, 16), (10**6, 4096)):
        monkeypatch.setattr("resource.getrlimit", lambda _, soft=soft: (soft, soft))
        assert within_open_files(limits).max_connections == most
