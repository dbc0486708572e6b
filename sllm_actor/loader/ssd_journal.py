"""The journal of a partial: which chunks are on the disk, with the digests of what was written.

Appended to after a chunk's bytes; read once, when a partial is resumed. An entry that is torn or damaged ends it: what
follows is as if it had never been written. Blocks. docs/ssd_tier.md has the bytes.
"""

from __future__ import annotations

import os
import struct
import threading
from pathlib import Path

import xxhash

from sllm_actor.checkpoint.digests import DIGEST_BYTES
from sllm_actor.errors import ReadFailed
from sllm_actor.loader import ssd_files
from sllm_actor.loader.chunk_place import ChunkPlace

_PLACE = struct.Struct(">II")
_CHECK_BYTES = 8
# Chunks that were discarded and written again take further entries; what is beyond this bound is not read.
_MAX_ENTRIES_PER_CHUNK = 4
_SPARE_ENTRIES = 1024


class Journal:
    """Appends from any thread. `pieces` is how many digests the longest chunk has."""

    def __init__(self, path: Path, pieces: int) -> None:
        self._path = path
        self._digests_bytes = pieces * DIGEST_BYTES
        self._entry_bytes = _PLACE.size + self._digests_bytes + _CHECK_BYTES
        self._lock = threading.Lock()
        self._end = 0  # Guarded by _lock.

    def replay(self, chunks: int) -> dict[ChunkPlace, bytes]:
        """Return the digests of each chunk that was written and not discarded; nothing where there is no journal.

        Raises:
            ReadFailed: the disk fails.
        """
        limit = (chunks * _MAX_ENTRIES_PER_CHUNK + _SPARE_ENTRIES) * self._entry_bytes
        found: dict[ChunkPlace, bytes] = {}
        try:
            size_bytes = min(os.lstat(self._path).st_size, limit)
        except FileNotFoundError:
            return found
        except OSError as wrong:
            raise ReadFailed(f"{self._path} can't be read: {wrong.strerror}") from wrong
        raw = bytearray(size_bytes)
        ssd_files.read_at(self._path, memoryview(raw), 0)
        for at in range(0, size_bytes - self._entry_bytes + 1, self._entry_bytes):
            entry = bytes(raw[at : at + self._entry_bytes])
            if entry != _checked(entry[:-_CHECK_BYTES]):
                break
            place = ChunkPlace(*_PLACE.unpack_from(entry))
            digests = entry[_PLACE.size : -_CHECK_BYTES]
            if any(digests):
                found[place] = digests
            else:
                found.pop(place, None)
        return found

    def begin(self, done: dict[ChunkPlace, bytes], chunks: int) -> None:
        """Write the journal anew, with these entries and room for all; it replaces the old one in one step.

        Raises:
            WriteFailed: the disk refused.
        """
        raw = b"".join(self._entry(place, digests) for place, digests in done.items())
        ssd_files.replace_small(self._path, raw.ljust(chunks * self._entry_bytes, b"\0"))
        with self._lock:
            self._end = len(raw)

    def append(self, place: ChunkPlace, digests: bytes) -> None:
        """Note that the bytes of a chunk are in its file.

        Raises:
            WriteFailed: the disk refused; the chunk is then not noted.
        """
        self._put(self._entry(place, digests))

    def discard(self, place: ChunkPlace) -> None:
        """Note that the bytes of a chunk are not to be trusted.

        Raises:
            WriteFailed: the disk refused.
        """
        self._put(self._entry(place, b""))

    def _entry(self, place: ChunkPlace, digests: bytes) -> bytes:
        return _checked(_PLACE.pack(*place) + digests.ljust(self._digests_bytes, b"\0"))

    def _put(self, entry: bytes) -> None:
        with self._lock, ssd_files.writing(self._path):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                ssd_files.put(descriptor, memoryview(entry), self._end)
            finally:
                os.close(descriptor)
            # Not before: an entry of which only a part was taken is written over by the next.
            self._end += len(entry)


def _checked(body: bytes) -> bytes:
    return body + xxhash.xxh3_64(body).digest()
