"""How long whoever holds a lease may act on it by its own clock. Pure."""

from __future__ import annotations

from dataclasses import dataclass

# A lease is kept alive four times in its time, and given up when a quarter is left: for what is under way, and for
# clocks that do not run alike.
KEPT_ALIVE_AFTER = 0.25
GIVEN_UP_AFTER = 0.75


@dataclass(frozen=True, slots=True)
class LeaseTerm:
    """A lease of `ttl_s` that was granted, or kept alive, by a call that was sent at `sent_s`.

    The store counts from a later moment, when it got that call: it ends the lease after its holder has given it up.
    """

    ttl_s: float
    sent_s: float

    @property
    def next_s(self) -> float:
        """When it is to be kept alive."""
        return self.sent_s + KEPT_ALIVE_AFTER * self.ttl_s

    @property
    def given_up_s(self) -> float:
        """When its holder stops."""
        return self.sent_s + GIVEN_UP_AFTER * self.ttl_s

    def holds(self, now_s: float) -> bool:
        """Tell whether its holder may act."""
        return now_s < self.given_up_s
