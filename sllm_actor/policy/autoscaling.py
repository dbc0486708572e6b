"""How many instances of a model should run, and which idle ones are too many. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from sllm_actor.domain import NodeId, Scaling
from sllm_actor.messages.placement import InstanceView


class Running(NamedTuple):
    """An instance that takes requests, where it is, and for how long it has been idle by now."""

    node: NodeId
    instance: InstanceView
    idle_s: float


def wanted(scaling: Scaling, active: int, instance_takes: int) -> int:
    """Tell how many instances should run for so many running requests, at least as many as are to run without any.

    A model that only starts when it is asked for and has nobody asking wants none.
    """
    needed = math.ceil(active / (scaling.target_concurrency or instance_takes))
    return min(max(needed, scaling.min_instances), scaling.max_instances)


def surplus(scaling: Scaling, running: Sequence[Running], want: int, keep_alive_s: float) -> Running | None:
    """Choose an instance to stop: the one that has been idle the longest, once that is its keep-alive.

    Those of models without a minimum stop by themselves.
    """
    idle = [one for one in running if not one.instance.active and one.idle_s >= keep_alive_s]
    if not scaling.min_instances or len(running) <= want or not idle:
        return None
    return max(idle, key=lambda one: (one.idle_s, one.instance.instance_id))
