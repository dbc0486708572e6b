"""A running instance as its ModelManager keeps it."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from sllm_actor.actors.adapters import InstanceAdapters
from sllm_actor.actors.instance_starter import Started
from sllm_actor.actors.place import Place
from sllm_actor.domain import Model, NodeId
from sllm_actor.messages.instances import InstanceActivity, InstanceStarted, InstanceStatus
from sllm_actor.messages.placement import InstanceView
from sllm_actor.policy.answer_times import AnswerTimes, LearnedTimes
from sllm_actor.runtime import ActorRef

# The actors' names: an instance's id follows.
WORKERS = "worker/"


# What may differ between two descriptions of an instance to the Scheduler, but for the time: what it works on, since
# when on nothing, its bytes in host memory, its model's times, whether it leaves, whether it is kept.
_MadeOf = tuple[InstanceActivity, float, int, AnswerTimes, bool, bool]


class Instance:
    """An instance and all that belongs to it."""

    def __init__(
        self,
        instance_id: str,
        model: Model,
        started: Started,
        adapters: InstanceAdapters,
        worker: ActorRef,
        times: LearnedTimes,
        now_s: float,
    ) -> None:
        self.instance_id = instance_id
        self.model = model
        self.started = started
        self.adapters = adapters
        self.worker = worker
        self._times = times
        self.idle_since_s = now_s
        self.retired: asyncio.Future[None] | None = None
        # Its model has a minimum of instances: it does not stop by itself, and makes no room.
        self.kept = model.scaling.min_instances > 0
        self._activity = InstanceActivity(instance_id=instance_id, active=0, keep_alive_s=model.keep_alive_s)
        self._told_s = now_s
        # What it was described by last, and how.
        self._described: tuple[_MadeOf, InstanceView] | None = None

    @property
    def active(self) -> int:
        """How many requests run on it."""
        return self._activity.active

    @property
    def told_active(self) -> int:
        """With how many requests it was described to the Scheduler last."""
        return 0 if self._described is None else self._described[1].active

    def hear(self, activity: InstanceActivity, now_s: float) -> None:
        """Note how busy it is, and what its last answer teaches."""
        if activity.answered is not None:
            self._times.learn(self.model.name, activity.answered)
        self._activity, self._told_s = activity, now_s
        if not activity.active:
            self.idle_since_s = now_s

    def serves(self, model: Model) -> bool:
        """Tell whether it can answer for a model at once: its own, or an adapter that it has."""
        return model.name == self.model.name or (model.base != "" and model.fingerprint in self.adapters.fingerprints)

    def view(self, pinned: Collection[str], now_s: float) -> InstanceView:
        """Describe it to the Scheduler; memory that is pinned is counted once, and not here."""
        own_bytes = 0 if self.model.fingerprint in pinned else self.model.host_bytes
        made_of = (
            self._activity, self.idle_since_s, own_bytes + self.adapters.host_bytes(pinned),
            self._times.of(self.model.name), self.retired is not None, self.kept,
        )  # fmt: skip
        # How long its requests have been running differs with each report; of an idle one all may be as it was.
        if self._activity.active or self._described is None or self._described[0] != made_of:
            self._described = made_of, self._view_of(made_of, now_s)
        return self._described[1]

    def _view_of(self, made_of: _MadeOf, now_s: float) -> InstanceView:
        activity, idle_since_s, host_bytes, times, leaving, kept = made_of
        resume_s_per_token, resume_s = times.rising
        return InstanceView(
            instance_id=self.instance_id,
            model=self.model.name,
            active=activity.active,
            idle_since_s=idle_since_s,
            host_bytes=host_bytes,
            fingerprint=self.model.fingerprint,
            size_bytes=self.model.size_bytes,
            prompt_tokens=activity.prompt_tokens,
            running_s=activity.running_s + activity.active * (now_s - self._told_s),
            priority=activity.priority,
            token_s=times.token_s,
            resume_s_per_token=resume_s_per_token,
            resume_s=resume_s,
            worker=self.worker.name,
            leaving=leaving,
            kept=kept,
            holders_only=not self.model.card,
        )

    def route(self, place: Place) -> InstanceStarted:
        """Say where its requests go, and what its start has taken."""
        return InstanceStarted(
            instance_id=self.instance_id,
            model=self.model.name,
            node=place.node,
            worker=self.worker.name,
            spans=self.started.spans,
            address=place.address,
        )

    def status(self, node: NodeId, now_s: float) -> InstanceStatus:
        """Describe it to people."""
        expires_s = 0.0 if self.active else max(0.0, self.idle_since_s + self._activity.keep_alive_s - now_s)
        return InstanceStatus(
            instance_id=self.instance_id,
            model=self.model.name,
            node=node,
            pid=self.started.engine.pid,
            active=self.active,
            size_bytes=self.model.size_bytes,
            expires_in_s=expires_s,
            late_imports=self.started.late_imports,
        )
