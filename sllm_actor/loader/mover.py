"""What the loader asks of whatever moves the bytes, so that there can be two: C++ threads and Python threads.

A mover owns the slab of host memory and the threads that fill it. Which chunks are unused its caller says.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import Protocol

import msgspec

from sllm_actor.errors import SllmError


class FilePlan(msgspec.Struct, frozen=True):
    """A file to read whole, as it was when it was described, and the chunks it goes to in order."""

    path: str
    size_bytes: int
    mtime_ns: int
    inode: int
    chunks: tuple[int, ...]


class LoadState(Enum):
    """Where a load is. Past LOADING no thread touches its chunks any more."""

    LOADING = auto()
    DONE = auto()
    FAILED = auto()
    CANCELLED = auto()


class LoadStatus(msgspec.Struct, frozen=True):
    """How far a load has come; `error` and `message` say why it failed."""

    state: LoadState
    page_cache_bytes: int
    ssd_bytes: int
    duration_s: float
    error: type[SllmError] | None = None
    message: str = ""


class SlabFacts(msgspec.Struct, frozen=True):
    """What the machine gave: whether the slab is locked in memory and how much of it lies in huge pages."""

    native: bool
    locked: bool
    huge_bytes: int


class ByteMover(Protocol):
    """Reads files into chunks of one slab. Every method returns at once, `close` excepted."""

    @property
    def pool_fd(self) -> int:
        """The memfd of the slab, sealed against resizing; an engine maps chunks out of it."""

    @property
    def event_fd(self) -> int:
        """A non-blocking eventfd, readable whenever a load has advanced or ended."""

    @property
    def facts(self) -> SlabFacts:
        """What the machine gave."""

    def start(self, files: Sequence[FilePlan]) -> int:
        """Begin a load and return its id.

        Raises:
            NoCapacity: as many loads as are allowed are running.
        """

    def status(self, load_id: int) -> LoadStatus:
        """Return how far the load has come."""

    def cancel(self, load_id: int) -> None:
        """Stop the load before its next chunk; the event tells when it has ended."""

    def forget(self, load_id: int) -> None:
        """Drop what is known of a load that has ended."""

    def close(self) -> None:
        """Wait for the chunks being read, end the threads, give the memory back. Blocks."""


class MoverOptions(msgspec.Struct, frozen=True):
    """How large a mover is to be."""

    chunk_bytes: int
    chunks: int
    reading_threads: int
    max_loads: int
    lock: bool
