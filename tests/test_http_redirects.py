"""Where an HTTP source lets itself be led: its own origin, hosts that are allowed, and no private address."""

from __future__ import annotations

import base64
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from raw_server import RawServer, Request
from sources import FILES, OPTIONS, WEIGHTS, Names, model_file, opened, origin, read

from sllm_actor.errors import SourceMissing, SourceRefused, SourceUnreachable, SourceViolation
from sllm_actor.sources.addresses import CheckedResolver, is_private, is_private_host
from sllm_actor.sources.http import HttpSource
from sllm_actor.sources.source import SourceOptions


def only_first_is_private(address: str) -> bool:
    """In these tests 127.0.0.1 is a private address and 127.0.0.2 a public one."""
    return address == "127.0.0.1"


def to(location: Callable[[], object], status: int = 302) -> Callable[[Request], None]:
    def answer(request: Request) -> None:
        name = request.path.rpartition("/")[2]
        request.reply(status, {"Location": location()}) if name in FILES else request.reply(404)

    return answer


def options(*hosts: str, private: bool = False) -> SourceOptions:
    return SourceOptions(redirect_hosts=hosts, allow_private_redirects=private)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_within_the_origin_is_followed_with_credentials(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))

    def moved(request: Request) -> None:
        if request.path.startswith("/old/"):
            request.reply(status, {"Location": request.path.replace("/old/", "../m/")})
        else:
            origin()(request)

    with RawServer(moved) as server:
        async with opened(HttpSource(f"{server.url}/old/", OPTIONS)) as source:
            assert sorted(file.name for file in await source.files()) == sorted(FILES)
            assert await read(source, model_file(), 5, 10) == WEIGHTS[5:15]
            assert await read(source, model_file(), 15, 10) == WEIGHTS[15:25]
            expected = "Basic " + base64.b64encode(b"a:b").decode()
            assert {request.headers["authorization"] for request in server.asked} == {expected}
            # The way is asked for once for a file.
            assert len(server.asked_for("/old/model.safetensors")) == 1


async def test_another_host_is_refused_by_name_unless_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("default login a password b")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with RawServer(origin(), "127.0.0.2") as other, RawServer(to(lambda: f"{other.url}/m/model.safetensors")) as server:
        refused = (options(), options("127.0.0.3"), options(f"127.0.0.2:{other.port + 1}"), options("0.0.2"))
        for refusing in refused:
            async with opened(HttpSource(f"{server.url}/m/", refusing)) as source:
                with pytest.raises(SourceRefused, match=rf"redirects to {other.url}.*not among the hosts allowed"):
                    await read(source, model_file(), 0, 10)
        assert not other.asked
        for allowing in (options("127.0.0.2"), options(f"127.0.0.2:{other.port}")):
            async with opened(HttpSource(f"{server.url}/m/", allowing)) as source:
                assert await read(source, model_file(), 0, 10) == WEIGHTS[:10]
        assert all("authorization" in request.headers for request in server.asked)
        assert other.asked and all("authorization" not in request.headers for request in other.asked)


async def test_another_port_of_the_same_host_is_another_origin() -> None:
    with RawServer(origin()) as other, RawServer(to(lambda: f"{other.url}/m/model.safetensors")) as server:
        async with opened(HttpSource(f"{server.url}/m/", OPTIONS)) as source:
            with pytest.raises(SourceRefused, match="not among the hosts allowed"):
                await read(source, model_file(), 0, 10)
        assert not other.asked


@pytest.mark.parametrize("named", [True, False])
async def test_a_private_address_is_refused_unless_it_is_allowed(named: bool) -> None:
    """By its number, and by a name that resolves to it; the first request went to a public host."""
    with RawServer(origin()) as inner:
        host = "cdn.test" if named else "127.0.0.1"
        with RawServer(to(lambda: f"http://{host}:{inner.port}/m/model.safetensors"), "127.0.0.2") as server:

            def source_of(given: SourceOptions) -> HttpSource:
                names = Names(models_test=["127.0.0.2"], cdn_test=["127.0.0.1"])
                url = f"http://models.test:{server.port}/m/"
                return HttpSource(url, given, resolver=names, private=only_first_is_private)

            async with opened(source_of(options(host))) as source:
                with pytest.raises(SourceRefused, match=r"private address 127\.0\.0\.1"):
                    await read(source, model_file(), 0, 10)
                with pytest.raises(SourceRefused, match=r"private address 127\.0\.0\.1"):
                    await source.files()
            assert not inner.asked
            async with opened(source_of(options(host, private=True))) as source:
                assert await read(source, model_file(), 0, 10) == WEIGHTS[:10]
            assert inner.asked


async def test_one_private_address_among_public_ones_is_refused() -> None:
    names = Names(cdn_test=["127.0.0.2 127.0.0.1"])
    with pytest.raises(SourceRefused, match=r"cdn\.test, which has the private address 127\.0\.0\.1"):
        await CheckedResolver(names, only_first_is_private).resolve("cdn.test", 80)


async def test_a_name_cannot_be_public_when_it_is_checked_and_private_when_it_is_used() -> None:
    """A name whose address changes from one question to the next: what was checked is what is connected to."""
    with RawServer(origin(), "127.0.0.2") as public:
        location = f"http://cdn.test:{public.port}/m/model.safetensors"
        with RawServer(to(lambda: location), "127.0.0.3") as server:
            names = Names(models_test=["127.0.0.3"], cdn_test=["127.0.0.2", "127.0.0.1"])
            url = f"http://models.test:{server.port}/m/"
            given = options("cdn.test")
            async with opened(HttpSource(url, given, resolver=names, private=only_first_is_private)) as source:
                assert await read(source, model_file(), 0, 10) == WEIGHTS[:10]
                assert names.asked.count("cdn.test") == 1
                with pytest.raises(SourceRefused, match=r"private address 127\.0\.0\.1"):
                    await read(source, model_file(), 0, 10)
                assert names.asked.count("cdn.test") == 2
            assert len(public.asked) == 1


