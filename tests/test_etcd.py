"""etcd itself in trouble: members killed and held up, no quorum, answers lost, tokens that expire, TLS."""

from __future__ import annotations

import asyncio
import http.client
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme
from metadata_stores import HASTY, PATIENT, UNPACKED, ask_etcd, b64, etcd_store, values, watched, wipe
from raw_server import RawServer, Request

from sllm_actor.errors import (
    ConfigInvalid,
    MetadataFailed,
    MetadataInvalid,
    MetadataRefused,
    MetadataUnavailable,
    MetadataUncertain,
)
from sllm_actor.metadata import Absent, EtcdStore, Put, Store, StoreLimits, Unchanged
from sllm_actor.metadata.etcd_address import client_tls, parse_endpoints
from sllm_actor.testing.etcd import EtcdCluster, running_etcd


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with running_etcd(tmp_path_factory.mktemp("one"), UNPACKED) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    """Three members; each test leaves all of them running."""
    with running_etcd(tmp_path_factory.mktemp("three"), UNPACKED, members=3) as cluster:
        yield cluster


@asynccontextmanager
async def store_of(cluster: EtcdCluster, limits: StoreLimits = HASTY) -> AsyncIterator[EtcdStore]:
    store = etcd_store(cluster.url(), limits)
    try:
        await wipe(store)
        yield store
    finally:
        await store.close()


async def until_it_answers(store: Store) -> None:
    """Ask until the cluster has a leader again."""
    for _ in range(20):
        try:
            await store.get("any")
        except MetadataUnavailable:
            continue
        return
    raise AssertionError("it does not come back")


class LossyGateway:
    """Stands before a member and loses requests before they are carried out, or answers after they were."""

    def __init__(self, member_port: int) -> None:
        self._member_port = member_port
        self.lose_requests: list[str] = []
        self.lose_answers: list[str] = []
        # Answered as a member does that is being stopped.
        self.leaving: list[str] = []
        self.server = RawServer(self._relay)

    def _relay(self, request: Request) -> None:
        body = request.raw.split(b"\r\n\r\n", 1)[1]
        while len(body) < int(request.headers["content-length"]):
            body += request.client.recv(65536)
        if request.path in self.lose_requests:
            self.lose_requests.remove(request.path)
            request.reset()
            return
        if request.path in self.leaving:
            self.leaving.remove(request.path)
            request.reply(408, {}, b'{"code": 1, "message": "grpc: the client connection is closing"}')
            return
        if request.path == "/v3/watch":
            request.reset()  # It gives whole answers only; a watch has none.
            return
        member = http.client.HTTPConnection("127.0.0.1", self._member_port, timeout=30)
        member.request("POST", request.path, body)
        answer = member.getresponse()
        given = answer.read()
        member.close()
        if request.path in self.lose_answers:
            self.lose_answers.remove(request.path)
            request.reset()
            return
        request.reply(answer.status, {}, given)


@asynccontextmanager
async def behind_a_lossy_gateway(one: EtcdCluster) -> AsyncIterator[tuple[EtcdStore, LossyGateway]]:
    gateway = LossyGateway(one.member.port)
    with gateway.server:
        store = etcd_store(f"etcd://127.0.0.1:{gateway.server.port}", PATIENT)
        await wipe(store)
        yield store, gateway
        await store.close()


async def test_a_member_that_is_leaving_costs_a_retry_and_a_watch_goes_on_elsewhere(one: EtcdCluster) -> None:
    gateway = LossyGateway(one.member.port)
    gateway.leaving += ["/v3/kv/txn", "/v3/kv/range", "/v3/watch"]
    with gateway.server:
        store = etcd_store(f"etcd://127.0.0.1:{gateway.server.port},127.0.0.1:{one.member.port}", PATIENT)
        while gateway.leaving:
            revision = await store.put("a", b"1")
            assert (await store.get("a")) is not None
            assert values(await watched(store, "a", revision, 1)) == [("a", b"1")]
        await store.close()


@pytest.mark.parametrize("lost", ["lose_requests", "lose_answers"])
async def test_a_write_whose_request_or_answer_is_lost_is_made_once(one: EtcdCluster, lost: str) -> None:
    async with behind_a_lossy_gateway(one) as (store, gateway):
        start = await store.put("a", b"0")
        getattr(gateway, lost).extend(["/v3/kv/txn"] * 2)
        outcome = await store.commit([Unchanged("a", start)], [Put("a", b"1")])
        assert outcome.done
        getattr(gateway, lost).append("/v3/kv/txn")
        revision = await store.put("a", b"2")
        getattr(gateway, lost).append("/v3/kv/txn")
        assert await store.delete("a")
        assert gateway.lose_requests == gateway.lose_answers == []
        async with opened_directly(one) as direct:
            found = await watched(direct, "a", start, 4)
        assert values(found) == [("a", b"0"), ("a", b"1"), ("a", b"2"), ("a", None)]
        assert [changes.revision for changes in found[1:3]] == [outcome.revision, revision]


