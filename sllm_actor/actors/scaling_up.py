"""Places the further instances that an Autoscaler misses: on devices where their bytes are, or come at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import msgspec

from sllm_actor.actors.autoscaler import Autoscaler
from sllm_actor.actors.fetching import Fetching
from sllm_actor.actors.granted_starts import GrantedStarts
from sllm_actor.actors.rooms import Waiting
from sllm_actor.domain import ModelName, NodeId
from sllm_actor.messages.placement import Placement, PlaceModel
from sllm_actor.policy.bytes_first import places
from sllm_actor.policy.cluster_view import ClusterView
from sllm_actor.policy.placement import QUIET, Decision, Evict, Start
from sllm_actor.runtime import ActorContext


class ScalingUp:
    """Belongs to one Scheduler, which decides, grants and gives up."""

    def __init__(
        self,
        context: ActorContext,
        view: ClusterView,
        granted: GrantedStarts,
        fetching: Fetching,
        *,
        decide: Callable[[Waiting, float], Decision],
        grant: Callable[[Waiting, Start, float], Placement],
        give_up: Callable[[Waiting, Evict], None],
    ) -> None:
        self._context = context
        self._view = view
        self._granted = granted
        self._fetching = fetching
        self._decide = decide
        self._grant = grant
        self._give_up = give_up

    def look(self, autoscaler: Autoscaler, now_s: float) -> None:
        """Start what is missing, or have its bytes fetched; what is on its way already is looked at anew each time."""
        full, coming = set[ModelName](), Counter[tuple[ModelName, NodeId]]()
        for question in autoscaler.missing(self._view, self._granted.counts(), self._fetching.models()):
            if question.model in full:
                continue
            wish, decision = self._decided(question, now_s)
            if not isinstance(decision, Start | Evict) or self._fetching.come_first(decision):
                node = self._room_beside(question.model, coming)
                if node is None and isinstance(decision, Start | Evict):
                    node = decision.report.node if self._fetching.begin(question, decision, now_s) else None
                if node is not None:
                    coming[question.model, node] += 1
                    continue
            if isinstance(decision, Start):
                placement = self._grant(wish, decision, now_s)
                start = autoscaler.start(self._context.system, placement, question.model)
                self._context.tasks.spawn(start, f"start-{placement.placement_id}")
            elif isinstance(decision, Evict):
                self._give_up(wish, decision)
            else:
                full.add(question.model)

    def _decided(self, question: PlaceModel, now_s: float) -> tuple[Waiting, Decision]:
        """Decide where one starts: on a node that has none of it; where there is none, beside another.

        Where the bytes are on their way, nothing starts before they are about to be there.
        """
        fetching = self._fetching.nodes(question.model)
        for not_on in (question.not_on, ()):
            asked = msgspec.structs.replace(cast(Any, question), not_on=(*not_on, *fetching))
            wish = Waiting(asked, now_s, QUIET)
            decision = self._decide(wish, now_s)
            if isinstance(decision, Start | Evict):
                break
        return wish, decision

    def _room_beside(self, model: ModelName, coming: Counter[tuple[ModelName, NodeId]]) -> NodeId | None:
        """Find a node that fetches the model and has a place for one more than those that are to start there."""
        for node in self._fetching.nodes(model):
            if coming[model, node] < places(self._view.nodes[node]):
                return node
        return None
