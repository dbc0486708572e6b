"""What happened in a simulation, line by line, and one number for all of it: two runs of one seed must agree.

Values only: an object whose text holds its address would make every run differ.
"""

from __future__ import annotations

from xxhash import xxh3_64_intdigest, xxh3_128

from sllm_actor.runtime.clock import Clock

Detail = str | int | float | None
Entry = tuple[float, str, str, tuple[Detail, ...]]
KEPT_LINES = 10_000


class TraceRecorder:
    """Appends what is told to it, with the time. The oldest lines are dropped; the digest is over all of them."""

    def __init__(self, clock: Clock, kept_lines: int = KEPT_LINES) -> None:
        assert kept_lines > 0
        self._clock = clock
        self._kept_lines = kept_lines
        self._entries: list[Entry] = []
        self._digest = xxh3_128()
        self.recorded = 0

    def record(self, who: str, what: str, *details: Detail) -> None:
        """Append a line."""
        self._entries.append((self._clock.monotonic_s(), who, what, details))
        self.recorded += 1
        # Text is made for many lines at a time.
        if len(self._entries) >= 2 * self._kept_lines:
            self._fold()

    def read(self, who: str, number: int, data: memoryview) -> None:
        """Append a line of bytes that a connection's reader has taken: how many, and their hash."""
        self.record(who, "read", number, len(data), xxh3_64_intdigest(data))

    def lines(self) -> list[str]:
        """Give the newest lines, oldest first: `TIME WHO WHAT DETAILS`."""
        return [_line(entry) for entry in self._entries[-self._kept_lines :]]

    def digest(self) -> str:
        """Give the hash of every line that was ever recorded."""
        whole = self._digest.copy()
        whole.update(_text(self._entries))
        return whole.hexdigest()

    def _fold(self) -> None:
        oldest = self._entries[: -self._kept_lines]
        self._digest.update(_text(oldest))
        del self._entries[: len(oldest)]


class NoTrace(TraceRecorder):
    """Keeps nothing: for runs that are looked at otherwise."""

    def record(self, who: str, what: str, *details: Detail) -> None:
        return

    def read(self, who: str, number: int, data: memoryview) -> None:
        return


def _text(entries: list[Entry]) -> bytes:
    return "".join(f"{_line(entry)}\n" for entry in entries).encode()


def _line(entry: Entry) -> str:
    now_s, who, what, details = entry
    return " ".join([f"{now_s:.9f}", who, what, *map(str, details)])
