"""Connections between nodes: how they begin, cross, break and come back; what strangers and liars can't do to them."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import tempfile
from contextlib import suppress

import msgspec
import pytest
from loops import LoopFactory
from remote_pairs import (
    FOR_EVER_S,
    KIB,
    LOOPS,
    MIB,
    QUICK,
    SECRET,
    BarePeer,
    Carry,
    Count,
    Everyman,
    Hold,
    HoldAside,
    Say,
    asking,
    dialled,
    link_of,
    listening,
    node,
    on_both_loops,
    opening,
    outcome,
    pair,
    run_on,
    until,
)

from sllm_actor.errors import (
    ActorDied,
    AddressInUse,
    ConfigInvalid,
    HandshakeRefused,
    LinkFull,
    NodeDown,
    NodeMismatch,
    NodeUnreachable,
    SecretMismatch,
    SllmError,
    VersionMismatch,
)
from sllm_actor.runtime import ActorRef, Blob, Limits, NodeAddress, Security
from sllm_actor.runtime import handshake as handshake_module
from sllm_actor.runtime.letters import Answer, Credit, Failure, Item

PATIENT_REDIAL = msgspec.structs.replace(QUICK, redial_first_s=FOR_EVER_S, redial_last_s=FOR_EVER_S)
SOON_DOWN = msgspec.structs.replace(QUICK, down_after_s=0.1)
WATCHFUL = msgspec.structs.replace(QUICK, heartbeat_s=0.05, acceptable_pause_s=0.1)


async def ask(ref: ActorRef, text: str = "x") -> object:
    """Ask, and give the answer or the typed error."""
    return await outcome(ref.ask(Say(text=text), timeout_s=FOR_EVER_S))


async def comes_back(ref: ActorRef) -> None:
    """Ask until there is an answer."""
    while await ask(ref, "back") != "back":
        await asyncio.sleep(0.001)


# How connections begin.


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_two_nodes_that_dial_each_other_at_once_end_with_one_connection(loop_factory: LoopFactory) -> None:
    async def body() -> None:
        chance = random.Random(7)
        for _ in range(40):
            async with node("a") as a, node("b") as b:
                await a.spawn(Everyman(), "man")
                await b.spawn(Everyman(), "man")

                async def asks(ref: ActorRef) -> list[object]:
                    for _ in range(chance.choice([0, 0, 0, 1, 2, 3, 5, 8, 13])):
                        await asyncio.sleep(0)
                    return [await ask(ref, str(k)) for k in range(5)]

                there, back = a.ref("man", str(b.address)), b.ref("man", str(a.address))
                answers = await asyncio.gather(asks(there), asks(back), asks(there), asks(back))
                assert list(answers) == [[str(k) for k in range(5)]] * 4
                assert (link_of(a, "b").connections, link_of(b, "a").connections) == (1, 1)

    run_on(loop_factory, body())


@on_both_loops
async def test_nodes_that_could_not_reach_each_other_before_still_end_with_one_connection() -> None:
    for _ in range(10):
        async with node("a") as a, node("b") as b:
            await a.spawn(Everyman(), "man")
            await b.spawn(Everyman(), "man")
            # Both have failed to dial before, so each is in the middle of trying again.
            nowhere = "tcp://127.0.0.1:1"
            await asyncio.gather(ask(a.ref("man", f"b@{nowhere}")), ask(b.ref("man", f"a@{nowhere}")))
            there, back = a.ref("man", str(b.address)), b.ref("man", str(a.address))
            await asyncio.gather(comes_back(there), comes_back(back))
            answers = await asyncio.gather(*(ask(ref, str(k)) for k in range(10) for ref in (there, back)))
            assert answers == [str(k) for k in range(10) for _ in "ab"]


@on_both_loops
async def test_three_nodes_that_all_dial_each_other_have_a_connection_each() -> None:
    async with node("a") as a, node("b") as b, node("c") as c:
        nodes = [a, b, c]
        for one in nodes:
            await one.spawn(Everyman(), "man")
        refs = [one.ref("man", str(other.address)) for one in nodes for other in nodes if one is not other]
        assert await asyncio.gather(*(ask(ref, str(k)) for k in range(20) for ref in refs)) == [
            str(k) for k in range(20) for _ in refs
        ]
        assert [[link.connections for link in one.stats().links] for one in nodes] == [[1, 1]] * 3


@on_both_loops
async def test_a_node_that_was_dialled_in_vain_is_reached_once_it_is_there() -> None:
    async with node("a") as a:
        listener, address = listening("b")
        endpoint = address.partition("@")[2]
        listener.close()
        ref = a.ref("man", address)
        assert type(await ask(ref)) is NodeUnreachable
        async with node("b", listen=endpoint) as b:
            await b.spawn(Everyman(), "man")
            await comes_back(ref)


@on_both_loops
async def test_many_dials_in_vain_leave_room_for_those_who_connect() -> None:
    async with node("a", msgspec.structs.replace(QUICK, max_handshakes=3)) as a:
        await a.spawn(Everyman(), "man")
        for number in range(8):
            assert type(await ask(a.ref("man", f"dead-{number}@tcp://127.0.0.1:1"))) is NodeUnreachable
        async with node("b") as b:
            assert await ask(b.ref("man", str(a.address))) == "x"


@on_both_loops
async def test_an_error_that_many_askers_share_does_not_grow() -> None:
    async with node("a", PATIENT_REDIAL) as a:
        dead = a.ref("man", "dead@tcp://127.0.0.1:1")
        for _ in range(50):
            error = await ask(dead)
        assert isinstance(error, NodeUnreachable)
        frames, traceback = 0, error.__traceback__
        while traceback is not None:
            frames, traceback = frames + 1, traceback.tb_next
        assert frames < 20


@on_both_loops
async def test_a_node_that_comes_back_at_another_endpoint_is_reached_there_at_once() -> None:
    async with node("b", PATIENT_REDIAL) as b:
        assert isinstance(await ask(b.ref("man", "a@tcp://127.0.0.1:1")), NodeUnreachable)
        async with node("a") as a:
            await a.spawn(Everyman(), "man")
            assert await ask(b.ref("man", str(a.address))) == "x"


@on_both_loops
async def test_a_dead_socket_file_is_replaced_and_a_living_one_is_not() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/node.sock"
        dead = socket.socket(socket.AF_UNIX)
        dead.bind(path)
        dead.close()
        async with node("a", listen=f"unix://{path}") as a, node("b", listen="") as b:
            await a.spawn(Everyman(), "man")
            assert await ask(b.ref("man", str(a.address))) == "x"
            with pytest.raises(AddressInUse):
                await b.listen(f"unix://{path}")
            assert await ask(b.ref("man", str(a.address))) == "x"
        assert not os.path.exists(path)
        plain = f"{folder}/plain"
        with open(plain, "w") as file:
            file.write("no socket")
        async with node("c", listen="") as c:
            with pytest.raises(AddressInUse):
                await c.listen(f"unix://{plain}")
        assert os.path.exists(plain)


@on_both_loops
async def test_a_port_that_is_taken_is_a_typed_error_and_another_may_be_tried() -> None:
    async with node("a") as a, node("b", listen="") as b:
        endpoint = a.address.endpoint
        with pytest.raises(AddressInUse):
            await b.listen(endpoint)
        await b.listen("tcp://127.0.0.1:0")
        with pytest.raises(ConfigInvalid, match="listens at"):
            await b.listen("tcp://127.0.0.1:0")


@on_both_loops
async def test_listening_for_other_machines_without_security_is_refused() -> None:
    async with node("a", listen="") as a:
        for endpoint in ("tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://192.0.2.1:80", "tcp://example.org:80"):
            with pytest.raises(ConfigInvalid, match="give a cluster secret or TLS"):
                await a.listen(endpoint)
        for nonsense in ("", "tcp://", "tcp://127.0.0.1", "tcp://127.0.0.1:99999", "unix://relative", "http://a:1"):
            with pytest.raises(ConfigInvalid):
                await a.listen(nonsense)
    async with node("a", listen="", security=Security(secret=SECRET)) as a:
        assert await a.listen("tcp://0.0.0.0:0", advertise="tcp://127.0.0.1:1") == "a@tcp://127.0.0.1:1"


# Who is let in.


@on_both_loops
async def test_a_cluster_secret_lets_in_those_who_know_it_and_nobody_else() -> None:
    knows, other, none = Security(secret=SECRET), Security(secret=b"another secret, as long"), Security()
    async with node("a", security=knows) as a, node("open") as unsecured:
        for system in (a, unsecured):
            await system.spawn(Everyman(), "man")
        async with node("b", security=knows) as b:
            assert await ask(b.ref("man", str(a.address))) == "x"
            assert type(await ask(b.ref("man", str(unsecured.address)))) is SecretMismatch
        for security in (other, none):
            async with node("c", security=security) as c:
                assert type(await ask(c.ref("man", str(a.address)))) is SecretMismatch
                assert type(await outcome(anext(c.ref("man", str(a.address)).stream(Count(upto=1))))) is SecretMismatch
        assert [link.node for link in a.stats().links] == ["b"]


@on_both_loops
async def test_a_proof_that_is_replayed_or_reflected_is_refused() -> None:
    async with node("a", security=Security(secret=SECRET)) as a:
        for mac in (b"", bytes(32), b"x" * 32):
            peer = await handshake_begun(a.address)
            await peer.send_bytes(framed(handshake_module.Proof(mac=mac)))
            with pytest.raises(SecretMismatch):
                await peer.next_letter(object)
            peer.close()
        assert a.stats().links == ()


async def handshake_begun(address: NodeAddress) -> BarePeer:
    """Exchange hellos with a node that has a secret, and stop there."""
    peer = BarePeer.over(await dialled(str(address)), secured=True, secret=b"a secret that nobody else has")
    await peer.say_hello()
    return peer


def framed(step: handshake_module.Step) -> bytes:
    body = msgspec.msgpack.encode(step)
    return len(body).to_bytes(4, "big") + body


@on_both_loops
async def test_another_node_at_the_address_is_not_taken_for_the_one_that_was_meant() -> None:
    async with node("a") as a, node("b") as b:
        await b.spawn(Everyman(), "man")
        assert type(await ask(a.ref("man", f"someone-else@{b.address.endpoint}"))) is NodeMismatch
        assert await ask(a.ref("man", str(b.address))) == "x"


@on_both_loops
async def test_a_node_of_ones_own_name_is_refused() -> None:
    async with node("a") as a, node("a") as other:
        await other.spawn(Everyman(), "man")
        namesake = a.ref("man", other.address)
        assert isinstance(await ask(namesake), SllmError)
        with pytest.raises(NodeMismatch):
            await BarePeer.dial(str(a.address), "a")
        assert await ask(a.ref("man", other.address)) != "x"


@on_both_loops
async def test_nodes_without_a_common_version_refuse_each_other_and_say_so() -> None:
    async with node("a") as a:
        for oldest, newest in ((2, 9), (0, 0)):
            with pytest.raises(VersionMismatch):
                await BarePeer.dial(str(a.address), version_min=oldest, version_max=newest)
        (await BarePeer.dial(str(a.address), version_min=0, version_max=9)).close()
        listener, address = listening("new")
        with listener:
            asked = asyncio.ensure_future(ask(a.ref("man", address)))
            with pytest.raises(ConnectionError):
                await BarePeer.answer(listener, "new", version_min=2, version_max=2)
            assert type(await asked) is VersionMismatch


@on_both_loops
async def test_a_hello_that_lies_is_refused() -> None:
    lies: list[dict[str, object]] = [
        {"name": ""},
        {"name": "x" * 300},
        {"uid": 0},
        {"uid": 2**63},
        {"uid": -1},
        {"nonce": b"short"},
        {"links": -1},
        {"max_frame_bytes": 100},
        {"max_blob_bytes": -1},
        {"endpoint": "x" * 300},
        {"node": 5},
    ]
    async with node("a") as a:
        await a.spawn(Everyman(), "man")
        for lie in lies:
            # One that can't even be read is not answered.
            with pytest.raises((HandshakeRefused, ConnectionError)):
                await BarePeer.dial(str(a.address), **lie)  # type: ignore[arg-type]
        assert a.stats().links == ()
        peer = await BarePeer.dial(str(a.address))
        peer.close()


# How connections end and come back.


@on_both_loops
async def test_after_a_cut_what_was_unanswered_fails_and_the_next_ask_finds_a_new_connection() -> None:
    async with pair() as both:
        held = asyncio.ensure_future(outcome(both.ref.ask(HoldAside(), timeout_s=FOR_EVER_S)))
        stream = both.ref.stream(Count(upto=10**9))
        assert await anext(stream) == 0
        await both.man.begun.wait()
        cut(both.a)
        assert type(await held) is NodeUnreachable
        with pytest.raises(NodeUnreachable):
            async for _ in stream:
                pass
        await both.man.cancelled.wait()
        await comes_back(both.ref)
        assert link_of(both.a, "b").connections == 2


def cut(system: object) -> None:
    """Break every connection of a system as a network does: without a word."""
    for link in list(system._remotes._owners):  # type: ignore[attr-defined]
        link.abort()


@on_both_loops
async def test_a_watch_outlives_a_cut() -> None:
    async with pair() as both:
        ended = asyncio.ensure_future(both.ref.ended())
        await comes_back(both.ref)
        cut(both.b)
        await until(lambda: link_of(both.a, "b").connections == 2, "connected anew")
        await comes_back(both.ref)
        assert not ended.done()
        await both.b.stop("man")
        assert (await ended).reason == "stopped"


@on_both_loops
async def test_after_a_restart_of_the_peer_old_references_have_died_and_names_work() -> None:
    async with node("a") as a:
        async with node("b") as b:
            endpoint = b.address.endpoint
            await b.spawn(Everyman(), "man")
            by_name = a.ref("man", str(b.address))
            old = a.ref("man", b.address)
            assert await ask(old) == "x"
            ended = asyncio.ensure_future(old.ended())
            await ask(by_name)
            cut(b)
        async with node("b", listen=endpoint) as b:
            await b.spawn(Everyman(), "man")
            await comes_back(by_name)
            assert type(await ask(old)) is ActorDied
            assert type(await outcome(anext(old.stream(Count(upto=1))))) is ActorDied
            # A link that came back while the node was closing found the actor stopped already.
            assert (await ended).reason in ("node_down", "no_such_actor")
            assert (await old.ended()).reason == "node_down"
            assert await ask(a.ref("man", b.address)) == "x"


@on_both_loops
async def test_an_incarnation_that_was_declared_down_stays_so_until_another_comes() -> None:
    async with node("a", SOON_DOWN) as a:
        await a.spawn(Everyman(), "man")
        peer = await BarePeer.dial(str(a.address), "b", uid=5)
        ref = a.ref("man", NodeAddress("b", "", 5))
        ended = asyncio.ensure_future(ref.ended())
        await until(lambda: link_of(a, "b").open)
        peer.close()
        assert (await ended).reason == "node_down"
        with pytest.raises(NodeDown):
            await BarePeer.dial(str(a.address), "b", uid=5, links=1)
        assert type(await ask(ref)) is NodeUnreachable
        assert (await ref.ended()).reason == "node_down"
        peer = await BarePeer.dial(str(a.address), "b", uid=6)
        assert type(await ask(ref)) is ActorDied
        peer.close()


@on_both_loops
async def test_asking_a_node_that_was_declared_down_but_answers_fails_at_once() -> None:
    """The one that is declared down may not know it: it still listens, and welcomes."""
    async with node("a", SOON_DOWN) as a, node("b") as b:
        await b.spawn(Everyman(), "man")
        ref = a.ref("man", str(b.address))
        assert await ask(ref) == "x"
        peer = a._remotes.peer(b.address)
        peer.declare_down()
        cut(a)
        long_down = msgspec.structs.replace(SOON_DOWN, down_after_s=FOR_EVER_S)
        peer.limits = long_down
        assert isinstance(await ask(ref), NodeUnreachable | NodeDown)


@on_both_loops
async def test_an_incarnation_that_somebody_vouches_for_is_let_in_again() -> None:
    """Two nodes whose link was cut for long have declared each other down, and neither has ended."""
    async with node("a", SOON_DOWN) as a, node("b", SOON_DOWN) as b:
        await b.spawn(Everyman(), "man")
        ref = a.ref("man", str(b.address))
        assert await ask(ref) == "x"
        for one, other in ((a, b), (b, a)):
            one._remotes.peer(other.address).declare_down()
        cut(a)
        assert isinstance(await ask(ref), NodeUnreachable | NodeDown)
        living = {(one.address.node, one.address.uid) for one in (a, b)}
        for one in (a, b):
            one.vouch_with(lambda name, uid: (name, uid) in living)
        await until(lambda: a._remotes.peer(b.address).link is None)
        assert await ask(ref) == "x"


@on_both_loops
async def test_a_close_in_the_middle_of_anything_ends_everything_with_typed_errors() -> None:
    for closes_first in ("a", "b"):
        async with pair() as both:
            tasks = [
                asyncio.ensure_future(outcome(both.ref.ask(message, timeout_s=FOR_EVER_S)))
                for message in (HoldAside(), Hold(), Say(text="waits"), Carry(blob=Blob(bytes(32 * MIB))))
            ]
            tasks.append(asyncio.ensure_future(outcome(last_of(both.ref))))
            await both.man.begun.wait()
            await (both.a if closes_first == "a" else both.b).close()
            for task in tasks:
                assert type(await task) in (NodeUnreachable, ActorDied)


async def last_of(ref: ActorRef) -> object:
    """Read a stream to its end."""
    return [item async for item in ref.stream(Count(upto=10**9)) if item == -1]


@on_both_loops
async def test_a_close_in_the_middle_of_a_dial_fails_what_waits_for_it() -> None:
    listener, address = listening()
    with listener:
        async with node("a") as a:
            asks = [asyncio.ensure_future(ask(a.ref("man", address))) for _ in range(3)]
            taken, _ = await asyncio.get_running_loop().sock_accept(listener)
            with taken:
                await a.close()
                for one in asks:
                    assert type(await one) is NodeUnreachable


# Strangers.


@on_both_loops
async def test_an_http_client_and_random_bytes_are_sent_away_and_leave_nothing() -> None:
    chance = random.Random(11)
    strangers = [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\x00", b"\xff" * 10000, handshake_module.PREFACE + b"\xff" * 9]
    strangers += [chance.randbytes(size) for size in (1, 7, 8, 100, 5000)]
    strangers += [handshake_module.PREFACE + chance.randbytes(size) for size in (4, 20, 5000)]
    strangers += [handshake_module.PREFACE + b"\x00\x00\x00\x05" + chance.randbytes(5)]
    async with node("a", msgspec.structs.replace(QUICK, handshake_timeout_s=0.2)) as a, node("b") as b:
        await a.spawn(Everyman(), "man")
        for words in strangers:
            sock = await dialled(str(a.address))
            with sock:
                await asyncio.get_running_loop().sock_sendall(sock, words)
                with suppress(ConnectionError):
                    while await asyncio.get_running_loop().sock_recv(sock, 4096):
                        pass
        assert a.stats().links == ()
        assert await ask(b.ref("man", str(a.address))) == "x"


@on_both_loops
async def test_a_silent_stranger_is_sent_away_and_too_many_find_no_room() -> None:
    limits = msgspec.structs.replace(QUICK, handshake_timeout_s=0.2, max_handshakes=4)
    async with node("a", limits) as a, node("b") as b:
        await a.spawn(Everyman(), "man")
        strangers = [await dialled(str(a.address)) for _ in range(10)]
        for sock in strangers:
            with sock, suppress(ConnectionError):
                assert await asyncio.get_running_loop().sock_recv(sock, 4096) == b""
        await comes_back(b.ref("man", str(a.address)))


@on_both_loops
async def test_a_node_that_accepts_and_stays_silent_is_unreachable_within_the_patience() -> None:
    listener, address = listening()
    with listener:
        async with node("a", msgspec.structs.replace(PATIENT_REDIAL, handshake_timeout_s=0.1)) as a:
            assert isinstance(await ask(a.ref("man", address)), NodeUnreachable)


# Liars: those who shake hands, and then break the rules.


@on_both_loops
async def test_whoever_breaks_a_rule_is_cut_off_and_others_are_not() -> None:
    chance = random.Random(3)
    beats = {
        "random bytes": chance.randbytes(3000),
        "a frame of 4 GiB": b"\xff\xff\xff\xff\xdc",
        "an empty frame": b"\x00\x00\x00\x00\x00",
        "a map": b"\x00\x00\x00\x01\x80",
        "letters that are none": b"\x00\x00\x00\x04\xdc\x00\x01\x05",
        "a chunk of no transfer": bytes.fromhex("0000000f 92 ce00000001 c600000004") + b"abcd",
        "an HTTP request": b"GET / HTTP/1.1\r\n\r\n",
        "a transfer of 1 TiB": frame(b"\x93" + msgspec.msgpack.encode([1, [2**40], 2**40])[1:]),
    }
    async with pair() as both:
        assert await ask(both.ref) == "x"
        for what, words in beats.items():
            liar = await BarePeer.dial(str(both.b.address), "liar", uid=len(what) + 100)
            await liar.send_bytes(words)
            await liar.closed_by_peer()
            liar.close()
            assert await ask(both.ref, what) == what
        assert link_of(both.a, "b").connections == 1


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


@on_both_loops
async def test_answers_to_no_call_break_the_rules_and_late_ones_do_not() -> None:
    async with node("a") as a:
        liar = await BarePeer.dial(str(a.address), "liar")
        ref = a.ref("man", NodeAddress("liar", "", 0))
        asked = asyncio.ensure_future(ask(ref))
        call = (await liar.next_letter(type(asking(1, Say(text=""))))).call
        await liar.send(Answer(call, "first"), Answer(call, "second"), Failure(call, "not_found", "third", None, None))
        assert await asked == "first"
        await liar.send(Item(call, 1), Credit(call, 5), Credit(99, 1))
        await until(lambda: link_of(a, "liar").late_answers == 3, "three late answers")
        assert link_of(a, "liar").open
        await liar.send(Answer(call + 1000, "never asked"))
        await liar.closed_by_peer()
        liar.close()


@on_both_loops
async def test_items_beyond_the_credit_break_the_rules_and_fail_the_stream() -> None:
    async with node("a", msgspec.structs.replace(QUICK, stream_credit=4)) as a:
        liar = await BarePeer.dial(str(a.address), "liar")
        stream = a.ref("man", NodeAddress("liar", "", 0)).stream(Count(upto=1))
        first = asyncio.ensure_future(anext(stream))
        call = (await liar.next_letter(type(opening(1, Say(text=""))))).call
        await liar.send(*(Item(call, k) for k in range(1000)))
        await first
        with pytest.raises(NodeUnreachable):
            async for _ in stream:
                pass
        await liar.closed_by_peer()
        liar.close()


@on_both_loops
async def test_credit_for_nothing_and_calls_of_one_number_break_the_rules() -> None:
    async with node("b") as b:
        for letters in (
            [opening(1, Count(upto=100)), Credit(1, 50)],
            [opening(1, Count(upto=100)), Credit(1, 2**62)],
            [opening(1, Count(upto=100)), Credit(1, -1)],
            [opening(1, Count(upto=100), credit=0)],
            [opening(1, Count(upto=100), credit=-5)],
            [opening(1, Count(upto=100), window_bytes=0)],
            [asking(1, HoldAside()), asking(1, HoldAside())],
            [asking(1, HoldAside()), opening(1, Count(upto=100))],
        ):
            man = Everyman()
            await b.spawn(man, "man")
            liar = await BarePeer.dial(str(b.address), "liar", uid=random.Random(str(letters)).randrange(1, 2**60))
            await liar.send(*letters)
            await liar.closed_by_peer()
            liar.close()
            await until(lambda: link_of(b, "liar").running_calls == 0, "nothing runs for the liar")
            await b.stop("man")


@on_both_loops
async def test_what_a_peer_that_never_reads_is_asked_is_bounded_and_others_are_not_affected() -> None:
    async with pair() as both:
        deaf = await BarePeer.dial(str(both.a.address), "deaf")
        ref = both.a.ref("man", NodeAddress("deaf", "", 0))
        asks: list[asyncio.Task[object]] = []
        refused: object = None
        while not isinstance(refused, LinkFull):
            asks.append(asyncio.ensure_future(outcome(ref.ask(Say(text="x" * 10 * KIB), timeout_s=FOR_EVER_S))))
            await asyncio.sleep(0)
            refused = asks[-1].result() if asks[-1].done() else None
            assert len(asks) < 10_000
        assert refused.retry_after_s is not None
        assert link_of(both.a, "deaf").waiting_bytes < 2 * MIB
        assert await ask(both.ref) == "x"
        assert type(await outcome(anext(ref.stream(Count(upto=1))))) is LinkFull
        ref.tell(Say(text="dropped"))
        assert both.a.dead_letters == 1
        deaf.close()
        for one in asks[:-1]:
            assert type(await one) in (NodeUnreachable, LinkFull)


@on_both_loops
async def test_what_waits_behind_a_blob_for_a_peer_that_never_reads_is_bounded() -> None:
    async with node("a", msgspec.structs.replace(QUICK, link_blob_bytes=16 * MIB)) as a:
        deaf = await BarePeer.dial(str(a.address), "deaf")
        ref = a.ref("man", NodeAddress("deaf", "", 0))
        ref.tell(Carry(blob=Blob(bytes(12 * MIB))))
        for _ in range(40):
            ref.tell(Carry(blob=Blob(bytes(3 * MIB))))
            for _ in range(300):
                ref.tell(Say(text="x" * KIB))
            await asyncio.sleep(0)
        assert link_of(a, "deaf").waiting_bytes < 20 * MIB
        assert a.dead_letters > 0
        more = ref.ask(Carry(blob=Blob(bytes(3 * MIB))), timeout_s=FOR_EVER_S)
        assert type(await outcome(more)) is LinkFull
        deaf.close()


@on_both_loops
async def test_answers_to_a_peer_that_asks_and_never_reads_are_bounded() -> None:
    async with pair() as both:
        deaf = await BarePeer.dial(str(both.b.address), "deaf")

        async def ask_on() -> None:
            for number in range(1, 2001):
                await deaf.send(asking(number, Say(text="x" * 30 * KIB)))

        asking_on = asyncio.ensure_future(outcome(ask_on()))
        most = 0
        while len(both.man.seen) < 1000 and not asking_on.done():
            most = max(most, link_of(both.b, "deaf").waiting_bytes)
            if await ask(both.ref) == "x" and most > 8 * MIB:
                break
        asking_on.cancel()
        with suppress(asyncio.CancelledError, OSError):
            await asking_on
        deaf.close()
        assert most < 4 * MIB


@on_both_loops
async def test_a_stream_to_a_peer_that_never_reads_waits_and_ends_with_it() -> None:
    async with pair() as both:
        deaf = await BarePeer.dial(str(both.b.address), "deaf")
        await deaf.send(opening(1, Count(upto=10**6, text_bytes=32 * KIB), credit=10**6, window_bytes=2**40))
        await both.man.begun.wait()
        made = -1
        while made != both.man.made:
            made = both.man.made
            for _ in range(5):
                assert await ask(both.ref) == "x"
        assert 0 < made < 1000
        assert link_of(both.b, "deaf").waiting_bytes < 2 * MIB
        deaf.close()
        await both.man.cancelled.wait()


@on_both_loops
async def test_a_silent_peer_is_dropped_by_the_failure_detector_and_a_living_one_is_not() -> None:
    async with pair(a_limits=WATCHFUL) as both:
        deaf = await BarePeer.dial(str(both.a.address), "deaf")
        assert await ask(both.ref) == "x"
        asked = await ask(both.a.ref("man", NodeAddress("deaf", "", 0)))
        assert type(asked) is NodeUnreachable
        assert "silent" in asked.message
        await deaf.closed_by_peer()
        deaf.close()
        assert await ask(both.ref) == "x"
        assert link_of(both.a, "b").connections == 1


@on_both_loops
async def test_who_knows_the_cluster_is_told_who_fell_silent_and_nobody_waits_for_that_one_to_shake_hands() -> None:
    silent, heard = list[tuple[str, str]](), list[str]()
    listener, address = listening("hung")
    endpoint = address.partition("@")[2]
    async with node("a", WATCHFUL) as a:
        a.hear_of_silence(lambda name, where: silent.append((name, where)), heard.append)
        ref = a.ref("man", address)
        asked = asyncio.ensure_future(ask(ref))
        hung = await BarePeer.answer(listener, "hung", endpoint=endpoint)
        assert type(await asked) is NodeUnreachable
        assert (silent, heard) == ([("hung", endpoint)], ["hung"])
        assert link_of(a, "hung").silences == 1
        # Its machine goes on to accept connections, over which nobody says hello.
        assert type(await ask(ref)) is NodeUnreachable
        hung.close()
        hung = await BarePeer.answer(listener, "hung", endpoint=endpoint)
        await until(lambda: heard == ["hung", "hung"])
        hung.close()
    listener.close()


@on_both_loops
async def test_a_node_that_was_busy_itself_does_not_blame_its_peers() -> None:
    limits = Limits(heartbeat_s=0.02, acceptable_pause_s=0.02, redial_first_s=0.002)
    async with pair(a_limits=limits) as both:
        assert await ask(both.ref) == "x"
        for _ in range(3):
            block_the_loop(0.3)
            assert await ask(both.ref) == "x"
        assert link_of(both.a, "b").connections == 1


def block_the_loop(duration_s: float) -> None:
    """Do nothing else for so long, as a long computation would."""
    left, right = socket.socketpair()
    with left, right:
        left.settimeout(duration_s)
        with suppress(TimeoutError):
            left.recv(1)


@on_both_loops
async def test_a_peer_that_hangs_up_while_its_calls_run_cancels_them() -> None:
    async with node("b") as b:
        man = Everyman()
        await b.spawn(man, "man")
        peer = await BarePeer.dial(str(b.address))
        await peer.send(
            asking(1, HoldAside()), asking(2, Hold()), asking(3, Say(text="never")), opening(4, Count(upto=9))
        )
        await man.begun.wait()
        peer.close()
        await until(lambda: link_of(b, "bare").running_calls == 0)
        await man.cancelled.wait()
        man.gate.set()
        assert await ask(b.ref("man"), "alive") == "alive"
        assert "never" not in man.seen
