"""Connections between nodes over mutual TLS 1.3, where the certificate proves the node's id."""

from __future__ import annotations

import asyncio
import ssl
import tempfile
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress

import msgspec
import pytest
import trustme
from remote_pairs import (
    FOR_EVER_S,
    KIB,
    MIB,
    QUICK,
    SECRET,
    BarePeer,
    BlobStream,
    Carry,
    Count,
    Everyman,
    HoldAside,
    Say,
    dialled,
    link_of,
    node,
    on_both_loops,
    outcome,
)

from sllm_actor.errors import ConfigInvalid, NodeMismatch, NodeUnreachable, SecretMismatch, SllmError
from sllm_actor.runtime import ActorRef, ActorSystem, Blob, Limits, Security

# Keys take a while to make: the authorities and the certificates of all tests are made once.
AUTHORITY = trustme.CA()
OTHER_AUTHORITY = trustme.CA()
CERTIFICATES = {name: AUTHORITY.issue_cert(name) for name in ("a", "b", "c")}
# Short, because some clients wait for the other side to give up.
LIMITS = msgspec.structs.replace(QUICK, handshake_timeout_s=1.0, max_handshakes=4)


def tls(
    name: str, *, ours: trustme.LeafCert | None = None, trusts: trustme.CA = AUTHORITY, secret: bytes = b""
) -> Security:
    """Read a node's certificate from files, as a node does."""
    leaf = ours or CERTIFICATES[name]
    with tempfile.TemporaryDirectory() as folder:
        leaf.private_key_pem.write_to_path(f"{folder}/key")
        for blob in leaf.cert_chain_pems:
            blob.write_to_path(f"{folder}/certificate", append=True)
        trusts.cert_pem.write_to_path(f"{folder}/authority")
        return Security.with_tls(
            certificate=f"{folder}/certificate", key=f"{folder}/key", authority=f"{folder}/authority", secret=secret
        )


@asynccontextmanager
async def secured(name: str, security: Security | None = None, limits: Limits = LIMITS) -> AsyncIterator[ActorSystem]:
    async with node(name, limits, security=security or tls(name)) as system:
        await system.spawn(Everyman(), "man")
        yield system


async def ask(ref: ActorRef, text: str = "x") -> object:
    return await outcome(ref.ask(Say(text=text), timeout_s=FOR_EVER_S))


def at(system: ActorSystem, other: ActorSystem) -> ActorRef:
    return system.ref("man", str(other.address))


@on_both_loops
async def test_asks_streams_and_blobs_go_over_tls() -> None:
    async with secured("a") as a, secured("b") as b:
        ref = at(a, b)
        assert await ask(ref) == "x"
        assert [item async for item in ref.stream(Count(upto=1000))] == list(range(1000))
        data = bytes(range(256)) * 12 * KIB
        answer = await ref.ask(Carry(blob=Blob(data)), timeout_s=FOR_EVER_S)
        assert bytes(answer.blob.data) == data
        blobs = [item async for item in ref.stream(BlobStream(count=10, size_bytes=300 * KIB))]
        assert [bytes(item.blob.data) for item in blobs] == [bytes([k]) * 300 * KIB for k in range(10)]
        assert await ask(at(b, a)) == "x"
        assert link_of(a, "b").connections == link_of(b, "a").connections == 1


@on_both_loops
async def test_cancelling_closing_and_ending_work_over_tls() -> None:
    async with secured("a") as a, secured("b") as b:
        ref = at(a, b)
        async with aclosing(ref.stream(Count(upto=10**9))) as numbers:
            assert await anext(numbers) == 0
        ended = asyncio.ensure_future(ref.ended())
        held = asyncio.ensure_future(outcome(ref.ask(HoldAside(), timeout_s=FOR_EVER_S)))
        large = asyncio.ensure_future(outcome(ref.ask(Carry(blob=Blob(bytes(16 * MIB))), timeout_s=FOR_EVER_S)))
        await ask(ref)
        await b.close()
        for one in (held, large):
            result = await one
            assert isinstance(result, SllmError) or len(result.blob) == 16 * MIB
        assert (await ended).reason in ("stopped", "node_down")


@on_both_loops
async def test_nodes_that_dial_each_other_at_once_over_tls_end_with_one_connection() -> None:
    for _ in range(5):
        async with secured("a") as a, secured("b") as b:
            answers = await asyncio.gather(*(ask(ref, str(k)) for k in range(5) for ref in (at(a, b), at(b, a))))
            assert answers == [str(k) for k in range(5) for _ in "ab"]
            assert link_of(a, "b").connections == link_of(b, "a").connections == 1


@on_both_loops
async def test_tls_and_a_secret_go_together() -> None:
    async with secured("a", tls("a", secret=SECRET)) as a, secured("b", tls("b", secret=SECRET)) as b:
        assert await ask(at(a, b)) == "x"
        async with secured("c", tls("c", secret=b"another secret, as long")) as c:
            assert type(await ask(at(c, a))) is SecretMismatch


