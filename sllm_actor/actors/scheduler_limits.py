"""The bounds that a Scheduler keeps, and its policy."""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """The Scheduler's knobs; most names are those of `Config`."""

    lease_s: float
    evict_timeout_s: float
    max_waiting: int
    placement_policy: str = "startup_time"
    locality_wait_s: float = 10.0
    decision_history: int = 10_000
    switch_hold_s: float = 2.0
    move_timeout_s: float = 120.0
    bytes_first_s: float = 3.0
