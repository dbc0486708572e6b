"""Models that compete for one place take turns; each keeps it for a while, so that a turn is for more than one request.

Only those that come back are held: the first switches between two models are as quick as can be. Pure: moments come
with the calls.
"""

from __future__ import annotations

from sllm_actor.domain import ModelName, NodeId
from sllm_actor.messages.placement import NodeReport

# A model that comes back within so many times of the hold was given up too early.
SOON = 10.0


class TakingTurns:
    """Owns which models were given up of late, and which instances were there already."""

    def __init__(self, hold_s: float) -> None:
        self._hold_s = hold_s
        self._given_up: dict[tuple[NodeId, ModelName], float] = {}
        self._known: dict[NodeId, frozenset[str]] = {}

    def gave_up(self, node: NodeId, model: ModelName, now_s: float) -> None:
        """Note that a model has to leave a node for another one."""
        soon_s = SOON * self._hold_s
        self._given_up = {key: at_s for key, at_s in self._given_up.items() if now_s - at_s <= soon_s}
        self._given_up[node, model] = now_s

    def came_back(self, report: NodeReport, now_s: float) -> list[str]:
        """List the instances that are new in a report, and of models that had to leave there a short while ago."""
        before = self._known.get(report.node, frozenset())
        self._known[report.node] = frozenset(one.instance_id for one in report.instances)
        never_s = float("-inf")
        return [
            one.instance_id
            for one in report.instances
            if one.instance_id not in before
            and now_s - self._given_up.get((report.node, one.model), never_s) <= SOON * self._hold_s
        ]

    def forget(self, node: NodeId) -> None:
        """Forget a node that has gone."""
        self._known.pop(node, None)
