"""Gives the files of the models that this node holds to other nodes, range by range.

Knows neither tiers nor folders: it is given holdings. Who may ask is the runtime's business: whoever has shaken hands.
"""

from __future__ import annotations

import mmap
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

from sllm_actor.errors import Overloaded, SourceInvalid, SourceMissing
from sllm_actor.runtime import Actor, Blob, handles
from sllm_actor.sources.holdings import Holdings
from sllm_actor.sources.peer_messages import (
    MAX_RANGE_BYTES,
    ListPeerFiles,
    PeerFile,
    PeerModel,
    PeerRange,
    ReadPeerRange,
)
from sllm_actor.sources.source import SourceFile, belongs_below

RETRY_AFTER_S = 0.1


class PeerServer(Actor):
    """Owns the number of reads and listings under way; beyond `max_reads` it refuses, so that nothing piles up here.

    A read takes its length in memory until the answer is on its way; what waits for a peer that does not read is
    bounded by its connection.
    """

    def __init__(self, holdings: Holdings, *, max_reads: int) -> None:
        self._holdings = holdings
        self._max_reads = max_reads
        self._reads = 0

    @handles(ListPeerFiles)
    async def list_files(self, message: ListPeerFiles) -> AsyncGenerator[PeerModel | PeerFile, None]:
        with self._counted():
            async with self._holdings.hold(message.model) as held:
                model_id, files = await held.model_id(), await held.files()
        yield PeerModel(model_id=model_id, files=len(files))
        for file in files:
            yield PeerFile(name=file.name, size_bytes=file.size_bytes, validator=file.validator)

    @handles(ReadPeerRange, concurrent=True)
    async def read_range(self, message: ReadPeerRange) -> PeerRange:
        # Whether it is a pooling that the model's modules.json names, the holding knows.
        if not belongs_below(message.name):
            raise SourceMissing(f"{message.name[:200]!r} belongs to no checkpoint", param="name")
        if message.length > MAX_RANGE_BYTES:
            raise SourceInvalid(f"a range of {message.length} bytes exceeds {MAX_RANGE_BYTES}", param="length")
        if message.offset + message.length > message.size_bytes:
            raise SourceInvalid(
                f"{message.offset} + {message.length} bytes go beyond the {message.size_bytes} of {message.name}",
                param="length",
            )
        file = SourceFile(message.name, message.size_bytes, message.validator)
        with self._counted():
            data = _room_for(message.length)
            async with self._holdings.hold(message.model) as held:
                await held.read(file, message.offset, data)
        return PeerRange(data=Blob(data))

    @contextmanager
    def _counted(self) -> Iterator[None]:
        if self._reads >= self._max_reads:
            raise Overloaded(f"{self._reads} reads for other nodes are under way", retry_after_s=RETRY_AFTER_S)
        self._reads += 1
        try:
            yield
        finally:
            self._reads -= 1


def _room_for(length: int) -> memoryview:
    """Make a buffer whose pages are touched where they are filled, on another thread: to zero them here takes long."""
    return memoryview(mmap.mmap(-1, length)) if length else memoryview(bytearray())
