"""What an HTTP origin can do wrong while it is read, each with the error it becomes; nothing is left behind."""

from __future__ import annotations

import asyncio
import ssl
import threading
from pathlib import Path

import pytest
import trustme
from fault_proxy import Fault, FaultProxy
from raw_server import Answer, RawServer, Request
from sources import FILES, HASTY, OPTIONS, WEIGHTS, Names, descriptors, model_file, only, opened, origin, read, until

from sllm_actor.errors import (
    SllmError,
    SourceChanged,
    SourceMissing,
    SourceRefused,
    SourceUnreachable,
    SourceViolation,
)
from sllm_actor.sources.http import HttpSource
from sllm_actor.sources.source import SourceOptions

SIZE = len(WEIGHTS)
TOLD = {"ETag": '"one"', "Content-Range": f"bytes 1000-1999/{SIZE}"}


def chunked(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> Answer:
    """A 206 without a length: pieces, and an end of them or none."""

    def answer(request: Request) -> None:
        head = "".join(f"{name}: {value}\r\n" for name, value in TOLD.items())
        request.client.sendall(f"HTTP/1.1 206 Some\r\nTransfer-Encoding: chunked\r\n{head}\r\n".encode())
        for piece in pieces:
            request.client.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
        request.client.sendall(end)

    return answer


def partial(headers: dict[str, object], body_bytes: int = 1000, status: int = 206) -> Answer:
    return lambda request: request.reply(status, {**TOLD, **headers}, bytes(body_bytes))


def whole(etag: str = '"one"', content: bytes = WEIGHTS, told: int | None = None) -> Answer:
    length: dict[str, object] = {} if told is None else {"Content-Length": told}
    return lambda request: request.reply(200, {"ETag": etag, **length}, content)


def raw(answer: bytes) -> Answer:
    return lambda request: request.client.sendall(answer)


WRONG_ANSWERS: dict[str, tuple[Answer, type[SllmError], str]] = {
    "another ETag": (partial({"ETag": '"two"'}), SourceChanged, r'is "two" now and was "one"'),
    "200 with another ETag": (whole('"two"'), SourceChanged, r'is "two" now and was "one"'),
    "200 of another length": (whole(content=WEIGHTS[:-1]), SourceChanged, "299999 bytes now and had 300000"),
    "another size": (partial({"Content-Range": f"bytes 1000-1999/{SIZE + 1}"}), SourceChanged, "300001 bytes now"),
    "range not there": (partial({}, 0, status=416), SourceChanged, "no such range"),
    "too long by its header": (partial({}, 1001), SourceViolation, "1000 bytes were asked for and 1001"),
    "too short by its header": (partial({}, 999), SourceViolation, "1000 bytes were asked for and 999"),
    "too short in pieces": (chunked(bytes(600), bytes(399)), SourceViolation, "ends 1 bytes too soon"),
    "too long in pieces": (chunked(bytes(600), bytes(401)), SourceViolation, "longer than the range"),
    "pieces without an end": (chunked(bytes(600), end=b""), SourceUnreachable, "before it is whole"),
    "another range": (partial({"Content-Range": f"bytes 0-999/{SIZE}"}), SourceViolation, "bytes 1000-1999 was asked"),
    "a shorter range": (partial({"Content-Range": f"bytes 1000-1998/{SIZE}"}), SourceViolation, "1000-1998"),
    "a longer range": (partial({"Content-Range": f"bytes 1000-2000/{SIZE}"}), SourceViolation, "1000-2000"),
    "no range": (partial({"Content-Range": None}), SourceViolation, "'' is the answer"),
    "no size": (partial({"Content-Range": "bytes 1000-1999/*"}), SourceViolation, "was asked for"),
    "absurd range": (partial({"Content-Range": "bytes 1000-1999/" + "9" * 400}), SourceViolation, "was asked for"),
    "encoded": (partial({"Content-Encoding": "gzip"}), SourceViolation, "sent encoded"),
    "closed at once": (raw(b""), SourceUnreachable, "model"),
    "no HTTP": (raw(b"SSH-2.0-x\r\n\r\n"), SourceViolation, "no HTTP"),
    "endless header": (raw(b"HTTP/1.1 206 x\r\nA: " + b"b" * 100_000 + b"\r\n\r\n"), SourceViolation, "no HTTP"),
    "two lengths": (
        raw(b"HTTP/1.1 206 x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n"),
        SourceViolation,
        "no HTTP",
    ),
    "not there": (partial({}, 0, status=404), SourceMissing, "404"),
    "no longer there": (partial({}, 0, status=410), SourceMissing, "410"),
    "no credentials": (partial({}, 0, status=401), SourceRefused, "wants credentials"),
    "forbidden": (partial({}, 0, status=403), SourceRefused, "wants credentials"),
    "teapot": (partial({}, 0, status=418), SourceViolation, "418"),
    "nothing": (partial({}, 0, status=204), SourceViolation, "204"),
    "not modified": (partial({}, 0, status=304), SourceViolation, "304"),
    "server error": (partial({}, 0, status=500), SourceUnreachable, "500"),
}


@pytest.mark.parametrize("kind", WRONG_ANSWERS)
async def test_a_wrong_answer_becomes_its_typed_error(kind: str) -> None:
    answer, error, message = WRONG_ANSWERS[kind]
    with RawServer(only("model.safetensors", answer)) as server:
        async with opened(HttpSource(f"{server.url}/m/", OPTIONS)) as source:
            with pytest.raises(error, match=message) as raised:
                await read(source, model_file(), 1000, 1000)
            assert type(raised.value) is error
            assert f"{server.url}/m/model.safetensors" in str(raised.value)
            # The source is as good as before.
            assert await read(source, model_file(name="config.json", content=b"{}")) == b"{}"


@pytest.mark.parametrize(("text", "retry_after_s"), [("7", 7.0), ("999999", 3600.0), ("soon", None), (None, None)])
@pytest.mark.parametrize("status", [429, 503])
async def test_an_origin_that_is_busy_says_when_to_come_again(
    status: int, text: str | None, retry_after_s: float | None
) -> None:
    with RawServer(lambda request: request.reply(status, {"Retry-After": text})) as server:
        async with opened(HttpSource(f"{server.url}/m/", OPTIONS)) as source:
            for asking in (source.files(), read(source, model_file(), 0, 10)):
                with pytest.raises(SourceUnreachable, match=str(status)) as raised:
                    await asking
                assert raised.value.retry_after_s == retry_after_s


async def test_bytes_after_an_answer_are_never_taken_for_the_next_one() -> None:
    """What is sent beyond the length is no part of the answer, and no beginning of another one."""
    forged = b"HTTP/1.1 206 x\r\nContent-Length: 5\r\nContent-Range: bytes 5-9/300000\r\n\r\nWRONG"

    def answer(request: Request) -> None:
        asked = request.asked_range(SIZE)
        assert asked is not None
        head = (
            f"HTTP/1.1 206 x\r\nContent-Length: {asked[1] - asked[0]}\r\nContent-Range: bytes {asked[0]}-{asked[1] - 1}"
        )
        request.client.sendall(f"{head}/{SIZE}\r\n\r\n".encode() + WEIGHTS[slice(*asked)] + forged)
        request.client.recv(1)

    with RawServer(only("model.safetensors", answer)) as server:
        async with opened(HttpSource(f"{server.url}/m/", OPTIONS)) as source:
            for begin in (0, 5, 5, 10):
                assert await read(source, model_file(), begin, 5) == WEIGHTS[begin : begin + 5]


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("after", [0, 1, 70_000, SIZE - 2])
@pytest.mark.parametrize("in_order", [False, True])
async def test_a_connection_that_is_cut_is_an_error_and_not_a_short_file(
    after: int, reset: bool, in_order: bool
) -> None:
    answer = only("model.safetensors", whole()) if in_order else origin()
    with RawServer(answer) as server, FaultProxy(server.port) as proxy:
        async with opened(HttpSource(f"{proxy.url}/m/", OPTIONS)) as source:
            if in_order:
                await read(source, model_file(), 1, 1)
                assert source.parallel == 1
            proxy.choose = lambda request: Fault(cut_after_bytes=after, reset=reset)
            with pytest.raises(SourceUnreachable, match=r"model\.safetensors") as raised:
                if in_order:
                    await read(source, model_file(), 0, SIZE - 2)
                    await read(source, model_file(), SIZE - 2, 2)
                await read(source, model_file(), 1, SIZE - 1)
            # A reset may take along what has not been looked at.
            assert raised.value.came_bytes == (after if after < SIZE - 2 or not in_order else 0) or reset
            proxy.choose = None
            assert await read(source, model_file(), 1, SIZE - 1) == WEIGHTS[1:]


@pytest.mark.parametrize("after", [0, 1000])
async def test_an_origin_that_stalls_is_given_up(after: int) -> None:
    with RawServer(origin()) as server, FaultProxy(server.port) as proxy:
        async with opened(HttpSource(f"{proxy.url}/m/", HASTY)) as source:
            proxy.choose = lambda request: Fault(stall_after_bytes=after)
            with pytest.raises(SourceUnreachable, match=r"not a byte for 0\.3 s"):
                await read(source, model_file(), 0, 5000)
            proxy.choose = None
            assert await read(source, model_file(), 0, 5000) == WEIGHTS[:5000]


async def test_a_broken_chunk_is_an_error_and_no_wait_for_ever() -> None:
    """However it is cut into segments: one that comes by itself leaves aiohttp waiting without a limit."""

    def broken(request: Request) -> None:
        chunked(WEIGHTS[1000:1500], end=b"zz\r\n")(request)
        request.hold()

    def broken_later(request: Request) -> None:
        chunked(WEIGHTS[1000:1500], end=b"")(request)
        seen.wait(20)
        request.client.sendall(b"zz\r\n")
        request.hold()

    for answer in (broken, broken_later):
        seen = threading.Event()
        with RawServer(only("model.safetensors", answer)) as server:
            async with opened(HttpSource(f"{server.url}/m/", HASTY)) as source:
                into = bytearray(1000)
                reading = asyncio.create_task(source.read(model_file(), 1000, memoryview(into)))
                if answer is broken_later:
                    await until(lambda: into[:500] == WEIGHTS[1000:1500])  # noqa: B023  # It is awaited here.
                    seen.set()
                with pytest.raises((SourceUnreachable, SourceViolation), match=r"model\.safetensors"):
                    await reading


async def test_an_origin_that_is_slow_but_goes_on_is_waited_for() -> None:
    with RawServer(origin()) as server, FaultProxy(server.port, {1: Fault(bytes_per_s=100_000)}) as proxy:
        async with opened(HttpSource(f"{proxy.url}/m/", HASTY)) as source:
            assert await read(source, model_file(), 0, 60_000) == WEIGHTS[:60_000]


async def test_a_wrong_byte_comes_as_it_is_and_only_once() -> None:
    """A source cannot know it: the digests are held against the bytes above it, and the range is read again."""
    with RawServer(origin()) as server, FaultProxy(server.port, {1: Fault(corrupt_byte=1234)}) as proxy:
        async with opened(HttpSource(f"{proxy.url}/m/", OPTIONS)) as source:
            first, second = await read(source, model_file()), await read(source, model_file())
            assert [k for k in range(SIZE) if first[k] != WEIGHTS[k]] == [1234]
            assert second == WEIGHTS


async def test_an_origin_that_does_not_answer_at_all_is_given_up() -> None:
    with RawServer(lambda request: None) as server:
        port = server.port
    async with opened(HttpSource(f"http://127.0.0.1:{port}/m/", OPTIONS)) as source:
        with pytest.raises(SourceUnreachable, match=r"no connection to 127\.0\.0\.1"):
            await source.files()
    async with opened(HttpSource("http://no-such-host.invalid/m/", OPTIONS, resolver=Names())) as source:
        with pytest.raises(SourceUnreachable, match=r"no connection to no-such-host\.invalid"):
            await source.files()


async def test_a_connection_that_is_never_accepted_is_given_up() -> None:
    """TLS whose other end says nothing counts as a connection that is not made."""
    with RawServer(lambda request: None) as server:
        async with opened(HttpSource(f"https://127.0.0.1:{server.port}/m/", HASTY)) as source:
            with pytest.raises(SourceUnreachable, match=r"no connection to 127\.0\.0\.1 within 0\.3 s"):
                await source.files()


async def test_origins_in_order_check_the_version_at_each_opening() -> None:
    answers = iter([whole(), whole(), whole('"two"'), whole(content=WEIGHTS + b"x"), partial({}), whole(told=SIZE + 1)])
    with RawServer(only("model.safetensors", lambda request: next(answers)(request))) as server:
        async with opened(HttpSource(f"{server.url}/m/", OPTIONS)) as source:
            assert await read(source, model_file(), 0, 10) == WEIGHTS[:10]
            assert await read(source, model_file(), 10, 10) == WEIGHTS[10:20]
            with pytest.raises(SourceChanged, match='is "two" now'):
                await read(source, model_file(), 0, 10)
            with pytest.raises(SourceChanged, match="300001 bytes now"):
                await read(source, model_file(), 0, 10)
            with pytest.raises(SourceViolation, match="206"):
                await read(source, model_file(), 0, 10)
            with pytest.raises(SourceChanged, match="300001 bytes now"):
                await read(source, model_file(), 0, 10)


@pytest.mark.parametrize("in_order", [False, True])
async def test_a_read_that_is_cancelled_leaves_nothing_and_spoils_nothing(in_order: bool) -> None:
    answer = only("model.safetensors", whole()) if in_order else origin()
    with RawServer(answer) as server, FaultProxy(server.port) as proxy:
        async with opened(HttpSource(f"{proxy.url}/m/", OPTIONS)) as source:
            if in_order:
                await read(source, model_file(), 0, 5)
            proxy.choose = lambda request: Fault(stall_after_bytes=2000)
            asked = len(proxy.asked)
            reading = [asyncio.create_task(read(source, model_file(), 7 * k, 5000)) for k in range(20)]
            await until(lambda: len(proxy.asked) > asked)
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)
            assert all(task.cancelled() for task in reading)
            proxy.choose = None
            assert await read(source, model_file(), 3, 5000) == WEIGHTS[3:5003]


