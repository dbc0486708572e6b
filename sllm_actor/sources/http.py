"""A folder of files on a web server. It has no listing: what is in it is asked for by name."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from aiohttp.abc import AbstractResolver
from yarl import URL

from sllm_actor.domain.sentence_modules import LENGTH_NAMES, MAX_MODULES_BYTES, MODULES_NAME, pooling_name_in
from sllm_actor.errors import SourceInvalid, SourceMissing
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.sources.addresses import is_private
from sllm_actor.sources.http_client import HttpClient
from sllm_actor.sources.http_reader import HttpReader
from sllm_actor.sources.http_url import parse_folder
from sllm_actor.sources.listing import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    MAX_INDEX_BYTES,
    MAX_MANIFEST_BYTES,
    PICKLED_NAMES,
    SMALL_FILES,
    WEIGHTS_NAME,
    how_to_convert,
    shards_in_index,
    sizes_in_manifest,
)
from sllm_actor.sources.netrc_login import authorization_for
from sllm_actor.sources.source import SourceFile, SourceOptions

_Given = TypeVar("_Given")
AT_ONCE = 8
_GONE = (404, 410)
_HINT = "; they are taken from ~/.netrc"


class HttpSource:
    """The checkpoint at `http(s)://host/folder/`. The resolver and the notion of a private address are for tests."""

    def __init__(
        self,
        text: str,
        options: SourceOptions,
        *,
        resolver: AbstractResolver | None = None,
        private: Callable[[str], bool] = is_private,
    ) -> None:
        """Take a URL apart; nothing is asked yet.

        Raises:
            SourceInvalid: it is no URL of a folder.
        """
        self._base = parse_folder(text)
        self._client = HttpClient(
            self._base,
            options,
            credentials=lambda: authorization_for(self._base.raw_host or ""),
            hint=_HINT,
            resolver=resolver,
            private=private,
        )
        self._reader = HttpReader(self._client, options)

    @property
    def url(self) -> str:
        """The canonical URL of the folder."""
        return str(self._base)

    @property
    def parallel(self) -> int:
        """How many reads at once are of use; 1 once the origin has shown that it has no ranges."""
        return self._reader.parallel

    async def files(self) -> tuple[SourceFile, ...]:
        """List what sllm.json lists; without one, the weights by their index or name, and what lies beside them.

        Raises:
            SourceMissing, SourceInvalid, SourceRefused, SourceUnreachable, SourceViolation: as `Source.files` does.
        """
        config = await self._probe_if_there(CONFIG_NAME, _GONE)
        # Once something was allowed, this is how object stores say that another name is not there.
        absent = _GONE if config is None else (*_GONE, 403)
        found = await self._reader.content(self._url_of(MANIFEST_NAME), MAX_MANIFEST_BYTES, absent)
        listed = await self._converted(*found) if found is not None else await self._stock(config, absent)
        return tuple(sorted(listed, key=lambda file: file.name))

    async def read(self, file: SourceFile, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes of `file` from `offset` on, as `Source.read` does."""
        await self._reader.read(self._url_of(file.name), file.size_bytes, file.validator, offset, into)

    async def close(self) -> None:
        """Close every connection; reads that are under way fail."""
        await self._reader.close()
        await self._client.close()

    async def _converted(self, raw: bytes, validator: str) -> list[SourceFile]:
        place = str(self._url_of(MANIFEST_NAME))
        sizes = await _aside(sizes_in_manifest, raw, place)
        if CONFIG_NAME not in sizes:
            raise SourceInvalid(f"{place} lists no {CONFIG_NAME}", param="source")
        files = await each(self._probe, sizes)
        for file in files:
            if file.size_bytes != sizes[file.name]:
                raise SourceInvalid(
                    f"{self._url_of(file.name)} has {file.size_bytes} bytes, and {MANIFEST_NAME} lists it with "
                    f"{sizes[file.name]}",
                    param="source",
                )
        return [*files, SourceFile(MANIFEST_NAME, len(raw), validator)]

    async def _adapter(self) -> list[SourceFile] | None:
        described = await self._probe_if_there(ADAPTER_CONFIG_NAME, _GONE)
        return None if described is None else [described, await self._probe(ADAPTER_WEIGHTS_NAME)]

    async def _stock(self, config: SourceFile | None, absent: Sequence[int]) -> list[SourceFile]:
        adapter = await self._adapter() if config is None else None
        if adapter is not None:
            return adapter
        found = await self._reader.content(self._url_of(INDEX_NAME), MAX_INDEX_BYTES, absent)
        if found is not None:
            raw, validator = found
            shards = await _aside(shards_in_index, raw, str(self._url_of(INDEX_NAME)))
            weights = [SourceFile(INDEX_NAME, len(raw), validator), *await each(self._probe, shards)]
        else:
            weights = [await self._single(config is not None, absent)]
        if config is None:
            raise SourceInvalid(f"{self.url} has weights and no {CONFIG_NAME}", param="source")
        beside = await self._those_there(SMALL_FILES, absent)
        modules = next((file for file in beside if file.name == MODULES_NAME), None)
        return [*weights, config, *beside, *(await self._named_by(modules, absent) if modules is not None else ())]

    async def _named_by(self, modules: SourceFile, absent: Sequence[int]) -> list[SourceFile]:
        """List what a model of sentence-transformers has beside and below its modules.json."""
        pooling = None
        if modules.size_bytes <= MAX_MODULES_BYTES:
            found = await self._reader.content(self._url_of(MODULES_NAME), MAX_MODULES_BYTES, absent)
            pooling = pooling_name_in(found[0]) if found is not None else None
        return await self._those_there((*LENGTH_NAMES, *([pooling] if pooling is not None else [])), absent)

    async def _single(self, has_config: bool, absent: Sequence[int]) -> SourceFile:
        file = await self._probe_if_there(WEIGHTS_NAME, absent)
        if file is not None:
            return file
        for pickled in PICKLED_NAMES:
            if await self._probe_if_there(pickled, absent) is not None:
                raise how_to_convert(self.url, pickled)
        names = f"{MANIFEST_NAME}, {INDEX_NAME}, {WEIGHTS_NAME}"
        if has_config:
            raise SourceInvalid(f"{self.url} has a {CONFIG_NAME} and none of {names}", param="source")
        raise SourceMissing(f"{self.url} has none of {names}", param="source")

    def _url_of(self, name: str) -> URL:
        return URL(str(self._base) + name, encoded=True)

    async def _probe(self, name: str) -> SourceFile:
        found = await self._reader.probe(self._url_of(name))
        assert found is not None, "no status was declared to mean that"
        return SourceFile(name, *found)

    async def _those_there(self, names: Iterable[str], absent: Sequence[int]) -> list[SourceFile]:
        found = await each(lambda name: self._probe_if_there(name, absent), names)
        return [file for file in found if file is not None]

    async def _probe_if_there(self, name: str, absent: Sequence[int]) -> SourceFile | None:
        found = await self._reader.probe(self._url_of(name), absent)
        return SourceFile(name, *found) if found is not None else None


async def _aside(parse: Callable[[bytes, str], _Given], raw: bytes, place: str) -> _Given:
    """Parse on a thread: what is long would keep the loop."""
    return await asyncio.get_running_loop().run_in_executor(None, parse, raw, place)


async def each(work: Callable[[str], Awaitable[_Given]], names: Iterable[str]) -> list[_Given]:
    """Do something with every name, a few at once; the first failure ends all of it."""
    left = iter(names)
    done: list[_Given] = []

    async def worker() -> None:
        for name in left:
            done.append(await work(name))

    scope = TaskScope("listing")
    try:
        # The failure that is raised here is told by whoever asked for the listing.
        await asyncio.gather(*(scope.spawn(worker(), f"{k}", on_failure=_ignore) for k in range(AT_ONCE)))
        return done
    finally:
        await scope.close()


def _ignore(error: BaseException) -> None:
    del error