@asynccontextmanager
async def opened_directly(one: EtcdCluster) -> AsyncIterator[EtcdStore]:
    store = etcd_store(one.url())
    try:
        yield store
    finally:
        await store.close()


async def test_a_refusal_whose_answer_is_lost_stays_a_refusal(one: EtcdCluster) -> None:
    async with behind_a_lossy_gateway(one) as (store, gateway):
        await store.put("a", b"0")
        gateway.lose_answers.extend(["/v3/kv/txn"] * 2)
        outcome = await store.commit([Absent("a")], [Put("a", b"1")])
        assert not outcome.done
        fact = outcome.fact("a")
        assert fact is not None and fact.value == b"0"


async def test_a_lease_whose_grant_is_answered_late_is_granted_once(one: EtcdCluster) -> None:
    async with behind_a_lossy_gateway(one) as (store, gateway):
        gateway.lose_answers.append("/v3/lease/grant")
        lease = await store.grant(60)
        await store.put("a", b"", lease.id)
        gateway.lose_answers.extend(["/v3/lease/keepalive", "/v3/lease/revoke"])
        await store.keep_alive(lease.id)
        await store.revoke(lease.id)
        assert await store.get("a") is None


async def test_a_write_of_which_nothing_is_heard_is_uncertain_and_a_read_is_not(one: EtcdCluster) -> None:
    async with behind_a_lossy_gateway(one) as (patient, gateway):
        store = etcd_store(f"etcd://127.0.0.1:{gateway.server.port}", StoreLimits(call_timeout_s=1.0))
        await store.put("a", b"0")
        gateway.lose_answers.extend(["/v3/kv/txn"] * 1000)
        with pytest.raises(MetadataUncertain):
            await store.put("a", b"1")
        gateway.lose_answers.clear()
        gateway.lose_answers.extend(["/v3/kv/range"] * 1000)
        with pytest.raises(MetadataUnavailable):
            await store.get("a")
        gateway.lose_answers.clear()
        fact = await patient.get("a")
        assert fact is not None and fact.value == b"1"
        await store.close()


async def test_a_write_that_was_never_sent_is_certain_not_to_have_been_made() -> None:
    with RawServer(lambda request: request.hold()) as gone:
        url = f"etcd://127.0.0.1:{gone.port}"
    store = etcd_store(url, StoreLimits(call_timeout_s=0.5))
    with pytest.raises(MetadataUnavailable) as unavailable:
        await store.put("a", b"1")
    assert not isinstance(unavailable.value, MetadataUncertain)
    await store.close()


async def test_a_member_that_is_killed_costs_a_retry_and_a_watch_misses_nothing(three: EtcdCluster) -> None:
    async with store_of(three) as store:
        revision = (await store.list("")).revision
        watch = asyncio.ensure_future(watched(store, "k/", revision + 1, 12))
        for member in three.members:
            for k in range(4):
                if k == 1:
                    member.kill()
                await _put_anew(store, f"k/{member.name}{k}")
            await asyncio.to_thread(three.start, member)
        found = values(await watch)
        assert found == [(f"k/{member.name}{k}", b"") for member in three.members for k in range(4)]


async def _put_anew(store: Store, key: str) -> None:
    """Put a key, also where a call's patience ends during an election."""
    while True:
        try:
            await store.commit([Absent(key)], [Put(key, b"")])
        except MetadataUnavailable:
            continue
        return


async def test_a_member_that_is_held_up_costs_a_retry_and_what_it_holds_is_not_made_later(three: EtcdCluster) -> None:
    async with store_of(three) as store:
        for member in three.members:
            start = (await store.list("")).revision
            await store.put("a", b"before")
            member.hold_up()
            try:
                for value in (b"1", b"2", b"3"):
                    await _until_put(store, "a", value)
            finally:
                member.go_on()
            await asyncio.to_thread(three.wait_for, member)
            alone = etcd_store(f"etcd://127.0.0.1:{member.port}")
            assert await alone.put("a", b"after")
            found = [value for _, value in values(await watched(alone, "a", start + 1, 5))]
            assert found == [b"before", b"1", b"2", b"3", b"after"]
            await alone.close()


