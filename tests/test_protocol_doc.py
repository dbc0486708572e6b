"""docs/protocol.md is enough to write a client from: `protocol_client` was, and talks to a real node here."""

from __future__ import annotations

import ast
import asyncio
import hashlib
import re
import socket
import sys
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import golden_frames
import msgpack
import protocol_client
import pytest
from protocol_client import (
    ANSWER,
    ASK,
    BEAT,
    CANCEL,
    CREDIT,
    ECHO,
    FAILURE,
    GOODBYE,
    ITEM,
    MARK,
    STREAM,
    TELL,
    WATCH,
    Client,
    Gone,
    Refused,
)
from wire_pairs import Message

from sllm_actor.errors import BY_CODE, QueueFull
from sllm_actor.runtime import Actor, ActorSystem, Blob, Limits, Security, handles
from sllm_actor.runtime import letters as wire_letters
from sllm_actor.runtime.handshake import Hello

PAGE = (Path(__file__).parent.parent / "docs/protocol.md").read_text()
SECRET = bytes(range(100, 132))
LIMIT_S = 60.0
WINDOW_BYTES = 262_144


class Greet(Message, frozen=True, tag="greet"):
    name: str


class Count(Message, frozen=True, tag="count"):
    upto: int
    text: str = ""


class Reverse(Message, frozen=True, tag="reverse"):
    blob: Blob


class Wait(Message, frozen=True, tag="wait"):
    """Answered never."""


class Recall(Message, frozen=True, tag="recall"):
    """Answered by all names that were told."""


class Remember(Message, frozen=True, tag="remember"):
    name: str


class Fail(Message, frozen=True, tag="fail"):
    text: str


TABLE = [Greet, Count, Reverse, Wait, Recall, Remember, Fail]


class Server(Actor):
    """Does a little of everything."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.made = 0
        self.waiting = threading.Event()
        self.cancelled = threading.Event()

    @handles(Greet)
    async def greet(self, message: Greet) -> str:
        return f"hello {message.name}"

    @handles(Count)
    async def count(self, message: Count) -> AsyncGenerator[Any, None]:
        for number in range(message.upto):
            self.made += 1
            yield message.text or number

    @handles(Reverse)
    async def reverse(self, message: Reverse) -> Reverse:
        return Reverse(blob=Blob(bytes(message.blob.data)[::-1]))

    @handles(Wait, concurrent=True)
    async def wait(self, _: Wait) -> None:
        self.waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()

    @handles(Remember)
    async def remember(self, message: Remember) -> None:
        self.names.append(message.name)

    @handles(Recall)
    async def recall(self, _: Recall) -> tuple[str, ...]:
        return tuple(self.names)

    @handles(Fail)
    async def fail(self, message: Fail) -> None:
        raise QueueFull(message.text, param="text", retry_after_s=2.5)


class Served:
    """A node with a server actor, in a thread of its own."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.actor = Server()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.system, address = self.do(self._start())
        host, port = address.removeprefix("node@tcp://").rsplit(":", 1)
        self.host, self.port = host, int(port)
        self.clients: list[Client] = []

    async def _start(self) -> tuple[ActorSystem, str]:
        system = ActorSystem(node_id="node", messages=TABLE, security=Security(secret=SECRET), limits=self.limits)
        await system.spawn(self.actor, "server")
        return system, await system.listen("tcp://127.0.0.1:0")

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(LIMIT_S)

    def client(self, secret: bytes = SECRET, **options: Any) -> Client:
        made = Client(self.host, self.port, secret, **options)
        self.clients.append(made)
        return made

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.do(self.system.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(LIMIT_S)
        self.loop.close()


@contextmanager
def serving(limits: Limits) -> Iterator[Served]:
    made = Served(limits)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def served() -> Iterator[Served]:
    with serving(Limits(heartbeat_s=0.1)) as made:
        yield made


def closed(client: Client) -> list[list[Any]]:
    """Read until the node closes; give the letters that came first."""
    heard: list[list[Any]] = []
    try:
        while True:
            heard.append(client.hear())
    except Gone:
        return heard


def test_the_client_knows_nothing_of_ours() -> None:
    tree = ast.parse(Path(protocol_client.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "msgpack"}


# The client and a real node.


def test_it_shakes_hands_by_the_secret_and_is_answered(served: Served) -> None:
    client = served.client()
    assert client.node == "node"
    assert client.ask("server", {"kind": "greet", "name": "wörld"}) == "hello wörld"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"secret": b"another secret of many bytes"}, "secret_mismatch"),
        ({"secret": SECRET, "version_min": 2, "version_max": 3}, "version_mismatch"),
        ({"secret": SECRET, "node": "node"}, "node_mismatch"),
        ({"secret": SECRET, "nonce": b""}, "frame_invalid"),
    ],
)
def test_it_learns_why_it_is_refused(served: Served, options: dict[str, Any], code: str) -> None:
    with pytest.raises(Refused) as refused:
        served.client(**options)
    assert refused.value.args[0] == code
    assert f"| `{code}`" in PAGE or f"`{code}` |" in PAGE


