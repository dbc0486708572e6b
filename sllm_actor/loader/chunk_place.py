"""Where a chunk of a checkpoint belongs, in the host pool as on the SSD."""

from __future__ import annotations

from typing import NamedTuple


class ChunkPlace(NamedTuple):
    """A chunk of a checkpoint: which of its weight files, and which chunk of that."""

    file: int
    chunk: int
