"""S3 as a source: against moto's server, and against one of our own that does what no honest server does."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import obstore
import pytest
from checkpoints import noise
from obstore.store import S3Store
from reading import WEIGHTS, refused, weights_of, whole
from remote_pairs import FOR_EVER_S, PATIENCE_S, nothing_left, until

from sllm_actor.errors import (
    SllmError,
    SourceChanged,
    SourceInvalid,
    SourceMissing,
    SourceRefused,
    SourceUnreachable,
    SourceViolation,
)
from sllm_actor.sources.s3 import PIECE_BYTES, S3Source, parse_s3_url
from sllm_actor.sources.source import MAX_FILES, SourceFile, SourceOptions

PATIENT = SourceOptions(connect_timeout_s=FOR_EVER_S, stall_timeout_s=FOR_EVER_S)
HASTY = SourceOptions(connect_timeout_s=0.1, stall_timeout_s=0.1)
SCRIPT = Path(__file__).with_name("moto_process.py")
BUCKET = "models"
LARGE = noise(2 * PIECE_BYTES + 1234, 5)


def make_bucket(server: str, name: str) -> None:
    """Ask for a bucket, with the signature that a real server wants."""
    boto3.client(
        "s3", endpoint_url=server, aws_access_key_id="key", aws_secret_access_key="secret", region_name="us-east-1"
    ).create_bucket(Bucket=name)


def put(server: str, name: str, content: bytes, bucket: str = BUCKET) -> None:
    """Write an object."""
    obstore.put(S3Store(bucket, endpoint=server), name, content)


def ask_for_credentials(server: str, *, after_requests: int) -> None:
    """Have the server check who asks, from so many requests on."""
    headers = {"Content-Type": "text/plain"}
    asked = urllib.request.Request(f"{server}/moto-api/reset-auth", str(after_requests).encode(), headers)
    urllib.request.urlopen(asked, timeout=PATIENCE_S).close()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Moto's server for all tests of this module, with an empty bucket."""
    with subprocess.Popen(
        [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            make_bucket(url, BUCKET)
            yield url
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def settings_of_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the variables that a deployment would, and none of this machine's."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")


@asynccontextmanager
async def source_at(
    endpoint: str, url: str, monkeypatch: pytest.MonkeyPatch, options: SourceOptions = PATIENT
) -> AsyncIterator[S3Source]:
    """Give a source there; nothing may be left when it is closed."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    source = S3Source(url, options)
    try:
        yield source
    finally:
        await source.close()


# Moto.


async def test_what_is_listed_under_a_prefix_is_read_byte_by_byte(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {"config.json": b"{}", WEIGHTS: LARGE, "model.safetensors.index.json": b"[]"}
    for name, content in contents.items():
        put(server, f"org/whole/{name}", content)
    for other in ("org/whole/deeper/vocab.json", "org/whole2/vocab.json", "org/whole/code.py", "vocab.json"):
        put(server, other, b"not ours")
    async with source_at(server, f"s3://{BUCKET}/org/whole/", monkeypatch) as source:
        assert source.url == f"s3://{BUCKET}/org/whole"
        files = await source.files()
        assert [(file.name, file.size_bytes) for file in files] == [
            (name, len(contents[name])) for name in sorted(contents)
        ]
        assert all(file.validator for file in files)
        for file in files:
            assert await whole(source, file) == contents[file.name]
        into = bytearray(5000)
        await source.read(await weights_of(source), 777, memoryview(into)[1000:4000])
        assert bytes(into) == bytes(1000) + LARGE[777:3777] + bytes(1000)
        await source.read(await weights_of(source), 5, memoryview(b""))


async def test_a_bucket_without_a_prefix_is_a_source_too(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_bucket(server, "bare-bucket")
    put(server, WEIGHTS, b"content", "bare-bucket")
    async with source_at(server, "s3://bare-bucket", monkeypatch) as source:
        assert await whole(source, await weights_of(source)) == b"content"


async def test_reads_may_run_side_by_side(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(server, f"side/{WEIGHTS}", LARGE)
    async with source_at(server, f"s3://{BUCKET}/side", monkeypatch) as source:
        file = await weights_of(source)
        assert await asyncio.gather(*(whole(source, file) for _ in range(source.parallel))) == [LARGE] * source.parallel


async def test_an_object_that_has_changed_is_not_read(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(server, f"changed/{WEIGHTS}", b"before")
    async with source_at(server, f"s3://{BUCKET}/changed", monkeypatch) as source:
        file = await weights_of(source)
        put(server, f"changed/{WEIGHTS}", b"after!")
        error = await refused(SourceChanged, whole(source, file))
        assert f"changed/{WEIGHTS}" in error.message
        obstore.delete(S3Store(BUCKET, endpoint=server), f"changed/{WEIGHTS}")
        await refused(SourceMissing, whole(source, file))


@pytest.mark.parametrize("url", ["s3://no-such-bucket/x", "s3://no-such-bucket", f"s3://{BUCKET}/no/such/prefix"])
async def test_a_bucket_and_a_prefix_that_are_not_there_are_missing(
    server: str, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    async with source_at(server, url, monkeypatch) as source:
        error = await refused(SourceMissing, source.files())
        assert url in error.message


async def test_credentials_that_the_server_does_not_know_are_refused(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(server, f"private/{WEIGHTS}", b"content")
    async with source_at(server, f"s3://{BUCKET}/private", monkeypatch) as source:
        file = await weights_of(source)
        ask_for_credentials(server, after_requests=0)
        try:
            await refused(SourceRefused, source.files())
            await refused(SourceRefused, whole(source, file))
        finally:
            ask_for_credentials(server, after_requests=10**9)
        assert await whole(source, file) == b"content"


# A server of our own.

Answer = Callable[[str], bytes | None]
ETAG = '"1234"'
FILE = SourceFile(WEIGHTS, 1000, ETAG)
CONTENT = noise(1000, 2)


def response(status: int, body: bytes = b"", *, length: int | None = None, **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def part(
    body: bytes = CONTENT, *, range_: str = "bytes 0-999/1000", etag: str = ETAG, length: int | None = None
) -> bytes:
    """A right answer, unless something else is given."""
    when = "Sat, 01 Jan 2022 00:00:00 GMT"
    return response(206, body, length=length, Content_Range=range_, ETag=etag, Last_Modified=when)


class OwnServer:
    """Answers each request with what `answer` gives for its first line, and nothing more where that is None."""

    def __init__(self, answer: Answer) -> None:
        self.requests: list[str] = []
        self._answer = answer
        self._open: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.requests.append(head.decode())
                answer = self._answer(head.decode().partition("\r\n")[0])
                if answer is None:
                    await reader.read()
                    return
                writer.write(answer)
                length = re.search(rb"Content-Length: (\d+)", answer)
                if length is None or len(answer.partition(b"\r\n\r\n")[2]) != int(length.group(1)):
                    if answer.endswith(b"..."):
                        await reader.read()
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    async def until_nobody_is_there(self) -> None:
        await until(lambda: not self._open, "every connection was closed")

    async def close(self) -> None:
        """Close the connections that are kept for a next request."""
        for writer in self._open:
            writer.close()
        await self.until_nobody_is_there()


@asynccontextmanager
async def listening(answer: Answer) -> AsyncIterator[tuple[OwnServer, str]]:
    """Run a server of our own; gives it, and its URL."""
    own = OwnServer(answer)
    async with await asyncio.start_server(own.serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        try:
            yield own, f"http://{host}:{port}"
        finally:
            await own.close()


@asynccontextmanager
async def own_server(
    answer: Answer, monkeypatch: pytest.MonkeyPatch, options: SourceOptions = PATIENT
) -> AsyncIterator[tuple[S3Source, OwnServer]]:
    """Give a source at a server of our own."""
    async with listening(answer) as (own, url), source_at(url, f"s3://{BUCKET}/x", monkeypatch, options) as source:
        yield source, own


async def test_a_read_asks_for_the_range_of_the_listed_object_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with own_server(lambda _: part(), monkeypatch) as (source, own):
        assert await whole(source, FILE) == CONTENT
        (asked,) = [head.lower() for head in own.requests]
        assert asked.startswith(f"get /{BUCKET}/x/{WEIGHTS} http")
        assert "range: bytes=0-999\r\n" in asked and f"if-match: {ETAG}\r\n" in asked and "authorization: aws4" in asked


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (part(etag='"another"'), SourceChanged),
        (part(range_="bytes 0-999/2000"), SourceChanged),
        (part(CONTENT[:500], range_="bytes 0-499/1000"), SourceUnreachable),
        (part(range_="bytes 1-1000/1000"), SourceUnreachable),
        (response(200, CONTENT, ETag=ETAG, Last_Modified="Sat, 01 Jan 2022 00:00:00 GMT"), SourceUnreachable),
        (part(CONTENT[:500], range_="bytes 0-999/1000"), SourceViolation),
        (part(CONTENT + CONTENT, range_="bytes 0-999/1000"), SourceViolation),
        (part(CONTENT[:500], length=1000), SourceUnreachable),
        (response(412), SourceChanged),
        (response(401), SourceRefused),
        (response(403), SourceRefused),
        (response(404), SourceMissing),
        (response(416), SourceUnreachable),
        (response(500), SourceUnreachable),
        (response(503), SourceUnreachable),
        (b"nonsense\r\n\r\n", SourceUnreachable),
        (b"", SourceUnreachable),
    ],
)
async def test_whatever_is_not_the_range_asked_for_is_a_typed_error(
    monkeypatch: pytest.MonkeyPatch, answer: bytes, kind: type[SllmError]
) -> None:
    async with own_server(lambda _: answer, monkeypatch) as (source, own):
        error = await refused(kind, whole(source, FILE))
        assert f"s3://{BUCKET}/x/{WEIGHTS}" in error.message and len(error.message) < 500
        assert len(own.requests) == 1, "whoever reads decides whether to try again"
        assert "secret" not in error.message


async def test_an_answer_that_is_cut_tells_how_much_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(LARGE)
    answer = part(LARGE[: size - 1], range_=f"bytes 0-{size - 1}/{size}", length=size)
    async with own_server(lambda _: answer, monkeypatch) as (source, _):
        into = bytearray(size)
        error = await refused(SourceUnreachable, source.read(SourceFile(WEIGHTS, size, ETAG), 0, memoryview(into)))
        assert isinstance(error, SourceUnreachable)
        assert PIECE_BYTES <= error.came_bytes < size
        assert into[: error.came_bytes] == LARGE[: error.came_bytes]


@pytest.mark.parametrize("answer", [None, part(CONTENT[:500] + b"...", length=1000)])
async def test_a_server_that_falls_silent_is_given_up_on(monkeypatch: pytest.MonkeyPatch, answer: bytes | None) -> None:
    async with own_server(lambda _: answer, monkeypatch, HASTY) as (source, own):
        await refused(SourceUnreachable, whole(source, FILE))
        await own.until_nobody_is_there()


async def test_who_is_cancelled_leaves_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async with own_server(lambda _: None, monkeypatch) as (source, own):
        reading = asyncio.ensure_future(whole(source, FILE))
        await until(lambda: len(own.requests) == 1, "the request came")
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await own.until_nobody_is_there()


async def test_closing_ends_what_is_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async with own_server(lambda _: None, monkeypatch) as (source, own):
        reading: Awaitable[Any] = asyncio.ensure_future(whole(source, FILE))
        await until(lambda: len(own.requests) == 1, "the request came")
        await source.close()
        await refused(SourceUnreachable, reading)
        await refused(SourceUnreachable, source.files())
        await own.until_nobody_is_there()


async def test_a_redirect_takes_no_signature_along_and_what_comes_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    async with listening(lambda _: part(etag='"another"')) as (other, url):
        answer = response(307, Location=f"{url}/{BUCKET}/x/{WEIGHTS}")
        async with own_server(lambda _: answer, monkeypatch) as (source, own):
            await refused(SourceChanged, whole(source, FILE))
            assert "authorization" in own.requests[0].lower()
        (asked,) = other.requests
        assert "authorization" not in asked.lower()


def listing(*entries: tuple[str, int, str]) -> bytes:
    found = "".join(
        f"<Contents><Key>x/{name}</Key><LastModified>2022-01-01T00:00:00.000Z</LastModified><ETag>{etag}</ETag>"
        f"<Size>{size}</Size></Contents>"
        for name, size, etag in entries
    )
    body = f'<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>'
    return response(200, body.encode(), Content_Type="application/xml")


@pytest.mark.parametrize(
    ("entries", "kind"),
    [
        ([("code.py", 1, ETAG)], SourceMissing),
        ([(WEIGHTS, 2**60, ETAG)], SourceInvalid),
        ([(WEIGHTS, 1, '"' + "x" * 300 + '"')], SourceInvalid),
        ([(f"{number}.safetensors", 1, ETAG) for number in range(MAX_FILES + 1)], SourceInvalid),
    ],
    ids=["nothing of a checkpoint", "size", "etag", "many"],
)
async def test_a_listing_out_of_bounds_is_refused(
    monkeypatch: pytest.MonkeyPatch, entries: list[tuple[str, int, str]], kind: type[SllmError]
) -> None:
    async with own_server(lambda _: listing(*entries), monkeypatch) as (source, _):
        await refused(kind, source.files())


@pytest.mark.parametrize(
    ("of_listing", "of_probe", "kind"),
    [
        (403, 403, SourceRefused),
        (401, 401, SourceRefused),
        (404, 404, SourceMissing),
        (500, 200, SourceUnreachable),
        (500, 500, SourceUnreachable),
    ],
)
async def test_why_a_listing_failed_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, of_listing: int, of_probe: int, kind: type[SllmError]
) -> None:
    def answer(first_line: str) -> bytes:
        when = "Sat, 01 Jan 2022 00:00:00 GMT"
        return response(of_probe if first_line.startswith("HEAD") else of_listing, ETag=ETAG, Last_Modified=when)

    async with own_server(answer, monkeypatch) as (source, _):
        error = await refused(kind, source.files())
        assert source.url in error.message


async def test_a_listing_that_stalls_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async with own_server(lambda _: None, monkeypatch, HASTY) as (source, own):
        await refused(SourceUnreachable, source.files())
        assert len(own.requests) == 1
        await own.until_nobody_is_there()


async def test_nobody_at_the_endpoint_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    async with source_at("http://127.0.0.1:1", f"s3://{BUCKET}/x", monkeypatch) as source:
        await refused(SourceUnreachable, source.files())
        await refused(SourceUnreachable, whole(source, FILE))


async def test_many_failures_leave_no_task_and_no_descriptor(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(server, f"leaks/{WEIGHTS}", LARGE)
    async with source_at(server, f"s3://{BUCKET}/leaks", monkeypatch) as source:
        file = await weights_of(source)
        wrong = SourceFile(file.name, file.size_bytes, '"wrong"')
        async with nothing_left():
            for _ in range(20):
                await refused(SourceChanged, whole(source, wrong))
            reads = [asyncio.ensure_future(whole(source, file)) for _ in range(20)]
            await asyncio.sleep(0)
            for read in reads:
                read.cancel()
            await asyncio.gather(*reads, return_exceptions=True)


# Settings.


def test_without_obstore_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(SourceInvalid, match=r"pip install 'sllm_actor\[s3\]'") as caught:
        S3Source("s3://bucket/x", PATIENT)
    assert caught.value.param == "source"


async def test_plain_http_is_refused_unless_the_environment_allows_it(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    async with source_at(server, f"s3://{BUCKET}/x", monkeypatch) as source:
        await refused(SourceUnreachable, source.files())


@pytest.mark.parametrize(
    ("url", "bucket", "prefix"),
    [
        ("s3://abc", "abc", ""),
        ("S3://abc/", "abc", ""),
        ("s3://a.b-c/x/y.z_1/", "a.b-c", "x/y.z_1"),
    ],
)
def test_urls_of_buckets_are_read(url: str, bucket: str, prefix: str) -> None:
    assert parse_s3_url(url) == (bucket, prefix)


@pytest.mark.parametrize(
    "url",
    [
        "", "s3://", "s3://ab", "s3:abc", "http://abc/x", "s3://key:secret@abc/x", "s3://a..b/x", "s3://abc//x",
        "s3://abc/x/../y", "s3://abc/./x", "s3://abc/x?y", "s3://abc/x#y", "s3://abc/x y", "s3://abc/\u0445", "s3://abc/x\n",
        "s3://abc/" + "x" * 256, "s3://abc/" + "x/" * 600 + "y", "s3://" + "a" * 64, "s3://abc/%2e%2e/x",
    ],
)  # fmt: skip
def test_urls_that_name_no_bucket_are_refused(url: str) -> None:
    with pytest.raises(SourceInvalid) as caught:
        parse_s3_url(url)
    assert caught.value.param == "source" and "secret" not in caught.value.message
