"""XXH3-128 digests of the chunks of a file, fed in pieces of any size. Knows no file."""

from __future__ import annotations

import xxhash

DIGEST_BYTES = 16


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """Digest one chunk: XXH3-128 in its canonical (big-endian) form."""
    return xxhash.xxh3_128(data).digest()


def chunk_count(size_bytes: int, chunk_bytes: int) -> int:
    """Count the chunks of a file; the last one may be short."""
    return -(-size_bytes // chunk_bytes)


class ChunkDigests:
    """The digest of each `chunk_bytes` of what it is fed, counted from the first byte."""

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._done: list[bytes] = []
        self._current = xxhash.xxh3_128()
        self._filled_bytes = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes."""
        view = memoryview(data)
        at = 0
        while at < len(view):
            part = view[at : at + self._chunk_bytes - self._filled_bytes]
            self._current.update(part)
            self._filled_bytes += len(part)
            at += len(part)
            if self._filled_bytes == self._chunk_bytes:
                self._close_chunk()

    def finish(self) -> tuple[bytes, ...]:
        """Return the digests, one a chunk; nothing may be fed afterwards."""
        if self._filled_bytes:
            self._close_chunk()
        return tuple(self._done)

    def _close_chunk(self) -> None:
        self._done.append(self._current.digest())
        self._current.reset()
        self._filled_bytes = 0
