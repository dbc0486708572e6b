"""What the loader asks of whatever moves the bytes, so that there can be two: C++ threads and Python threads.

A mover owns the slab of host memory and the threads that fill it. Which chunks are unused its caller says.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

import msgspec

from sllm_actor.errors import SllmError

if TYPE_CHECKING:
    from sllm_actor.loader.device import Device


class FilePlan(msgspec.Struct, frozen=True):
    """A file to read whole, as it was when it was described, and the chunks it goes to in order.

    `digests` are the XXH3-128 (16 bytes, canonical) of each `digest_bytes` of the file, or nothing. `target` is
    the mover's handle of a device buffer that the file goes on to, beginning at `target_offset`.
    """

    path: str
    size_bytes: int
    mtime_ns: int
    inode: int
    chunks: tuple[int, ...] = ()
    digests: bytes = b""
    target: int | None = None
    target_offset: int = 0


class LoadPlan(msgspec.Struct, frozen=True):
    """What a load is to do. Chunks of the highest priority are read first; equal ones take turns.

    `resident`: the chunks hold the files already; they are only checked and copied. `window`: every file has a
    target and no chunks of its own, and all go through these, as where a model is larger than the pool.
    """

    files: tuple[FilePlan, ...]
    priority: int = 0
    resident: bool = False
    digest_bytes: int = 0
    window: tuple[int, ...] = ()


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
    device_bytes: int
    duration_s: float
    error: type[SllmError] | None = None
    message: str = ""


class SlabFacts(msgspec.Struct, frozen=True):
    """What the machine gave: whether the slab is locked in memory and how much of it lies in huge pages.

    `reserved`: those are reserved ones. Who writes to a private mapping of one may find no page left, and ends.
    `io_uring`: direct reads go through it.
    """

    native: bool
    locked: bool
    huge_bytes: int
    reserved: bool = False
    io_uring: bool = False


class PathFacts(msgspec.Struct, frozen=True):
    """What has gone one way since the mover was made, and the time during which anything was on it."""

    size_bytes: int
    busy_s: float

    @property
    def bytes_per_s(self) -> float:
        """The bandwidth that was observed, whoever shared it; 0 before the first byte."""
        return self.size_bytes / self.busy_s if self.busy_s > 0 else 0.0


class Paths(msgspec.Struct, frozen=True):
    """The ways into the host pool, and the one from it to devices."""

    page_cache: PathFacts
    ssd: PathFacts
    device: PathFacts


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

    def register(self, device: Device) -> None:
        """Page-lock the slab for a device's copies, until the mover or the device is closed. Blocks.

        Raises:
            DeviceFailed, ConfigInvalid: the driver can't; copies work all the same, only slower.
        """

    def start(self, plan: LoadPlan) -> int:
        """Begin a load and return its id.

        Raises:
            NoCapacity: as many loads as are allowed are running.
            ConfigInvalid: this mover can't do what the plan asks for.
        """

    def status(self, load_id: int) -> LoadStatus:
        """Return how far the load has come."""

    def set_priority(self, load_id: int, priority: int) -> None:
        """Change how urgent the rest of the load is."""

    def drop_targets(self, load_id: int) -> None:
        """Go on without the targets: what is not on its way to them already never goes there."""

    def paths(self) -> Paths:
        """Return what has gone which way, and how fast."""

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
    huge_pages: bool = True
    io_uring: bool = True