def test_a_node_answers_no_stranger(served: Served) -> None:
    with socket.create_connection((served.host, served.port), timeout=LIMIT_S) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with suppress(ConnectionResetError):
            assert stranger.recv(100) == b""


def test_tells_are_handled_in_order(served: Served) -> None:
    client = served.client()
    for name in ("a", "b"):
        client.say([TELL, "server", None, {"kind": "remember", "name": name}])
    client.say(*([TELL, "server", b"trace", {"kind": "remember", "name": name}] for name in ("c", "d")))
    assert client.ask("server", {"kind": "recall"}) == ["a", "b", "c", "d"]


def test_a_failure_has_a_code_and_the_connection_stands(served: Served) -> None:
    client = served.client()
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("nobody", {"kind": "recall"}, "no_such_actor"),
        ("server", {"kind": "unknown"}, "frame_invalid"),
        ("server", {"kind": "greet", "name": 5}, "frame_invalid"),
        ("server", {"kind": "greet", "name": "x", "more": 1}, "frame_invalid"),
    ]
    for target, body, code in wrong:
        kind, _, said, text, *_ = client.ask(target, body)
        assert (kind, said) == (FAILURE, code)
        assert text
        assert f"`{code}`" in PAGE
    assert client.ask("server", {"kind": "fail", "text": "later"}) == [FAILURE, 5, "queue_full", "later", "text", 2.5]
    assert client.ask("server", {"kind": "greet", "name": "x"}) == "hello x"


def test_a_stream_keeps_to_its_credit(served: Served) -> None:
    client = served.client()
    number = client.call(STREAM, "server", None, {"kind": "count", "upto": 7}, 4, WINDOW_BYTES)
    heard = [client.hear() for _ in range(6)]
    items = [[ITEM, number, 0], [ITEM, number, 1], [ITEM, number, 2], [ITEM, number, 3]]
    assert heard == [*items[:2], [MARK, number], *items[2:], [MARK, number]]
    assert client.ask("server", {"kind": "greet", "name": "x"}) == "hello x"
    assert served.actor.made <= 5
    client.say([CREDIT, number, 2])
    assert [client.hear() for _ in range(3)] == [[ITEM, number, 4], [ITEM, number, 5], [MARK, number]]
    client.say([CREDIT, number, 2])
    assert client.hear() == [ITEM, number, 6]
    assert client.hear() == [ANSWER, number, None]


def test_a_stream_keeps_to_its_window_in_bytes(served: Served) -> None:
    client = served.client()
    body = {"kind": "count", "upto": 4, "text": "x" * 1000}
    number = client.call(STREAM, "server", None, body, 64, 2500)
    assert [client.hear()[0] for _ in range(4)] == [ITEM, ITEM, MARK, ITEM]
    assert client.ask("server", {"kind": "greet", "name": "x"}) == "hello x"
    assert served.actor.made <= 4
    client.say([CREDIT, number, 2])
    assert [client.hear()[0] for _ in range(3)] == [ITEM, MARK, ANSWER]


