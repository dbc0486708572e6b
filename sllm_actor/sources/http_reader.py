"""Read files over HTTP: their sizes and versions, small ones whole, large ones by ranges into a given buffer.

Knows nothing of checkpoints. Every answer is held against what was asked for; nothing is asked for twice.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection, Mapping

import aiohttp
from yarl import URL

from sllm_actor.errors import (
    SourceChanged,
    SourceError,
    SourceInvalid,
    SourceUnreachable,
    SourceViolation,
)
from sllm_actor.sources.http_client import READ_BYTES, HttpClient, next_piece
from sllm_actor.sources.http_url import place_of
from sllm_actor.sources.source import MAX_SIZE_BYTES, SourceOptions

_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]{0,255}"')
_MODIFIED = re.compile(r"[A-Za-z0-9,: +-]{1,64}")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,16})-([0-9]{1,16})/([0-9]{1,16})")
_EMPTY_RANGE = re.compile(r"bytes \*/0")
# What origins that know no HEAD, or were told to allow GET alone, answer to one.
_HEAD_REFUSED = (400, 403, 405, 501)


def validator_of(headers: Mapping[str, str], size_bytes: int) -> str:
    """Return what tells this version of a file from others: a strong ETag, or time and size, or nothing."""
    etag, modified = headers.get("ETag", ""), headers.get("Last-Modified", "")
    if _STRONG_ETAG.fullmatch(etag):
        return etag
    return f"{modified}/{size_bytes}" if _MODIFIED.fullmatch(modified) else ""


class _Stream:
    """A file on its way from front to back."""

    def __init__(self, url: URL, validator: str, response: aiohttp.ClientResponse) -> None:
        self.url = url
        self.validator = validator
        self.response = response
        self.position = 0


class HttpReader:
    """Reads from one client. Once an origin has answered a range with the whole file, files are read in order."""

    def __init__(self, client: HttpClient, options: SourceOptions) -> None:
        self._client = client
        self._options = options
        self._slots = asyncio.Semaphore(options.parallel_reads)
        self._in_order = False
        self._turn = asyncio.Lock()
        self._stream: _Stream | None = None
        self._closed = False

    @property
    def parallel(self) -> int:
        """How many reads at once are of use."""
        return 1 if self._in_order else self._options.parallel_reads

    async def probe(self, url: URL, absent: Collection[int] = ()) -> tuple[int, str] | None:
        """Return the size of a file in bytes and its validator, without reading it; None on a status in `absent`.

        Raises:
            SourceMissing, SourceRefused, SourceUnreachable, SourceViolation: as the origin answered.
        """
        async with self._slots:
            response = await self._client.send("HEAD", url, {})
            response.close()
            size_bytes = _length_of(response) if response.status == 200 else None
            if size_bytes is None and (response.status == 200 or response.status in _HEAD_REFUSED):
                response = await self._client.send("GET", url, {"Range": "bytes=0-0"})
                response.close()
                size_bytes = self._size_told(response, url)
            if size_bytes is None and response.status in absent:
                return None
            if size_bytes is None:
                raise self._client.refusal(response, url)
            if size_bytes > MAX_SIZE_BYTES:
                raise SourceInvalid(
                    f"{place_of(url)} has {size_bytes} bytes, more than a file may have", param="source"
                )
            return size_bytes, validator_of(response.headers, size_bytes)

    def _size_told(self, response: aiohttp.ClientResponse, url: URL) -> int | None:
        """Return the size in the answer to a range of one byte; None where the status is the answer."""
        told = response.headers.get("Content-Range", "")
        if response.status == 416 and _EMPTY_RANGE.fullmatch(told):
            return 0
        if response.status not in (200, 206):
            return None
        match = _CONTENT_RANGE.fullmatch(told)
        size_bytes = int(match[3]) if match and response.status == 206 else None
        if response.status == 200:
            size_bytes = _length_of(response)
            self._in_order = True
        if size_bytes is None:
            raise SourceViolation(f"{place_of(url)}: the answer does not tell how long the file is")
        return size_bytes

    async def content(self, url: URL, max_bytes: int, absent: Collection[int] = ()) -> tuple[bytes, str] | None:
        """Return a small file whole, and its validator; None on a status in `absent`.

        Raises:
            SourceInvalid: it is longer than `max_bytes`.
            SourceMissing, SourceRefused, SourceUnreachable, SourceViolation: as the origin answered.
        """
        async with self._slots:
            response = await self._client.send("GET", url, {})
            try:
                if response.status in absent:
                    return None
                if response.status != 200:
                    raise self._client.refusal(response, url)
                raw = bytearray()
                told = _length_of(response) or 0
                while told <= max_bytes and (piece := await next_piece(response, url, READ_BYTES, self._options)):
                    raw += piece
                    told = max(told, len(raw))
                if told > max_bytes:
                    raise SourceInvalid(f"{place_of(url)} is longer than {max_bytes} bytes", param="source")
                return bytes(raw), validator_of(response.headers, len(raw))
            finally:
                response.close()

    async def read(self, url: URL, size_bytes: int, validator: str, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a file of `size_bytes` from `offset` on.

        The file's version is compared with `validator`, where that is not empty.

        Raises:
            SourceChanged, SourceViolation: the answer was of another version, or another range.
            SourceMissing, SourceRefused, SourceUnreachable: as the origin answered.
        """
        assert offset >= 0 and offset + len(into) <= size_bytes, "a range is within its file"
        if not len(into):
            return
        whole = len(into) == size_bytes
        if whole or not self._in_order:
            async with self._slots:
                if await self._read_range(url, size_bytes, validator, offset, into):
                    return
        async with self._turn:
            await self._read_on(url, size_bytes, validator, offset, into)

    async def close(self) -> None:
        """Let go of the connection that is kept open; the client is its owner's to close."""
        self._closed = True
        self._drop()

    async def _read_range(self, url: URL, size_bytes: int, validator: str, offset: int, into: memoryview) -> bool:
        """Read a range with a request of its own; False where the origin turns out to have none."""
        headers = {}
        if len(into) < size_bytes:
            headers["Range"] = f"bytes={offset}-{offset + len(into) - 1}"
            if validator.startswith('"'):
                headers["If-Range"] = validator
        response = await self._client.send("GET", url, headers)
        try:
            if response.status not in (200, 206):
                raise self._client.refusal(response, url)
            if response.status == 200:
                _check_version(response, url, size_bytes, validator)
                if headers:
                    self._in_order = True
                    return False
            else:
                _check_range(response, url, size_bytes, offset, len(into) if headers else 0)
                _check_version(response, url, size_bytes, validator, told_bytes=len(into))
            await self._fill(response, url, into)
            if await next_piece(response, url, 1, self._options):
                raise SourceViolation(f"{place_of(url)}: the answer is longer than the range")
            return True
        finally:
            response.close()

    async def _read_on(self, url: URL, size_bytes: int, validator: str, offset: int, into: memoryview) -> None:
        """Read from the connection that is kept open, or anew from the beginning of the file."""
        stream = self._stream
        if stream is None or stream.url != url or stream.validator != validator or stream.position > offset:
            self._drop()
            stream = await self._open(url, size_bytes, validator)
        try:
            while stream.position < offset:
                stream.position += len(await self._piece(stream.response, url, offset - stream.position))
            await self._fill(stream.response, url, into)
            stream.position += len(into)
            if stream.position == size_bytes:
                if await next_piece(stream.response, url, 1, self._options):
                    raise SourceViolation(f"{place_of(url)}: the answer is longer than the file")
                self._drop()
        except BaseException:
            self._drop()
            raise

    async def _open(self, url: URL, size_bytes: int, validator: str) -> _Stream:
        response = await self._client.send("GET", url, {})
        try:
            if response.status != 200:
                raise self._client.refusal(response, url)
            _check_version(response, url, size_bytes, validator)
            if self._closed:
                raise SourceUnreachable(f"{place_of(url)}: the source has been closed")
        except BaseException:
            response.close()
            raise
        self._stream = _Stream(url, validator, response)
        return self._stream

    def _drop(self) -> None:
        if self._stream is not None:
            self._stream.response.close()
            self._stream = None

    async def _fill(self, response: aiohttp.ClientResponse, url: URL, into: memoryview) -> None:
        filled = 0
        try:
            while filled < len(into):
                piece = await self._piece(response, url, len(into) - filled)
                into[filled : filled + len(piece)] = piece
                filled += len(piece)
        except SourceError as wrong:
            wrong.came_bytes = filled
            raise

    async def _piece(self, response: aiohttp.ClientResponse, url: URL, most_bytes: int) -> bytes:
        piece = await next_piece(response, url, most_bytes, self._options)
        if not piece:
            raise SourceViolation(f"{place_of(url)}: the answer ends {most_bytes} bytes too soon")
        return piece


