"""How many instances of a model should run, and which idle ones are too many. Pure."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from sllm_actor.domain import ModelName, NodeId, Scaling
from sllm_actor.messages.placement import InstanceView


class Running(NamedTuple):
    """An instance that takes requests, where it is, and for how long it has been idle by now."""

    node: NodeId
    instance: InstanceView
    idle_s: float


class Short(NamedTuple):
    """A model with `active` requests at so many instances (`there`), of which `want` should run, and `least` always."""

    active: int
    there: int
    want: int
    least: int


def wanted(scaling: Scaling, active: int, instance_takes: int) -> int:
    """Tell how many instances should run for so many running requests, at least as many as are to run without any.

    A model that only starts when it is asked for and has nobody asking wants none.
    """
    needed = math.ceil(active / (scaling.target_concurrency or instance_takes))
    return min(max(needed, scaling.min_instances), scaling.max_instances)


def by_need(short: Mapping[ModelName, Short]) -> Iterator[tuple[ModelName, int]]:
    """Give the models that lack instances, once for each, and the how many-th of its model that is.

    Those below what runs at all times come first; then always the one with the most requests for each of its instances,
    those given so far among them, so that none has all that is free because of its name.
    """
    left = [(_need(one, one.there), name, one.there) for name, one in short.items() if one.there < one.want]
    heapq.heapify(left)
    while left:
        _, name, number = left[0]
        yield name, number
        if number + 1 < short[name].want:
            heapq.heapreplace(left, (_need(short[name], number + 1), name, number + 1))
        else:
            heapq.heappop(left)


def _need(one: Short, there: int) -> float:
    """The lower, the more a further instance is needed."""
    return -math.inf if there < max(one.least, 1) else -one.active / there


def surplus(scaling: Scaling, running: Sequence[Running], want: int, keep_alive_s: float) -> Running | None:
    """Choose an instance to stop: the one that has been idle the longest, once that is its keep-alive.

    Those of models without a minimum stop by themselves.
    """
    idle = [one for one in running if not one.instance.active and one.idle_s >= keep_alive_s]
    if not scaling.min_instances or len(running) <= want or not idle:
        return None
    return max(idle, key=lambda one: (one.idle_s, one.instance.instance_id))