def test_credit_for_what_was_not_sent_ends_the_connection(served: Served) -> None:
    client = served.client()
    number = client.call(STREAM, "server", None, {"kind": "count", "upto": 9}, 4, WINDOW_BYTES)
    client.say([CREDIT, number, 3])
    assert all(letter[0] in (ITEM, MARK) for letter in closed(client))


def test_a_blob_goes_there_and_comes_back(served: Served) -> None:
    client = served.client()
    data = bytes(range(256)) * 1200
    transfer = client.send_blobs(data)
    number = client.call(ASK, "server", 20.0, None, {"kind": "reverse", "blob": [transfer, 0]})
    answer = client.hear()
    assert answer[:2] == [ANSWER, number]
    assert answer[2]["kind"] == "reverse"
    assert client.take_blob(answer[2]["blob"]) == data[::-1]


def test_a_transfer_may_be_given_up_and_others_stand(served: Served) -> None:
    client = served.client()
    client.send_frame(msgpack.packb([77, [10], 10]))
    client.send_frame(msgpack.packb([77]))
    client.send_frame(msgpack.packb([77, [0], 0]))
    answer = client.ask("server", {"kind": "reverse", "blob": [77, 0]})
    assert client.take_blob(answer["blob"]) == b""


def test_a_cancel_reaches_the_handler(served: Served) -> None:
    client = served.client()
    number = client.call(ASK, "server", 1000, None, {"kind": "wait"})
    assert served.actor.waiting.wait(LIMIT_S)
    assert not served.actor.cancelled.is_set()
    client.say([CANCEL, number])
    assert served.actor.cancelled.wait(LIMIT_S)
    assert client.ask("server", {"kind": "greet", "name": "x"}) == "hello x"


def test_a_lost_connection_cancels_what_ran_for_it(served: Served) -> None:
    client = served.client()
    client.call(ASK, "server", 1000, None, {"kind": "wait"})
    assert served.actor.waiting.wait(LIMIT_S)
    client.close()
    assert served.actor.cancelled.wait(LIMIT_S)


def test_the_time_that_is_left_counts(served: Served) -> None:
    client = served.client()
    client.call(ASK, "server", 0.0, None, {"kind": "remember", "name": "too late"})
    client.say([TELL, "server", None, {"kind": "remember", "name": "in time"}])
    number = client.call(ASK, "server", 20, None, {"kind": "recall"})
    letter = client.hear()
    if letter[0] == FAILURE:
        assert letter[1:3] == [1, "deadline_exceeded"]
        letter = client.hear()
    assert letter == [ANSWER, number, ["in time"]]


def test_an_end_is_told_to_whoever_watches(served: Served) -> None:
    client = served.client()
    assert client.call(WATCH, "nobody") == 1
    assert client.hear() == [ANSWER, 1, "no_such_actor"]
    client.call(WATCH, "server")
    assert client.ask("server", {"kind": "greet", "name": "x"}) == "hello x"
    served.do(served.system.stop("server"))
    assert client.hear() == [ANSWER, 2, "stopped"]


def test_heartbeats_go_both_ways(served: Served) -> None:
    client = served.client()
    client.say([BEAT, 2**64 - 1])
    assert client.hear() == [ECHO, 2**64 - 1]
    stamps = [client.hear(beats=True)[1] for _ in range(3)]
    assert stamps == sorted(set(stamps))


def test_a_peer_without_echoes_is_given_up() -> None:
    with serving(Limits(heartbeat_s=0.05, acceptable_pause_s=0.1)) as served:
        client = served.client()
        with pytest.raises(Gone):
            while True:
                client._hear_frame(client._read_frame())


def test_a_node_that_closes_says_goodbye(served: Served) -> None:
    client = served.client()
    served.do(served.system.close())
    assert closed(client) == [[GOODBYE, "closing"]]


def test_a_goodbye_is_answered_by_the_end_and_is_for_good(served: Served) -> None:
    client = served.client(uid=5)
    client.say([GOODBYE, "closing"])
    assert closed(client) == []
    with pytest.raises(Refused) as refused:
        served.client(uid=5)
    assert refused.value.args[0] == "node_down"
    assert served.client(uid=6).ask("server", {"kind": "recall"}) == []


