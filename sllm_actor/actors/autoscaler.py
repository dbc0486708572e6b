"""Starts instances that requests have not waited for, and stops those that are too many: the Scheduler's own wishes."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import aclosing

from sllm_actor.domain import Model, ModelName, RequestId
from sllm_actor.errors import SllmError
from sllm_actor.messages.instances import InstanceStarted, StartInstance
from sllm_actor.messages.placement import Placement, PlaceModel
from sllm_actor.policy.autoscaling import Running, Short, by_need, surplus, wanted
from sllm_actor.policy.cluster_view import ClusterView
from sllm_actor.runtime import ActorSystem, Clock

log = logging.getLogger(__name__)

# How long a model whose start has failed is left alone.
REST_S = 15.0


class Autoscaler:
    """Looks at the view that the Scheduler keeps; what is to be placed and stopped is for the Scheduler to do."""

    def __init__(
        self, kept: Callable[[], Iterable[Model]], known: Callable[[ModelName], Model | None], clock: Clock, *,
        instance_takes: int,
    ) -> None:  # fmt: skip
        self._kept = kept
        self._known = known
        self._clock = clock
        self._instance_takes = instance_takes
        self._rests: dict[ModelName, float] = {}
        self._numbers = itertools.count(1)

    def _may_lack(
        self, view: ClusterView, awaited: Mapping[ModelName, int], only: Set[ModelName] | None
    ) -> list[Model]:
        """List the models that may lack an instance: those that always run, and those with too many requests for one.

        Of a thousand that run few have so many, and the others are not looked at.
        """
        if only is not None:
            models = list(self._busy(view, awaited, only))
        else:
            models = [*self._kept(), *self._busy(view, awaited, {*view.active, *awaited})]
        found = {model.name: model for model in models if not model.base}
        return [found[name] for name in sorted(found)]

    def _busy(self, view: ClusterView, awaited: Mapping[ModelName, int], names: Iterable[ModelName]) -> Iterator[Model]:
        for name in names:
            asking = view.active.get(name, 0) + awaited.get(name, 0)
            # No instance takes less than one request.
            model = self._known(name) if asking > 1 else None
            if model is not None and wanted(model.scaling, asking, self._instance_takes) > 1:
                yield model

    def calling(self, view: ClusterView, awaited: Mapping[ModelName, int]) -> set[ModelName]:
        """Name those of which more run or wait for a start than one instance takes: not to be left for later."""
        return {model.name for model in self._busy(view, awaited, awaited)}

    def missing(
        self, view: ClusterView, awaited: Mapping[ModelName, int], starting: Mapping[ModelName, int],
        fetched: Set[ModelName], only: Set[ModelName] | None = None,
    ) -> Iterator[PlaceModel]:  # fmt: skip
        """Give a question for each instance that should run beside those that do, or are being started, where so many
        wait for a start of each model that is `awaited`; of all models, or of those with many requests of these `only`.

        The next one is always for the model whose instances have the most to do. Those whose bytes are `fetched` for a
        start are counted as if none were coming: whoever asked for it waits, too.
        """
        now_s = self._clock.monotonic_s()
        self._rests = {name: until_s for name, until_s in self._rests.items() if until_s > now_s}
        models = [model for model in self._may_lack(view, awaited, only) if model.name not in self._rests]
        running = {model.name: self._running(view, model, now_s) for model in models}
        short: dict[ModelName, Short] = {}
        for model in models:
            there = len(running[model.name]) + starting.get(model.name, 0)
            asking = _active(running[model.name]) + awaited.get(model.name, 0)
            want, least = wanted(model.scaling, asking, self._instance_takes), model.scaling.min_instances
            # Where a first one is missing, those who wait for it see to that.
            if not there and not least and (want == 1 or model.name not in fetched):
                want = 0
            short[model.name] = Short(asking, there, want, least)
        known = {model.name: model for model in models}
        for name, number in by_need(short):
            # Those that run at all times do so on different nodes; who is to help others is to come soonest.
            yield self._question(known[name], running[name] if number < short[name].least else [])

    def surplus(self, view: ClusterView) -> Iterator[Running]:
        """Give an instance of each model of which one too many has been idle for long enough."""
        now_s = self._clock.monotonic_s()
        for model in sorted((model for model in self._kept() if not model.base), key=lambda model: model.name):
            running = self._running(view, model, now_s)
            want = wanted(model.scaling, _active(running), self._instance_takes)
            one = surplus(model.scaling, running, want, model.keep_alive_s)
            if one is not None:
                yield one

    def _running(self, view: ClusterView, model: Model, now_s: float) -> list[Running]:
        return [
            Running(report.node, one, report.told_s - one.idle_since_s + view.age_s(report.node, now_s))
            for report, one in view.running(model.name)
        ]

    def _question(self, model: Model, running: list[Running]) -> PlaceModel:
        return PlaceModel(
            request_id=RequestId(f"scale-{model.name}-{next(self._numbers)}"),
            model=model.name,
            fingerprint=model.fingerprint,
            size_bytes=model.size_bytes,
            host_bytes=model.host_bytes,
            timeout_s=0.0,
            holders_only=not model.card,
            not_on=tuple(sorted({one.node for one in running})),
        )

    async def start(self, system: ActorSystem, placement: Placement, model: ModelName) -> None:
        """Use a placement; what goes wrong is told in the log, and the model is left alone for a while."""
        manager = system.ref(placement.manager, placement.address or None)
        wish = StartInstance(placement_id=placement.placement_id, model=model, epoch=placement.epoch)
        try:
            async with aclosing(manager.stream(wish)) as steps:
                async for step in steps:
                    if isinstance(step, InstanceStarted):
                        log.info("%s runs on %s, too: %s", model, placement.node, step.instance_id)
        except SllmError as error:
            self._rests[model] = self._clock.monotonic_s() + REST_S
            log.warning("one more instance of %s could not be started on %s: %s", model, placement.node, error.message)


def _active(running: Sequence[Running]) -> int:
    return sum(one.instance.active for one in running)