async def _until_put(store: Store, key: str, value: bytes) -> None:
    known = await _got(store, key)
    while True:
        try:
            await store.commit([Unchanged(key, known)], [Put(key, value)])
        except MetadataUnavailable:
            continue
        return


async def _got(store: Store, key: str) -> int:
    while True:
        try:
            fact = await store.get(key)
        except MetadataUnavailable:
            continue
        assert fact is not None
        return fact.changed


async def test_without_a_quorum_nothing_is_read_or_written_and_with_one_it_goes_on(three: EtcdCluster) -> None:
    async with store_of(three, StoreLimits(call_timeout_s=1, attempt_timeout_s=0.4)) as store:
        revision = await store.put("a", b"before")
        watch = asyncio.ensure_future(watched(store, "a", revision + 1, 1))
        lost = three.members[1:]
        for member in lost:
            member.kill()
        with pytest.raises(MetadataUnavailable):
            await store.get("a")
        with pytest.raises(MetadataUnavailable):
            await store.list("")
        with pytest.raises(MetadataUnavailable):
            await store.grant(60)
        with pytest.raises(MetadataUnavailable):
            await store.commit([Unchanged("a", revision)], [Put("b", b"")])
        assert not watch.done()
        await asyncio.to_thread(three.start, *lost)
        await until_it_answers(store)
        fact = await store.get("a")
        assert fact is not None and fact.value == b"before"
        await store.put("a", b"after")
        assert values(await watch) == [("a", b"after")]


async def test_answers_over_the_bound_are_refused_and_listings_come_in_smaller_pages(one: EtcdCluster) -> None:
    small = StoreLimits(answer_bytes=20_000, page_facts=8)
    async with store_of(one, small) as store:
        for k in range(8):
            await store.put(f"k{k}", bytes(5_000))
        assert len((await store.list("k")).facts) == 8
        await store.put("big", bytes(30_000))
        with pytest.raises(MetadataFailed, match="more than 20000 bytes"):
            await store.get("big")
        with pytest.raises(MetadataFailed, match="more than 20000 bytes"):
            await store.list("")
        for key in ("big", *(f"k{k}" for k in range(8))):
            await store.delete(key)
    async with store_of(one, StoreLimits(listing_facts=3, page_facts=2)) as store:
        for k in range(4):
            await store.put(f"k{k}", b"")
        with pytest.raises(MetadataFailed, match="more than 3 facts"):
            await store.list("k")
        assert len((await store.list("k3")).facts) == 1


@pytest.mark.parametrize("body", [b"no JSON", b"[]", b'{"kvs":[{"key":"%"}]}', b'{"kvs":7}', b"\xff"])
async def test_what_is_no_etcd_gives_a_typed_error(body: bytes) -> None:
    with RawServer(lambda request: request.reply(200, {}, body)) as server:
        store = etcd_store(f"etcd://127.0.0.1:{server.port}", HASTY)
        with pytest.raises(MetadataFailed, match="does not answer as etcd does"):
            await store.get("a")
        with pytest.raises(MetadataFailed):
            await store.put("a", b"")
        await store.close()


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[EtcdCluster]:
    """A cluster that wants users to log in."""
    with running_etcd(tmp_path, UNPACKED) as cluster:
        ask_etcd(cluster, "/v3/auth/user/add", {"name": "root", "password": "of all"})
        ask_etcd(cluster, "/v3/auth/role/add", {"name": "root"})
        ask_etcd(cluster, "/v3/auth/role/add", {"name": "reader"})
        permission = {"permType": "READ", "key": b64(b"sllm/"), "range_end": b64(b"sllm0")}
        ask_etcd(cluster, "/v3/auth/role/grant", {"name": "reader", "perm": permission})
        ask_etcd(cluster, "/v3/auth/user/grant", {"user": "root", "role": "root"})
        ask_etcd(cluster, "/v3/auth/user/add", {"name": "guest", "password": "of some"})
        ask_etcd(cluster, "/v3/auth/user/grant", {"user": "guest", "role": "reader"})
        ask_etcd(cluster, "/v3/auth/enable", {})
        yield cluster


def forget_tokens(guarded: EtcdCluster, token: str) -> None:
    ask_etcd(guarded, "/v3/auth/disable", {}, token)
    ask_etcd(guarded, "/v3/auth/enable", {})