def test_a_second_connection_takes_the_place_of_a_first_that_its_dialer_has_lost(served: Served) -> None:
    first = served.client(uid=5)
    with pytest.raises(Refused) as refused:
        served.client(uid=5, links=0)
    assert refused.value.args[0] == "link_duplicate"
    second = served.client(uid=5, links=1)
    assert closed(first) == []
    assert second.ask("server", {"kind": "recall"}) == []


@pytest.mark.parametrize(
    "letter",
    [[14, 1], [ANSWER, 1, None], [ITEM, 5, 1], [MARK, 9], [FAILURE, 7, "x", "y", None, None], [BEAT], [BEAT, 1, 2]],
    ids=str,
)
def test_a_violation_ends_the_connection(served: Served, letter: list[Any]) -> None:
    client = served.client()
    client.say(letter)
    assert closed(client) == []


def test_a_number_that_is_in_use_may_not_be_used_again(served: Served) -> None:
    client = served.client()
    client.call(ASK, "server", 20, None, {"kind": "wait"})
    client.say([ASK, 1, "server", 20, None, {"kind": "wait"}])
    assert closed(client) == []


# The page and the code.


def rows(heading: str) -> list[list[str]]:
    """Give the cells of the first table after a heading or sentence."""
    lines = PAGE[PAGE.index(heading) :].splitlines()
    begin = next(index for index, line in enumerate(lines) if line.startswith("|"))
    table: list[list[str]] = []
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return table


def test_the_page_has_every_letter_with_its_fields() -> None:
    kinds = [*wire_letters.MESSAGE_LETTERS, *wire_letters.VALUE_LETTERS, *wire_letters.PLAIN_LETTERS]
    real = {kind.__struct_config__.tag: ", ".join(kind.__struct_fields__) for kind in kinds}
    assert {int(kind): fields for kind, _, fields, _ in rows("## Letters")} == real
    told = {
        name
        for names, *_ in rows("| field | type | meaning and bounds |\n|---|---|---|\n| call")
        for name in names.split(", ")
    }
    assert {field for fields in real.values() for field in fields.split(", ")} == told


def test_the_page_has_every_field_of_a_hello() -> None:
    told = [name for names, *_ in rows("### hello") for name in names.split(", ")]
    assert sorted(told) == sorted(["kind", *Hello.__struct_fields__])


def test_the_page_has_codes_that_there_are() -> None:
    codes = [code for names, *_ in rows("## Error codes") for code in names.split(", ")]
    assert set(codes) <= set(BY_CODE)


def test_the_page_has_the_worked_example_of_the_golden_frames() -> None:
    golden = golden_frames.handshake_frames()
    squeezed = re.sub(r"\s", "", PAGE)
    hellos = [golden[f"{side}: hello"][4:] for side in ("dialer", "acceptor")]
    for side, hello in zip(("dialer", "acceptor"), hellos, strict=True):
        assert f"{side}'shello,itsbody:{hello.hex()}SHA-256:{hashlib.sha256(hello).hexdigest()}" in squeezed
        mac = protocol_client.mac_of(golden_frames.SECRET, side.encode(), *hellos)
        assert f"{side}'smac:{mac.hex()}" in squeezed
        assert msgpack.unpackb(golden[f"{side}: proof"][4:])["mac"] == mac
    assert f"`{golden_frames.SECRET.decode()}`" in PAGE


def test_the_page_has_frames_as_they_are() -> None:
    squeezed = re.sub(r"\s", "", PAGE)
    ask = golden_frames.letter_frames()["ask"].hex()
    assert ask[: ask.index("83a46b696e64")] in squeezed
    transfer = golden_frames.transfer_frames()
    assert transfer["begin of a transfer"].hex() in squeezed
    assert transfer["chunk of its first blob"].hex() in squeezed


def test_no_line_of_the_page_is_too_long() -> None:
    assert not [line for line in PAGE.splitlines() if len(line) > 120]