@on_both_loops
async def test_a_certificate_for_another_node_is_refused_on_both_sides() -> None:
    async with secured("a") as a, secured("b", tls("b", ours=CERTIFICATES["c"])) as impostor:
        assert type(await ask(at(impostor, a))) is NodeMismatch
        assert type(await ask(at(a, impostor))) is NodeMismatch
        assert [link.open for link in a.stats().links] == [False]


@on_both_loops
async def test_a_certificate_of_another_authority_is_refused_on_both_sides() -> None:
    stranger = tls("b", ours=OTHER_AUTHORITY.issue_cert("b"))
    async with secured("a") as a, secured("b", stranger) as b:
        assert type(await ask(at(a, b))) is NodeUnreachable
        assert type(await ask(at(b, a))) is NodeUnreachable
    trusts_another = tls("b", trusts=OTHER_AUTHORITY)
    async with secured("a") as a, secured("b", trusts_another) as b:
        assert type(await ask(at(a, b))) is NodeUnreachable
        assert type(await ask(at(b, a))) is NodeUnreachable


@on_both_loops
async def test_a_client_without_a_certificate_is_refused() -> None:
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    AUTHORITY.configure_trust(client)
    whole = tls("b")
    async with secured("a") as a, secured("b", Security(server_tls=whole.server_tls, client_tls=client)) as b:
        assert type(await ask(at(b, a))) is NodeUnreachable
        assert not a.stats().links


@on_both_loops
async def test_an_older_tls_is_refused() -> None:
    whole = tls("b")
    assert whole.client_tls is not None
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname = False
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    CERTIFICATES["b"].configure_cert(old)
    AUTHORITY.configure_trust(old)
    async with secured("a") as a, secured("b", Security(server_tls=whole.server_tls, client_tls=old)) as b:
        assert type(await ask(at(b, a))) is NodeUnreachable


@on_both_loops
async def test_plain_nodes_and_tls_nodes_do_not_understand_each_other() -> None:
    async with secured("a") as a, secured("plain", Security()) as plain:
        assert isinstance(await ask(at(plain, a)), SllmError)
        assert isinstance(await ask(at(a, plain)), SllmError)
        assert not [link for link in (*a.stats().links, *plain.stats().links) if link.open]


@on_both_loops
async def test_failed_tls_handshakes_leave_room_for_those_who_belong_here() -> None:
    async with secured("a") as a:
        for _ in range(10):
            with pytest.raises((SllmError, OSError)):
                await BarePeer.dial(str(a.address))
        strangers = [await dialled(str(a.address)) for _ in range(10)]
        for sock in strangers:
            await asyncio.get_running_loop().sock_sendall(sock, b"GET / HTTP/1.1\r\n\r\n")
            with sock, suppress(OSError):
                while await asyncio.get_running_loop().sock_recv(sock, 4096):
                    pass
        async with secured("b") as b:
            # Those that failed keep their places until the patience for a handshake is over.
            while await ask(at(b, a)) != "x":
                await asyncio.sleep(0.01)


@on_both_loops
async def test_a_silent_stranger_at_a_tls_port_is_sent_away() -> None:
    impatient = msgspec.structs.replace(QUICK, handshake_timeout_s=0.2)
    async with secured("a", limits=impatient) as a:
        with await dialled(str(a.address)) as sock, suppress(ConnectionError):
            assert await asyncio.get_running_loop().sock_recv(sock, 4096) == b""


@on_both_loops
async def test_closing_leaves_no_stranger_at_a_tls_port_behind() -> None:
    async with secured("a") as a:
        sock = await dialled(str(a.address))
        async with secured("b") as b:
            assert await ask(at(b, a)) == "x"
    with sock, suppress(ConnectionError):
        assert await asyncio.get_running_loop().sock_recv(sock, 4096) == b""


def test_tls_files_that_can_not_be_used_are_a_typed_error() -> None:
    with tempfile.TemporaryDirectory() as folder:
        AUTHORITY.cert_pem.write_to_path(f"{folder}/authority")
        CERTIFICATES["a"].private_key_pem.write_to_path(f"{folder}/key")
        CERTIFICATES["b"].cert_chain_pems[0].write_to_path(f"{folder}/other")
        for certificate in ("absent", "key", "other"):
            with pytest.raises(ConfigInvalid):
                Security.with_tls(
                    certificate=f"{folder}/{certificate}", key=f"{folder}/key", authority=f"{folder}/authority"
                )
    with pytest.raises(ConfigInvalid, match="both directions"):
        Security(server_tls=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    with pytest.raises(ConfigInvalid, match="16 bytes"):
        Security(secret=b"short")