async def test_no_more_than_so_many_requests_are_under_way_and_closing_ends_them() -> None:
    options = SourceOptions(parallel_reads=3)
    with RawServer(only("model.safetensors", lambda request: request.hold())) as server:
        async with opened(HttpSource(f"{server.url}/m/", options)) as source:
            reading = [asyncio.create_task(read(source, model_file(), k, 100)) for k in range(10)]
            await until(lambda: len(server.asked) == 3)
            await source.close()
            ended = await asyncio.gather(*reading, return_exceptions=True)
            assert all(isinstance(error, SourceUnreachable) for error in ended), ended
            assert len(server.asked) == 3
            with pytest.raises(SourceUnreachable, match="closed"):
                await read(source, model_file(), 0, 10)


@pytest.mark.parametrize("broken", ["", "/m/chat_template.jinja"])
async def test_a_listing_that_is_cancelled_or_fails_in_the_middle_leaves_no_task(broken: str) -> None:
    """While questions for other files are held by the origin."""

    def held(request: Request) -> None:
        if request.path in ("/m/sllm.json", "/m/model.safetensors.index.json"):
            request.reply(404)
        elif request.path == broken:
            request.reply(500)
        else:
            request.hold()

    with RawServer(origin(otherwise=held)) as server:
        async with opened(HttpSource(f"{server.url}/m/", OPTIONS)) as source:
            before = asyncio.all_tasks()
            listing = asyncio.create_task(source.files())
            if broken:
                with pytest.raises(SourceUnreachable, match=r"chat_template\.jinja answers with status 500"):
                    await listing
            else:
                await until(lambda: len(server.asked) >= 12)
                listing.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await listing
            assert asyncio.all_tasks() == before


