"""What the host pool holds: whole checkpoints, leased or pinned, or kept until room is needed, the oldest use first.

Bookkeeping only: it sees no byte, no file and no load. Belongs to one event loop.
"""

from __future__ import annotations

from operator import attrgetter
from typing import NamedTuple

from sllm_actor.errors import Conflict
from sllm_actor.loader.holder import Holder
from sllm_actor.loader.lease import HostLease, LoadReport, Resident
from sllm_actor.loader.mapping import HostFile
from sllm_actor.loader.pool import HostPool
from sllm_actor.runtime.clock import Clock


class Key(NamedTuple):
    """What tells a checkpoint from others, and from an earlier one of its place.

    Folders share a fingerprint, and a folder keeps it, where a tool has set every mtime alike: so path and inodes.
    """

    fingerprint: str
    path: str
    inodes: tuple[int, ...]


class Held:
    """A checkpoint whose bytes are all in the pool."""

    def __init__(self, key: Key, files: tuple[HostFile, ...], size_bytes: int, now_s: float) -> None:
        self.key = key
        self.files = files
        self.size_bytes = size_bytes
        self.holders: list[Holder] = []
        self.pinned = False
        self.last_used_s = now_s
        # Whether the bytes in the pool were compared with the checkpoint's digests; whether they are of no use.
        self.verified = False
        self.forgotten = False

    @property
    def free(self) -> bool:
        """Whether it may be evicted."""
        return not self.pinned and not self.holders

    def describe(self) -> Resident:
        return Resident(
            self.key.fingerprint, self.key.path, self.size_bytes, tuple(self.holders), self.pinned, self.last_used_s
        )


_last_used_s = attrgetter("last_used_s")


class HostMemory:
    """Decides what stays in the pool."""

    def __init__(self, pool: HostPool, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock
        self._held: dict[Key, Held] = {}

    @property
    def obtainable_chunks(self) -> int:
        """Chunks that hold nothing, and those that nobody leases and nobody has pinned."""
        return self._pool.free_chunks + sum(chunk_count(held.files) for held in self._idle())

    def find(self, key: Key) -> Held | None:
        """Give what is held under a key."""
        return self._held.get(key)

    def residents(self) -> list[Resident]:
        """List what is held, the least recently used first."""
        return [held.describe() for held in sorted(self._held.values(), key=_last_used_s)]

    def fingerprints(self) -> list[tuple[str, bool]]:
        """List what is held by its fingerprints, and whether each is pinned, the least recently used first."""
        return [(one.key.fingerprint, one.pinned) for one in sorted(self._held.values(), key=_last_used_s)]

    def make_room(self, chunks: int) -> None:
        """Evict until so many chunks are free; the caller has seen that they can be had."""
        for held in self._idle():
            if self._pool.free_chunks >= chunks:
                break
            del self._held[held.key]
            self.give_back(held.files)

    def take(self, size_bytes: int) -> tuple[int, ...]:
        """Take the free chunks that so many bytes fill."""
        return self._pool.take(self._pool.chunks_for(size_bytes))

    def give_back(self, files: tuple[HostFile, ...]) -> None:
        """Take back the chunks of files that are held by nobody."""
        for file in files:
            self._pool.give_back(file.chunks)

    def hold(self, key: Key, files: tuple[HostFile, ...], size_bytes: int) -> Held:
        """Note that the files are whole in the pool."""
        assert key not in self._held, "a checkpoint is held once"
        held = self._held[key] = Held(key, files, size_bytes, self._clock.monotonic_s())
        return held

    def forget(self, held: Held) -> None:
        """Grant it to nobody any more; its chunks are free with its last lease."""
        if not held.forgotten:
            held.forgotten = True
            del self._held[held.key]
            if not held.holders:
                self.give_back(held.files)

    def evict(self, held: Held) -> None:
        """Free its chunks.

        Raises:
            Conflict: it is leased or pinned.
        """
        if not held.free:
            who = "pinned" if held.pinned else f"held by {', '.join(holder.who for holder in held.holders)}"
            raise Conflict(f"{held.key.path} is {who} and can't be evicted from the host pool")
        self.forget(held)

    def grant(self, held: Held, report: LoadReport, who: str) -> HostLease:
        """Lease what is held."""
        held.last_used_s = self._clock.monotonic_s()
        holder = Holder(who, held.last_used_s)
        held.holders.append(holder)
        return HostLease(held.files, report, lambda: self._release(held, holder), holder)

    def _release(self, held: Held, holder: Holder) -> None:
        held.holders.remove(holder)
        held.last_used_s = self._clock.monotonic_s()
        if held.forgotten and not held.holders:
            self.give_back(held.files)

    def _idle(self) -> list[Held]:
        return sorted((held for held in self._held.values() if held.free), key=lambda held: held.last_used_s)


def chunk_count(files: tuple[HostFile, ...]) -> int:
    """Return how many chunks the files take."""
    return sum(len(file.chunks) for file in files)
