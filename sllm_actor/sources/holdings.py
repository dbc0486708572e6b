"""The models that a node holds, as it gives them to others: what a PeerServer asks for, and folders that answer.

Whoever keeps models in host memory or on an SSD implements the same two protocols.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Protocol

from sllm_actor.errors import SourceMissing
from sllm_actor.sources.local import FolderSource
from sllm_actor.sources.source import SourceFile


class Held(Protocol):
    """A model that can't be evicted while it is held. Safe for concurrent reads from one event loop."""

    async def model_id(self) -> str:
        """Give the digest of its content, empty where nobody has computed it."""

    async def files(self) -> tuple[SourceFile, ...]:
        """List its files; raises like `Source.files`."""

    async def read(self, file: SourceFile, offset: int, into: memoryview) -> None:
        """Fill `into`, off the loop; raises like `Source.read`, `SourceChanged` for a validator of an earlier file."""


class Holdings(Protocol):
    """The models that a node gives to others."""

    def hold(self, model: str) -> AbstractAsyncContextManager[Held]:
        """Keep a model where it is for as long as the context lasts.

        Raises:
            SourceMissing: on entering; the node does not hold it.
        """


class HeldFolder:
    """A folder as a held model. `identify` gives the model id and runs on a thread."""

    def __init__(self, path: Path, identify: Callable[[Path], str]) -> None:
        self._path = path
        self._identify = identify
        self._source = FolderSource(path)

    async def model_id(self) -> str:
        return await asyncio.get_running_loop().run_in_executor(None, self._identify, self._path)

    async def files(self) -> tuple[SourceFile, ...]:
        return await self._source.files()

    async def read(self, file: SourceFile, offset: int, into: memoryview) -> None:
        await self._source.read(file, offset, into)


class FolderHoldings:
    """Holds folders of this machine. `find` gives a model's folder, None where there is none of that name."""

    def __init__(
        self, find: Callable[[str], Awaitable[Path | None]], identify: Callable[[Path], str] = lambda _: ""
    ) -> None:
        self._find = find
        self._identify = identify

    @asynccontextmanager
    async def hold(self, model: str) -> AsyncIterator[Held]:
        path = await self._find(model)
        if path is None:
            raise SourceMissing(f"this node does not hold {model[:120]!r}", param="source")
        yield HeldFolder(path, self._identify)
