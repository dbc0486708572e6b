"""The starts that a Scheduler has granted and that have not ended: what was expected of each, and which have begun."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Set

from sllm_actor.actors.decision_log import Granted, adopted
from sllm_actor.actors.rooms import TOLD_WITHIN_S
from sllm_actor.domain import ModelName, NodeId
from sllm_actor.messages.placement import StartingView


class GrantedStarts:
    """Found by their placements and by their models: whoever waits for a model is looked at with each report."""

    def __init__(self) -> None:
        self._starts: dict[str, Granted] = {}
        self._of_model: dict[ModelName, dict[str, Granted]] = {}
        self._begun: dict[ModelName, set[str]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._starts))

    def __contains__(self, placement_id: str) -> bool:
        return placement_id in self._starts

    @property
    def begun(self) -> Set[ModelName]:
        """The models of which a start has begun and has not ended."""
        return self._begun.keys()

    def grant(self, placement_id: str, start: Granted) -> None:
        """Note a start that is to begin."""
        self._starts[placement_id] = start
        self._of_model.setdefault(start.model, {})[placement_id] = start

    def goes_on(self, placement_id: str, node: NodeId, start: StartingView, now_s: float) -> None:
        """Note that it has begun, as its node says; an earlier leader may have granted it."""
        if placement_id not in self._starts:
            self.grant(placement_id, adopted(start, node, now_s))
        self._begun.setdefault(self._starts[placement_id].model, set()).add(placement_id)

    def end(self, placement_id: str) -> Granted | None:
        """Forget it, and give what was expected of it, if it is known."""
        start = self._starts.pop(placement_id, None)
        if start is None:
            return None
        model = start.model
        del self._of_model[model][placement_id]
        if not self._of_model[model]:
            del self._of_model[model]
        if model in self._begun:
            self._begun[model].discard(placement_id)
            if not self._begun[model]:
                del self._begun[model]
        return start

    def on(self, node: NodeId) -> list[str]:
        """List the placements on a node."""
        return [placement_id for placement_id, start in self._starts.items() if start.node == node]

    def counts(self) -> Counter[ModelName]:
        """Count the starts of each model."""
        return Counter({model: len(starts) for model, starts in self._of_model.items()})

    def comes(self, model: ModelName, now_s: float) -> bool:
        """Tell whether the model is being started, or was granted a start so lately that its node may not have told."""
        return model in self._begun or any(
            now_s < start.granted_s + TOLD_WITHIN_S for start in self._of_model.get(model, {}).values()
        )