async def test_a_user_logs_in_anew_when_the_token_is_no_longer_taken(guarded: EtcdCluster) -> None:
    store = etcd_store(guarded.url(), user="root", password="of all")
    revision = await store.put("a", b"1")
    token = store._client._token
    assert token
    await asyncio.to_thread(forget_tokens, guarded, token)
    await store.put("a", b"2")
    assert store._client._token not in ("", token)
    token = store._client._token
    await asyncio.to_thread(forget_tokens, guarded, token)
    assert values(await watched(store, "a", revision, 2)) == [("a", b"1"), ("a", b"2")]
    assert store._client._token != token
    await store.close()


async def test_who_has_no_password_a_wrong_one_or_no_right_is_refused(guarded: EtcdCluster) -> None:
    for user, password in (("", ""), ("root", "wrong"), ("nobody", "x")):
        store = etcd_store(guarded.url(), user=user, password=password)
        with pytest.raises(MetadataRefused):
            await store.get("a")
        with pytest.raises(MetadataRefused):
            await anext(store.watch("a", 1))
        await store.close()
    guest = etcd_store(guarded.url(), user="guest", password="of some")
    assert await guest.get("a") is None
    with pytest.raises(MetadataRefused):
        await guest.put("a", b"")
    assert await guest.get("a") is None
    await guest.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEM files of an authority, a server, a client, and of somebody else's authority."""
    folder = tmp_path_factory.mktemp("certificates")
    authority, stranger = trustme.CA(), trustme.CA()
    for name, issued in (("server", authority.issue_cert("127.0.0.1")), ("client", authority.issue_cert("node-1"))):
        issued.private_key_and_cert_chain_pem.write_to_path(folder / f"{name}.pem")
    authority.cert_pem.write_to_path(folder / "authority.pem")
    stranger.cert_pem.write_to_path(folder / "stranger.pem")
    return folder


async def test_over_tls_both_sides_prove_themselves(certificates: Path, tmp_path: Path) -> None:
    at = certificates
    options = [
        f"--cert-file={at}/server.pem", f"--key-file={at}/server.pem",
        f"--trusted-ca-file={at}/authority.pem", "--client-cert-auth",
    ]  # fmt: skip
    client = str(at / "client.pem")

    def tls(authority: str, certificate: str = "") -> ssl.SSLContext:
        return client_tls(str(at / authority), certificate)

    with running_etcd(tmp_path, UNPACKED, options=options) as cluster:
        known = etcd_store(cluster.url("etcds"), tls=tls("authority.pem", client))
        revision = await known.put("a", b"1")
        assert values(await watched(known, "a", revision, 1)) == [("a", b"1")]
        await known.close()
        for wrong in (tls("stranger.pem", client), tls("authority.pem")):
            store = etcd_store(cluster.url("etcds"), StoreLimits(call_timeout_s=0.5), tls=wrong)
            with pytest.raises((MetadataRefused, MetadataUnavailable)):
                await store.get("a")
            await store.close()
        unencrypted = etcd_store(cluster.url("etcd"), StoreLimits(call_timeout_s=0.5))
        with pytest.raises(MetadataFailed):
            await unencrypted.get("a")
        await unencrypted.close()


def test_an_address_names_hosts_with_their_ports_and_nothing_else(certificates: Path) -> None:
    urls = parse_endpoints("etcd://a:2379,[::1]:2380")
    assert [str(url) for url in urls] == ["http://a:2379", "http://[::1]:2380"]
    assert parse_endpoints("etcds://a:1")[0].scheme == "https"
    for text in (
        "", "etcd://", "a:1", "http://a:1", "etcd://a", "etcd://a:1,", "etcd://a:1/path", "etcd://u:p@a:1", "etcd://a:x",
        "etcd://a:1?q", "etcd://a:1#f", "etcd://" + ",".join(["a:1"] * 17),
    ):  # fmt: skip
        with pytest.raises(ConfigInvalid):
            parse_endpoints(text)
    for authority, certificate in ((certificates / "absent.pem", ""), (certificates / "authority.pem", __file__)):
        with pytest.raises(ConfigInvalid):
            client_tls(str(authority), str(certificate))


async def test_what_is_out_of_bounds_is_not_even_sent() -> None:
    with RawServer(lambda request: request.hold()) as silent:
        store = etcd_store(f"etcd://127.0.0.1:{silent.port}", HASTY)
        with pytest.raises(MetadataInvalid):
            await store.put("", b"")
        assert silent.asked == []
        await store.close()
