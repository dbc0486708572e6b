"""Models that compete for one place take turns; each keeps it for a while, so that a turn is for more than one request.

Only those that come back are held so: the first switches between two models are as quick as can be. But whatever comes
up is kept until its first request is there, or two models that are asked at once would push each other out before
either has answered. Pure: moments come with the calls.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from sllm_actor.domain import ModelName, NodeId
from sllm_actor.messages.placement import InstanceView, NodeReport

# A model that comes back within so many times of the hold was given up too early.
SOON = 10.0
# The request that an instance was started for comes within this time, unless its client has left.
FIRST_REQUEST_S = 2.0


class TakingTurns:
    """Owns which models were given up of late, which instances were there already, and which nobody has asked yet."""

    def __init__(self, hold_s: float) -> None:
        self._hold_s = hold_s
        # The longest ago first.
        self._given_up: OrderedDict[tuple[NodeId, ModelName], float] = OrderedDict()
        self._known: dict[NodeId, frozenset[str]] = {}
        # When the turn of each that nobody has asked yet is over, and since when it is idle.
        self._unasked: dict[NodeId, dict[str, tuple[float, float]]] = {}

    def gave_up(self, node: NodeId, model: ModelName, now_s: float) -> None:
        """Note that a model has to leave a node for another one."""
        self._given_up[node, model] = now_s
        self._given_up.move_to_end((node, model))
        while now_s - next(iter(self._given_up.values())) > SOON * self._hold_s:
            self._given_up.popitem(last=False)

    def newcomers(self, report: NodeReport, now_s: float) -> Iterator[tuple[str, float]]:
        """Give the instances that are new in a report, with the seconds that each is to stay even if it is idle.

        These are 0 but for models that had to leave there a short while ago. What a node reports first is not new.
        """
        node = report.node
        before, known = self._known.get(node), frozenset([one.instance_id for one in report.instances])
        if known == before:
            return
        self._known[node] = known
        unasked = self._unasked.pop(node, {})
        self._unasked[node] = {key: one for key, one in unasked.items() if key in known}
        for one in report.instances:
            if before is not None and one.instance_id not in before:
                given_up_s = self._given_up.get((node, one.model), float("-inf"))
                turn_s = self._hold_s if now_s - given_up_s <= SOON * self._hold_s else 0.0
                self._unasked[node][one.instance_id] = now_s + turn_s, one.idle_since_s
                yield one.instance_id, turn_s

    def asked(self, node: NodeId, instance: InstanceView, now_s: float) -> bool:
        """Tell whether an instance shows to have its first request, or to have had it, and its turn is over."""
        unasked = self._unasked.get(node, {})
        if instance.instance_id not in unasked:
            return False
        over_s, idle_since_s = unasked[instance.instance_id]
        if not instance.active and instance.idle_since_s <= idle_since_s:
            return False
        del unasked[instance.instance_id]
        return over_s <= now_s

    def is_unasked(self, node: NodeId, instance_id: str) -> bool:
        """Tell whether the first request of a new instance is not there yet."""
        return instance_id in self._unasked.get(node, {})

    def forget(self, node: NodeId) -> None:
        """Forget a node that has gone."""
        self._known.pop(node, None)
        self._unasked.pop(node, None)
