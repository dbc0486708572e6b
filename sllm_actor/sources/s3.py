"""A prefix of an S3 bucket as a source, through obstore, which is an extra: `pip install sllm_actor[s3]`.

Credentials, endpoint and region come from the usual variables (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `AWS_REGION`,
`AWS_ALLOW_HTTP` …). Every read asks for the object of the listed ETag, and compares the one that came: there are
servers that pass over `If-Match`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sllm_actor.domain.sentence_modules import (
    MAX_MODULES_BYTES,
    MODULES_NAME,
    is_pooling_name,
    pooling_name_in,
)
from sllm_actor.errors import (
    SllmError,
    SourceChanged,
    SourceError,
    SourceInvalid,
    SourceMissing,
    SourceRefused,
    SourceUnreachable,
    SourceViolation,
)
from sllm_actor.sources.source import MAX_FILES, MAX_SIZE_BYTES, SourceFile, SourceOptions, belongs, is_file_name
from sllm_actor.sources.under_way import UnderWay
from sllm_actor.units import MIB

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult

MAX_PREFIX_CHARS = 1024
MAX_ETAG_CHARS = 256
MAX_REASON_CHARS = 300
# What comes is copied in pieces of at least so many bytes, each within the time after which a silence is a stall.
PIECE_BYTES = MIB
# A request has no bound of its own as a whole: what is slow and steady is no fault.
WHOLE_REQUEST = "24h"
# Nobody may list a bucket that is not there, and obstore tells neither that nor a refusal from a broken connection.
PROBE = "config.json"
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")
_SEGMENT = re.compile(r"[A-Za-z0-9_.+=@-]{1,255}")


class S3Source:
    """The objects right under `s3://BUCKET/PREFIX`, and a pooling below it.

    Obstore's own retries are off: whoever reads decides on those.
    """

    parallel = 8

    def __init__(self, url: str, options: SourceOptions) -> None:
        """Check the URL and take up the settings; nothing is asked of the network.

        Raises:
            SourceInvalid: it is no such URL, obstore is not installed, or a setting of the environment is wrong.
        """
        bucket, self._prefix = parse_s3_url(url)
        self._options = options
        self.url = f"s3://{bucket}/{self._prefix}" if self._prefix else f"s3://{bucket}"
        self._under_way = UnderWay(self.url)
        try:
            import obstore
            from obstore import exceptions
            from obstore.store import S3Store
        except ImportError:
            raise SourceInvalid("s3:// needs obstore: pip install 'sllm_actor[s3]'", param="source") from None
        self._obstore = obstore
        self._errors = exceptions
        # As settings and not as client options, which would take the place of those from the environment.
        settings: Any = {
            "timeout": WHOLE_REQUEST,
            "connect_timeout": f"{max(1, round(options.connect_timeout_s * 1000))}ms",
        }
        try:
            self._store = S3Store(bucket, config=settings, retry_config={"max_retries": 0})
        except (exceptions.BaseError, ValueError) as error:
            raise SourceInvalid(f"{self.url} can't be set up: {_first_line(error)}", param="source") from None

    async def files(self) -> tuple[SourceFile, ...]:
        """List the objects under the prefix that belong to a checkpoint; see `Source.files`."""
        return await self._under_way.run(self._list())

    async def read(self, file: SourceFile, offset: int, into: memoryview) -> None:
        """Fill `into`; see `Source.read`."""
        assert offset >= 0 and offset + len(into) <= file.size_bytes, "a range beyond the file"
        if not is_file_name(file.name) and not is_pooling_name(file.name):
            raise SourceInvalid(f"{file.name[:200]!r} is no name of a file", param="source")
        if len(into):
            await self._under_way.run(self._read(file, offset, into))

    async def close(self) -> None:
        """End what is being read."""
        await self._under_way.close()

    async def _list(self) -> tuple[SourceFile, ...]:
        try:
            async with asyncio.timeout(self._options.connect_timeout_s + self._options.stall_timeout_s):
                listed = await self._obstore.list_with_delimiter_async(self._store, self._prefix or None)
        except TimeoutError:
            raise SourceUnreachable(f"{self.url} did not answer in time") from None
        except (self._errors.BaseError, OSError) as error:
            await self._ask_why()
            raise SourceUnreachable(f"{self.url} can't be listed: {_first_line(error)}") from None
        found: list[SourceFile] = []
        for entry in listed["objects"]:
            name = entry["path"].rpartition("/")[2]
            if belongs(name):
                found.append(self._checked(name, entry["size"], entry["e_tag"] or ""))
            if len(found) > MAX_FILES:
                raise SourceInvalid(f"{self.url} has more than {MAX_FILES} files", param="source")
        if not found:
            raise SourceMissing(f"{self.url} has no file of a checkpoint", param="source")
        for file in found:
            if file.name == MODULES_NAME and file.size_bytes <= MAX_MODULES_BYTES:
                found += await self._pooling(file)
                break
        return tuple(sorted(found, key=lambda file: file.name))

    async def _pooling(self, modules: SourceFile) -> list[SourceFile]:
        """Give the file that modules.json names for the pooling, where it is there."""
        raw = bytearray(modules.size_bytes)
        if raw:
            await self._read(modules, 0, memoryview(raw))
        name = pooling_name_in(bytes(raw))
        if name is None:
            return []
        try:
            with self._told(f"{self.url}/{name}"):
                async with asyncio.timeout(self._options.connect_timeout_s + self._options.stall_timeout_s):
                    entry = await self._obstore.head_async(self._store, self._key(name))
        except SourceMissing:
            return []
        return [self._checked(name, entry["size"], entry["e_tag"] or "")]

    def _checked(self, name: str, size_bytes: int, etag: str) -> SourceFile:
        if not 0 <= size_bytes <= MAX_SIZE_BYTES or not 0 < len(etag) <= MAX_ETAG_CHARS:
            raise SourceInvalid(f"{self.url}/{name} has a size or an ETag that can't be", param="source")
        return SourceFile(name, size_bytes, etag)

    async def _ask_why(self) -> None:
        """Raise what a listing that failed does not tell: a refusal, or a bucket that is not there."""
        with self._told(self.url):
            async with asyncio.timeout(self._options.connect_timeout_s + self._options.stall_timeout_s):
                await self._obstore.head_async(self._store, self._key(PROBE))

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    async def _read(self, file: SourceFile, offset: int, into: memoryview) -> None:
        key = self._key(file.name)
        end = offset + len(into)
        options: GetOptions = {"range": (offset, end), "if_match": file.validator}
        filled = 0
        with _counting(lambda: filled), self._told(f"{self.url}/{file.name}"):
            async with asyncio.timeout(self._options.connect_timeout_s + self._options.stall_timeout_s):
                answer = await self._obstore.get_async(self._store, key, options=options)
            if answer.meta["e_tag"] != file.validator or answer.meta["size"] != file.size_bytes:
                raise SourceChanged(f"{self.url}/{file.name} is no longer the object that was listed")
            if tuple(answer.range) != (offset, end):
                raise SourceViolation(
                    f"{self.url}/{file.name}: bytes {answer.range} came, {offset} to {end} were asked for"
                )
            async for filled in self._take(answer, file, into):  # noqa: B007  # `filled` is asked for by a failure.
                pass

    async def _take(self, answer: GetResult, file: SourceFile, into: memoryview) -> AsyncIterator[int]:
        """Fill `into` as the answer comes, and tell after each piece how far it is filled."""
        filled = 0
        pieces = answer.stream(min_chunk_size=PIECE_BYTES)
        try:
            while True:
                async with asyncio.timeout(self._options.stall_timeout_s):
                    piece = memoryview(await pieces.__anext__())
                if filled + len(piece) > len(into):
                    raise SourceViolation(f"{self.url}/{file.name}: more came than the {len(into)} bytes asked for")
                into[filled : filled + len(piece)] = piece
                filled += len(piece)
                yield filled
        except StopAsyncIteration:
            if filled < len(into):
                raise SourceViolation(f"{self.url}/{file.name}: {filled} of {len(into)} bytes came") from None
        finally:
            # The connection is theirs, and an error would keep them for as long as somebody keeps the error.
            del pieces, answer

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Say what obstore has met in the words of a source."""
        try:
            yield
        except SllmError:
            raise
        except TimeoutError:
            raise SourceUnreachable(f"{what} did not answer in time") from None
        except self._errors.PreconditionError:
            raise SourceChanged(f"{what} is no longer the object that was listed") from None
        except (self._errors.PermissionDeniedError, self._errors.UnauthenticatedError):
            raise SourceRefused(f"{what}: the credentials are missing or wrong, or do not allow it") from None
        except FileNotFoundError:
            raise SourceMissing(f"{what} is not there", param="source") from None
        except (self._errors.BaseError, OSError) as error:
            raise SourceUnreachable(f"{what}: {_first_line(error)}") from None


@contextmanager
def _counting(came_bytes: Callable[[], int]) -> Iterator[None]:
    """Have a failure say how much had come."""
    try:
        yield
    except SourceError as wrong:
        wrong.came_bytes = came_bytes()
        raise


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:MAX_REASON_CHARS]


def parse_s3_url(url: str) -> tuple[str, str]:
    """Read `s3://BUCKET/PREFIX`: the bucket, and the prefix without slashes around it.

    Raises:
        SourceInvalid: it is none, or one of characters that not every server writes alike.
    """
    scheme, separator, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.rstrip("/")
    if scheme.lower() != "s3" or not separator or not _BUCKET.fullmatch(bucket) or ".." in bucket:
        # What was written may hold a password, so it is not repeated.
        raise SourceInvalid("that is no bucket: write s3://BUCKET/PREFIX", param="source")
    segments = prefix.split("/") if prefix else []
    if len(prefix) > MAX_PREFIX_CHARS or not all(
        _SEGMENT.fullmatch(part) and part not in (".", "..") for part in segments
    ):
        raise SourceInvalid(f"s3://{bucket}: a prefix is of letters, digits and any of /_.+=@-", param="source")
    return bucket, prefix
