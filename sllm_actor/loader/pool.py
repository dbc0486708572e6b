"""Which chunks of the host pool are free. Pure bookkeeping: it never sees a byte."""

from __future__ import annotations

import heapq
from collections.abc import Iterable


class HostPool:
    """Hands out the indexes of fixed-size chunks. Not thread-safe: belongs to one event loop."""

    def __init__(self, chunk_bytes: int, chunks: int) -> None:
        assert chunk_bytes > 0 and chunks > 0, (chunk_bytes, chunks)
        self.chunk_bytes = chunk_bytes
        self.chunks = chunks
        # Lowest first: neighbours become one mapping in an engine.
        self._free = list(range(chunks))
        self._taken: set[int] = set()

    @property
    def free_chunks(self) -> int:
        """How many chunks can be taken now."""
        return len(self._free)

    def chunks_for(self, size_bytes: int) -> int:
        """Return how many chunks a file of `size_bytes` fills, the last one perhaps in part."""
        return -(-size_bytes // self.chunk_bytes)

    def take(self, count: int) -> tuple[int, ...]:
        """Take `count` chunks; the caller has seen to it that there are as many."""
        assert 0 < count <= len(self._free), (count, len(self._free))
        taken = tuple(heapq.heappop(self._free) for _ in range(count))
        self._taken.update(taken)
        return taken

    def give_back(self, chunks: Iterable[int]) -> None:
        """Give back chunks that were taken, each once."""
        for chunk in chunks:
            assert chunk in self._taken, f"chunk {chunk} is free already"
            self._taken.remove(chunk)
            heapq.heappush(self._free, chunk)
