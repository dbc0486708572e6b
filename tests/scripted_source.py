"""A source of a test's own: a folder's bytes, and whatever the test wants to go wrong with them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from sllm_actor.errors import SourceChanged
from sllm_actor.sources.source import SourceFile, belongs

Fault = Callable[[SourceFile, int, memoryview], Awaitable[None]]


class ScriptedSource:
    """The files of a folder; `fault` is awaited before each read and may raise, wait, or spoil what was read."""

    def __init__(self, folder: Path, url: str = "test://model", parallel: int = 4) -> None:
        self.folder = folder
        self.url = url
        self.parallel = parallel
        self.before: Fault | None = None
        self.after: Fault | None = None
        self.reads: list[tuple[str, int]] = []
        self.under_way = 0
        self.closed = 0

    async def files(self) -> tuple[SourceFile, ...]:
        return tuple(
            SourceFile(path.name, path.stat().st_size, f"v{path.stat().st_mtime_ns}")
            for path in sorted(self.folder.iterdir())
            if belongs(path.name)
        )

    async def read(self, file: SourceFile, offset: int, into: memoryview) -> None:
        self.under_way += 1
        assert self.under_way <= self.parallel
        try:
            if self.before is not None:
                await self.before(file, offset, into)
            self.reads.append((file.name, offset))
            data = (self.folder / file.name).read_bytes()[offset : offset + len(into)]
            if len(data) < len(into):
                raise SourceChanged(f"{file.name} has shrunk")
            into[:] = data
            await asyncio.sleep(0)
            if self.after is not None:
                await self.after(file, offset, into)
        finally:
            self.under_way -= 1

    async def close(self) -> None:
        self.closed += 1
