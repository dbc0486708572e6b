"""What happens when an actor fails: how often it is made anew, and what its watchers hear.

Source of the ideas: Erlang/OTP's supervisors (one for one, intensity and period, escalation).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from sllm_actor.runtime.references import ActorRef


class Supervision(msgspec.Struct, frozen=True, kw_only=True):
    """Make a failed actor anew, at most `restarts` times within `window_s` seconds; then its parent has failed."""

    restarts: int = 3
    window_s: float = 5.0


class RestartWindow:
    """Counts the restarts of one actor within the window. Pure: the caller brings the time."""

    def __init__(self, supervision: Supervision) -> None:
        self._supervision = supervision
        self._at_s: deque[float] = deque()

    def allows(self, now_s: float) -> bool:
        """Note a failure; tell whether the actor may be made anew."""
        while self._at_s and self._at_s[0] <= now_s - self._supervision.window_s:
            self._at_s.popleft()
        if len(self._at_s) >= self._supervision.restarts:
            return False
        self._at_s.append(now_s)
        return True


class Ended:
    """What a watcher hears, as a message of its own: the actor of `ref` has ended for good. A restart is no end.

    `reason` is `stopped`, `failed`, `no_such_actor` or `node_down`.
    """

    __slots__ = ("reason", "ref")

    def __init__(self, ref: ActorRef, reason: str) -> None:
        self.ref = ref
        self.reason = reason

    def __repr__(self) -> str:
        return f"Ended({self.ref!r}, {self.reason!r})"