def _length_of(response: aiohttp.ClientResponse) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if re.fullmatch(r"[0-9]{1,16}", text) else None


def _check_range(response: aiohttp.ClientResponse, url: URL, size_bytes: int, offset: int, asked_bytes: int) -> None:
    told = response.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(told)
    if match is None or (int(match[1]), int(match[2]) + 1) != (offset, offset + asked_bytes):
        asked = f"bytes {offset}-{offset + asked_bytes - 1}" if asked_bytes else "no range"
        raise SourceViolation(f"{place_of(url)}: {asked} was asked for and {told[:80]!r} is the answer")
    if int(match[3]) != size_bytes:
        raise SourceChanged(f"{place_of(url)} has {match[3]} bytes now and had {size_bytes}")


def _check_version(
    response: aiohttp.ClientResponse, url: URL, size_bytes: int, validator: str, told_bytes: int | None = None
) -> None:
    """Hold an answer against the version that was listed; `told_bytes` is its length, where it is not the file's."""
    length = _length_of(response)
    found = validator_of(response.headers, size_bytes)
    if validator and found and found != validator:
        raise SourceChanged(
            f"{place_of(url)} is {found} now and was {validator}: the source has changed; deploy it again"
        )
    if told_bytes is None and length not in (None, size_bytes):
        raise SourceChanged(f"{place_of(url)} has {length} bytes now and had {size_bytes}")
    if told_bytes is not None and length not in (None, told_bytes):
        raise SourceViolation(f"{place_of(url)}: {told_bytes} bytes were asked for and {length} are the answer")