async def test_a_source_that_is_private_itself_may_lead_to_its_like() -> None:
    with RawServer(origin(), "127.0.0.2") as other:
        location = f"http://127.0.0.2:{other.port}/m/model.safetensors"
        for host in ("127.0.0.1", "localhost"):
            with RawServer(to(lambda: location)) as server:
                url = f"http://{host}:{server.port}/m/"
                async with opened(HttpSource(url, options("127.0.0.2"))) as source:
                    assert await read(source, model_file(), 0, 10) == WEIGHTS[:10]


@pytest.mark.parametrize(
    ("location", "error", "message"),
    [
        ("", SourceViolation, "nothing that can be asked"),
        ("ftp://127.0.0.1/x", SourceViolation, "nothing that can be asked"),
        ("file:///etc/passwd", SourceViolation, "nothing that can be asked"),
        ("javascript:x", SourceViolation, "nothing that can be asked"),
        ("http://", SourceViolation, "nothing that can be asked"),
        ("http://[::1", SourceViolation, "nothing that can be asked"),
        ("http://x:99999/", SourceViolation, "nothing that can be asked"),
        ("http://a b/", SourceViolation, "nothing that can be asked"),
        ("http://" + "a" * 70 + "/", SourceViolation, "nothing that can be asked"),
        ("/" + "x" * 8001, SourceViolation, "nothing that can be asked|no HTTP"),
        ("//127.0.0.9/x", SourceRefused, "not among the hosts allowed"),
        ("http://127.1/x", SourceRefused, "not among the hosts allowed"),
        ("http://u:pw@127.0.0.2/x", SourceRefused, "with credentials in the URL"),
        ("http://127.0.0.2:1/x", SourceUnreachable, "no connection"),
    ],
)
async def test_a_location_that_is_none_is_refused(location: str, error: type[Exception], message: str) -> None:
    with RawServer(to(lambda: location)) as server:
        async with opened(HttpSource(f"{server.url}/m/", options("127.0.0.2", private=True))) as source:
            with pytest.raises(error, match=message) as raised:
                await read(source, model_file(), 0, 10)
            assert "pw" not in str(raised.value)


async def test_redirects_have_an_end() -> None:
    with RawServer(to(lambda: "model.safetensors")) as server:
        async with opened(HttpSource(f"{server.url}/m/", OPTIONS)) as source:
            with pytest.raises(SourceViolation, match="redirects more than 5 times"):
                await read(source, model_file(), 0, 10)
        assert len(server.asked) == 6


async def test_encryption_is_never_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(tls)
    with RawServer(origin()) as plain, RawServer(to(lambda: f"{plain.url}/m/model.safetensors"), tls=tls) as server:
        url = f"https://localhost:{server.port}/m/"
        async with opened(HttpSource(url, options("127.0.0.1", private=True))) as source:
            with pytest.raises(SourceRefused, match=r"from https to http://127\.0\.0\.1.*not encrypted"):
                await read(source, model_file(), 0, 10)
        assert not plain.asked


async def test_a_way_that_no_longer_leads_there_is_asked_for_anew() -> None:
    tickets = iter(["one", "two", "three"])
    valid = {"one"}

    def storage(request: Request) -> None:
        ticket = request.path.partition("?")[2]
        request.reply_file(WEIGHTS, {"ETag": '"one"'}) if ticket in valid else request.reply(403)

    with (
        RawServer(storage, "127.0.0.2") as other,
        RawServer(to(lambda: f"{other.url}/x?{next(tickets)}")) as server,
    ):
        async with opened(HttpSource(f"{server.url}/m/", options("127.0.0.2"))) as source:
            assert await read(source, model_file(), 0, 10) == WEIGHTS[:10]
            assert await read(source, model_file(), 10, 10) == WEIGHTS[10:20]
            assert len(server.asked) == 1
            valid.add("two")
            valid.discard("one")
            assert await read(source, model_file(), 20, 10) == WEIGHTS[20:30]
            assert len(server.asked) == 2
            valid.clear()
            with pytest.raises(SourceRefused) as raised:
                await read(source, model_file(), 20, 10)
            assert "three" not in str(raised.value), "a signature is not for messages"
            assert len(server.asked) == 3


async def test_what_is_missing_behind_a_redirect_is_missing() -> None:
    with (
        RawServer(lambda request: request.reply(404), "127.0.0.2") as other,
        RawServer(to(lambda: f"{other.url}/x")) as server,
    ):
        async with opened(HttpSource(f"{server.url}/m/", options("127.0.0.2"))) as source:
            with pytest.raises(SourceMissing, match="has none of"):
                await source.files()


PRIVATE = [
    "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
    "255.255.255.255", "192.0.2.1", "240.0.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1",
    "ff02::1",
    "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::",
    "2002:808:808::", "2001:0:7f00:1::",
]  # fmt: skip
PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]


def test_private_addresses_are_known_in_all_their_forms() -> None:
    assert [address for address in PRIVATE if not is_private(address)] == []
    assert [address for address in PUBLIC if is_private(address)] == []
    assert [name for name in ("localhost", "LocalHost.", "a.localhost", "::1") if not is_private_host(name)] == []
    assert [name for name in ("local", "example.org", "localhost.example.org") if is_private_host(name)] == []


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_judged_alike_inside_an_ipv6_one(address: object) -> None:
    assert is_private(f"::ffff:{address}") == is_private(str(address)) == is_private(f"64:ff9b::{address}")
