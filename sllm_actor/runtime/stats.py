"""What a system tells of itself: counts since its start, and what is now."""

from __future__ import annotations

import msgspec


class ActorStats(msgspec.Struct, frozen=True, kw_only=True):
    """One actor. `busy_s` is the time that its one-at-a-time handlers took, waiting included."""

    name: str
    mailbox_depth: int
    handled: int
    busy_s: float
    restarts: int


class LinkStats(msgspec.Struct, frozen=True, kw_only=True):
    """One peer. `credit_stalls`: times a stream waited for its reader; `late_answers`: those nobody waited for.

    `silences`: times it was taken for dead, as it said nothing on an open connection for longer than is borne with.
    """

    node: str
    open: bool
    received_bytes: int
    sent_bytes: int
    waiting_bytes: int
    round_trip_s: float
    waiting_asks: int
    running_calls: int
    credit_stalls: int
    late_answers: int
    connections: int
    silences: int


class SystemStats(msgspec.Struct, frozen=True, kw_only=True):
    """A whole system."""

    node: str
    dead_letters: int
    actors: tuple[ActorStats, ...]
    links: tuple[LinkStats, ...]
