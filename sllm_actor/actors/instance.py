"""A running instance as its ModelManager keeps it."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from sllm_actor.actors.adapters import InstanceAdapters
from sllm_actor.actors.instance_starter import Started
from sllm_actor.domain import Model, NodeId
from sllm_actor.messages.instances import InstanceStatus
from sllm_actor.messages.placement import InstanceView
from sllm_actor.runtime import ActorRef


class Instance:
    """An instance and all that belongs to it."""

    def __init__(
        self,
        instance_id: str,
        model: Model,
        started: Started,
        adapters: InstanceAdapters,
        worker: ActorRef,
        now_s: float,
    ) -> None:
        self.instance_id = instance_id
        self.model = model
        self.started = started
        self.adapters = adapters
        self.worker = worker
        self.active = 0
        self.idle_since_s = now_s
        self.retired: asyncio.Future[None] | None = None

    def serves(self, model: Model) -> bool:
        """Tell whether it can answer for a model at once: its own, or an adapter that it has."""
        return model.name == self.model.name or (model.base != "" and model.fingerprint in self.adapters.fingerprints)

    def view(self, pinned: Collection[str]) -> InstanceView:
        """Describe it to the Scheduler; memory that is pinned is counted once, and not here."""
        own_bytes = 0 if self.model.fingerprint in pinned else self.model.host_bytes
        return InstanceView(
            instance_id=self.instance_id,
            model=self.model.name,
            active=self.active,
            idle_since_s=self.idle_since_s,
            host_bytes=own_bytes + self.adapters.host_bytes(pinned),
        )

    def status(self, node: NodeId, now_s: float) -> InstanceStatus:
        """Describe it to people."""
        expires_s = 0.0 if self.active else max(0.0, self.idle_since_s + self.model.keep_alive_s - now_s)
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
