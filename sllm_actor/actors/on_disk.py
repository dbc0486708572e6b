"""Which registered models a node's disk has, as its reports tell it: looked through anew only where that may differ."""

from __future__ import annotations

from collections.abc import Mapping

from sllm_actor.checkpoint.folder import Checkpoint
from sllm_actor.domain import Model, ModelName
from sllm_actor.loader.cards import Card
from sllm_actor.loader.tiers import Tiers

Wanted = Checkpoint | Card
"""What the tiers are asked for: a folder, or the card of what is elsewhere."""


class OnDisk:
    """Looks at a registry's `models`, and at what is `wanted` of the tiers for each; the registry tells of changes.

    Where nodes share the store, a folder is on this node's disk only if it was found there.
    """

    def __init__(
        self, models: Mapping[ModelName, Model], wanted: Mapping[ModelName, Wanted], tiers: Tiers, *, shared: bool
    ) -> None:
        self._models = models
        self._wanted = wanted
        self._tiers = tiers
        self._shared = shared
        # The models whose folders are here, and those of each id that the SSD may have: one, and seldom others.
        self._sorted: tuple[list[Model], dict[str, Model], dict[str, list[Model]]] | None = None
        # The models that were found, with their fingerprints, and at which revision of the SSD.
        self._found: tuple[int, tuple[Model, ...], tuple[str, ...]] | None = None

    def look_again(self) -> None:
        """Hear that a registration, or what is known of its bytes, has changed."""
        self._sorted = self._found = None

    def has(self, model: Model) -> bool:
        """Tell whether this node's disk has the model's bytes."""
        wanted = self._wanted.get(model.name)
        if not model.card:
            return not self._shared or wanted is not None
        return isinstance(wanted, Card) and self._tiers.is_on_ssd(wanted)

    def _by_id(self) -> tuple[list[Model], dict[str, Model], dict[str, list[Model]]]:
        if self._sorted is None:
            folders, by_id, others = list[Model](), dict[str, Model](), dict[str, list[Model]]()
            for name, model in self._models.items():
                wanted = self._wanted.get(name)
                if model.card and isinstance(wanted, Card):
                    if by_id.setdefault(wanted.model_id, model) is not model:
                        others.setdefault(wanted.model_id, []).append(model)
                elif self.has(model):
                    folders.append(model)
            self._sorted = folders, by_id, others
        return self._sorted

    def _all(self) -> tuple[tuple[Model, ...], tuple[str, ...]]:
        whole, revision = self._tiers.ssd.whole()
        if self._found is None or self._found[0] != revision:
            folders, by_id, others = self._by_id()
            found = [model for key in whole if key in by_id for model in (by_id[key], *others.get(key, ()))]
            models = (*folders, *found)
            self._found = revision, models, tuple(dict.fromkeys(model.fingerprint for model in models))
        return self._found[1:]

    def fingerprints(self) -> tuple[str, ...]:
        """List the checkpoints that this node's disk has."""
        return self._all()[1]

    def queues_s(self) -> dict[str, float]:
        """Tell for which checkpoints the disk that has them is busy, and how long.

        Of one that was not looked at since the node's start nobody knows yet where it lies.
        """
        if not self._tiers.has_disk_queue():
            return {}
        told = {
            model.fingerprint: self._tiers.disk_queue_s(self._wanted[model.name])
            for model in self._all()[0]
            if model.name in self._wanted
        }
        return {fingerprint: queue_s for fingerprint, queue_s in told.items() if queue_s}