@pytest.mark.parametrize("kind", ["another range", "too long", "server error", "encoded", "moved"])
async def test_a_read_that_fails_gives_its_connection_back_at_once(kind: str) -> None:
    """And not when the source is closed: the origin holds each of them open, with more of a body to come."""
    wrong = {
        "another range": f"HTTP/1.1 206 x\r\nContent-Length: 1000\r\nContent-Range: bytes 0-999/{SIZE}\r\n\r\nx",
        "too long": f"HTTP/1.1 206 x\r\nContent-Length: 1001\r\nContent-Range: bytes 1000-1999/{SIZE}\r\n\r\n",
        "server error": "HTTP/1.1 500 x\r\nContent-Length: 1000\r\n\r\nx",
        "encoded": "HTTP/1.1 206 x\r\nContent-Length: 1000\r\nContent-Encoding: br\r\n\r\nx",
        "moved": "HTTP/1.1 302 x\r\nContent-Length: 1000\r\nLocation: ftp://x/\r\n\r\nx",
    }[kind]

    def answer(request: Request) -> None:
        request.client.sendall(wrong.encode())
        request.hold()

    with RawServer(only("model.safetensors", answer)) as server:
        async with opened(HttpSource(f"{server.url}/m/", OPTIONS)) as source:
            before = descriptors()
            for _ in range(3):
                with pytest.raises(SllmError):
                    await read(source, model_file(), 1000, 1000)
            await until(lambda: descriptors() == before)


