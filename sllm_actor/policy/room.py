"""Choose which instances leave a node so that slots and memory become free, at the lowest cost. Pure.

Dynamic programming over the instances, as ServerlessLLM (OSDI '24, section 6.2) does over the devices of a server: of
all ways to free as much with the instances so far, only the cheapest is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sllm_actor.messages.placement import InstanceView

# Ways to free so many slots that are kept; what is beyond is the dearest, and the answer may then not be the cheapest.
MAX_WAYS = 64


class Cost(NamedTuple):
    """Seconds first; among equals what is less of a loss."""

    seconds: float = 0.0
    loss: int = 0

    def plus(self, other: Cost) -> Cost:
        """Add both."""
        return Cost(self.seconds + other.seconds, self.loss + other.loss)


class Occupant(NamedTuple):
    """An instance that could leave, and what that costs."""

    instance: InstanceView
    cost: Cost


class _Way(NamedTuple):
    host_bytes: int
    cost: Cost
    leaving: tuple[Occupant, ...]


def cheapest_to_leave(
    occupants: Iterable[Occupant], slots: int, host_bytes: int, max_ways: int = MAX_WAYS
) -> tuple[Occupant, ...] | None:
    """Choose the occupants whose leaving frees `slots` and `host_bytes` at the lowest cost; None where all are too few.

    Exact while at most `max_ways` ways to free a number of slots are worth keeping.
    """
    slots, host_bytes = max(0, slots), max(0, host_bytes)
    occupants = list(occupants)
    if slots > sum(occupant.instance.slots for occupant in occupants):
        return None
    # By the slots that they free, where more than are needed is as good as just as many.
    ways: list[list[_Way]] = [[] for _ in range(slots + 1)]
    ways[0].append(_Way(0, Cost(), ()))
    for occupant in occupants:
        longer: list[list[_Way]] = [list(level) for level in ways]
        for freed, level in enumerate(ways):
            to = min(slots, freed + occupant.instance.slots)
            longer[to] += [_with(way, occupant, host_bytes) for way in level]
        ways = [_worth_keeping(level, max_ways) for level in longer]
    enough = [way for way in ways[slots] if way.host_bytes >= host_bytes]
    return min(enough, key=lambda way: way.cost).leaving if enough else None


def _with(way: _Way, occupant: Occupant, host_bytes: int) -> _Way:
    freed_bytes = min(host_bytes, way.host_bytes + occupant.instance.host_bytes)
    return _Way(freed_bytes, way.cost.plus(occupant.cost), (*way.leaving, occupant))


def _worth_keeping(level: Sequence[_Way], max_ways: int) -> list[_Way]:
    """Drop each way that frees no more than a cheaper one; the one that frees the most always stays."""
    kept: list[_Way] = []
    for way in sorted(level, key=lambda way: (-way.host_bytes, way.cost)):
        if not kept or way.cost < kept[-1].cost:
            kept.append(way)
    return kept if len(kept) <= max_ways else [kept[0], *kept[-(max_ways - 1) :]]
