"""A few chunks of the host pool that a whole checkpoint goes through: each is free again when all who need it are done.

Bookkeeping only. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from sllm_actor.loader.chunk_place import ChunkPlace


class Window:
    """Chunks of the pool (`slots`) that those of a checkpoint take in turn."""

    def __init__(self, slots: Sequence[int]) -> None:
        self._free = list(slots)
        self._at: dict[ChunkPlace, int] = {}
        self._users: dict[ChunkPlace, int] = {}
        self._freed = asyncio.Event()
        self._turn = asyncio.Lock()

    async def take(self, chunks: Sequence[ChunkPlace]) -> None:
        """Wait until there is a slot for each of these, which the window is large enough for, and take them.

        Who asks first is served first: many chunks that are needed together are not overtaken by few.
        """
        async with self._turn:
            while len(self._free) < len(chunks):
                self._freed.clear()
                await self._freed.wait()
            for chunk in chunks:
                self._at[chunk] = self._free.pop()

    def slot(self, chunk: ChunkPlace) -> int:
        """Give the chunk of the pool that one of the checkpoint has taken."""
        return self._at[chunk]

    def share(self, chunk: ChunkPlace, users: int) -> None:
        """Say how many will need a chunk that is there now, each until its `leave`."""
        self._users[chunk] = users
        if not users:
            self._release(chunk)

    def leave(self, chunk: ChunkPlace) -> None:
        """Say that one who needed a chunk is done with it."""
        self._users[chunk] -= 1
        if not self._users[chunk]:
            self._release(chunk)

    def _release(self, chunk: ChunkPlace) -> None:
        del self._users[chunk]
        self._free.append(self._at.pop(chunk))
        self._freed.set()