async def test_a_certificate_is_checked_against_the_authorities_that_ssl_cert_file_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(tls)
    for known, name in ((authority, "ours.pem"), (stranger, "theirs.pem")):
        known.cert_pem.write_to_path(str(tmp_path / name))
    with RawServer(origin(), tls=tls) as server:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ours.pem"))
        async with opened(HttpSource(f"https://localhost:{server.port}/m/", OPTIONS)) as source:
            assert len(await source.files()) == len(FILES)
            assert await read(source, model_file(), 5, 5) == WEIGHTS[5:10]
        async with opened(HttpSource(f"https://127.0.0.1:{server.port}/m/", OPTIONS)) as source:
            with pytest.raises(SourceRefused, match=r"certificate of 127\.0\.0\.1 is not trusted"):
                await source.files()
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "theirs.pem"))
        async with opened(HttpSource(f"https://localhost:{server.port}/m/", OPTIONS)) as source:
            with pytest.raises(SourceRefused, match="certificate of localhost is not trusted"):
                await source.files()


async def test_the_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: Request) -> None:
        name = request.path.removeprefix("http://models.invalid/m/")
        request.reply_file(FILES[name]) if name in FILES else request.reply(404)

    with RawServer(answer) as server:
        monkeypatch.setenv("http_proxy", f"http://me:pw@127.0.0.1:{server.port}")
        async with opened(
            HttpSource("http://models.invalid/m/", OPTIONS, resolver=Names(**{"127.0.0.1": ["127.0.0.1"]}))
        ) as source:
            assert [file.name for file in await source.files()] == sorted(FILES)
            assert {request.headers["proxy-authorization"] for request in server.asked} == {"Basic bWU6cHc="}
            asked = len(server.asked)
            monkeypatch.setenv("no_proxy", "models.invalid")
            with pytest.raises(SourceUnreachable, match="no connection"):
                await source.files()
            assert len(server.asked) == asked
