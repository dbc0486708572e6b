"""What a node's migrations came to, counted since the node began."""

from __future__ import annotations

from typing import Any

from sllm_actor.messages.migration import HandedOver


class MigrationCounts:
    """Owns the counts of the migrations that this node coordinates. Belongs to one event loop."""

    def __init__(self) -> None:
        self.aborted = 0
        self._moved = self._rounds = self._tokens = self._bytes = 0
        self._recomputed_s = 0.0

    def moved(self, handed: HandedOver) -> None:
        """Note one that has come to its good end."""
        self._moved += 1
        self._rounds += handed.rounds
        self._tokens += handed.tokens
        self._bytes += handed.bytes_moved
        self._recomputed_s += handed.recomputed_s

    def observe(self) -> dict[str, Any]:
        """Give the counts."""
        return {
            "outcomes": {"moved": self._moved, "aborted": self.aborted},
            "rounds": self._rounds,
            "tokens": self._tokens,
            "bytes": self._bytes,
            "recomputed_s": self._recomputed_s,
        }
