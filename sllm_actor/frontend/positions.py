"""Where in a stream its client is: how many events it has of each choice, and whether it has the usage behind them.

An event's id says so of a client that has read it. What a choice's events are follows from its tokens alone, however
those of several choices come between each other, so a number tells which of them are missing. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from sllm_actor.errors import InvalidRequest

HEADER = "Last-Event-ID"
# As many choices as a request has at most, with as many events as any context has tokens.
MAX_ID_CHARACTERS = 2048
_ID = re.compile(r"([0-9]{1,9}(?:,[0-9]{1,9})*)(\+1)?")


class Place:
    """Counts a stream's events as they are made, and tells which of them its client lacks."""

    def __init__(self, choices: int, behind: Sequence[int] = (), *, has_usage: bool = False) -> None:
        self._behind = list(behind) or [0] * choices
        self._events = [0] * choices
        self._has_usage = has_usage
        self._usage = False

    def count(self, index: int) -> bool:
        """Count an event of a choice; tell whether it is new to the client."""
        self._events[index] += 1
        return self._events[index] > self._behind[index]

    def count_usage(self) -> bool:
        """Count the usage behind all choices; tell whether it is new to the client."""
        self._usage = True
        return not self._has_usage

    def event_id(self) -> bytes:
        """Give the id of the event that was counted last."""
        if len(self._events) == 1:
            text = b"%d" % self._events[0]
        else:
            # Of what the client has already it is not told less.
            text = b",".join(b"%d" % max(pair) for pair in zip(self._events, self._behind, strict=True))
        return text + b"+1" if self._usage else text

    def check_end(self) -> None:
        """Now that all choices have ended, refuse a position that is behind their ends.

        Raises:
            InvalidRequest: there are no such events.
        """
        if any(has > there for has, there in zip(self._behind, self._events, strict=True)):
            raise InvalidRequest(f"{HEADER}: the stream has fewer events", param=HEADER)


def place_behind(event_id: str, choices: int, *, usage: bool) -> Place:
    """Read an event's id; empty stands for the beginning.

    Raises:
        InvalidRequest: it is none of a stream with so many choices, at whose end is `usage`, or is not.
    """
    if not event_id:
        return Place(choices)
    found = _ID.fullmatch(event_id) if len(event_id) <= MAX_ID_CHARACTERS else None
    behind = [int(number) for number in found[1].split(",")] if found else []
    if found is None or len(behind) != choices or (found[2] and not usage):
        raise InvalidRequest(f"{HEADER}: {event_id[:64]!r} is no id of this stream's events", param=HEADER)
    return Place(choices, behind, has_usage=bool(found[2]))
