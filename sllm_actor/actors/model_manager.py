"""Knows the registered models, which tier holds which, and starts and stops their instances on this node."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import NamedTuple

from sllm_actor.actors.adapters import InstanceAdapters
from sllm_actor.actors.inference_worker import InferenceWorker
from sllm_actor.actors.instance import Instance
from sllm_actor.actors.instance_starter import InstanceStarter, Started
from sllm_actor.actors.registry import Registry
from sllm_actor.actors.standing import standing
from sllm_actor.actors.start_counts import StartCounts
from sllm_actor.actors.tiers_view import tiers_view
from sllm_actor.actors.waiting_room import WaitingRoom
from sllm_actor.domain import Model, ModelName, NodeId
from sllm_actor.errors import Conflict, DeliveryFailed, Draining, ModelNotFound, SllmError
from sllm_actor.loader import keeping
from sllm_actor.loader.cards import Card
from sllm_actor.loader.lease import HostLease
from sllm_actor.loader.loads import OnProgress
from sllm_actor.loader.tiers import FIRST_REMOTE_BYTES_PER_S, FIRST_SSD_BYTES_PER_S, Tiers
from sllm_actor.messages.instances import (
    AdapterHeld,
    HoldAdapter,
    InstanceActivity,
    InstanceDied,
    InstanceExpired,
    InstanceGone,
    InstanceStarted,
    InstanceStatus,
    ListInstances,
    Retire,
    StartInstance,
    StartProgress,
    StopInstances,
)
from sllm_actor.messages.models import (
    EvictModel,
    GetModel,
    ListModels,
    ListTiers,
    ModelStatus,
    PinModel,
    PullModel,
    PullProgress,
    RegisterModel,
    RemoveModel,
    TiersChanged,
    TiersView,
    UnpinModel,
)
from sllm_actor.messages.placement import NodeReport
from sllm_actor.policy.answer_times import LearnedTimes
from sllm_actor.policy.bandwidth import ObservedWay
from sllm_actor.runtime import Actor, Clock, handles
from sllm_actor.runtime.progress import Step, followed

log = logging.getLogger(__name__)

# While a start goes on.
REPORT_EVERY_S = 1.0


class Limits(NamedTuple):
    """The manager's knobs; the names are those of `Config`."""

    max_instances: int
    host_pool_bytes: int
    max_requests_per_instance: int
    drain_timeout_s: float
    engine_stop_timeout_s: float
    max_adapters_per_instance: int


class ModelManager(Actor):
    """Owns the registrations, the instances of this node and their leases on host memory."""

    def __init__(
        self,
        node: NodeId,
        registry: Registry,
        tiers: Tiers,
        starter: InstanceStarter,
        clock: Clock,
        limits: Limits,
        room: WaitingRoom,
        counts: StartCounts,
    ) -> None:
        self._node = node
        self._registry = registry
        self._tiers = tiers
        self._starter = starter
        self._clock = clock
        self._limits = limits
        self._room = room
        self._counts = counts
        self._instances: dict[str, Instance] = {}
        self._starting: dict[str, ModelName] = {}
        self._times = LearnedTimes()
        self._instance_ids = itertools.count(1)
        self._ssd = ObservedWay(FIRST_SSD_BYTES_PER_S, tiers.loader.paths().ssd)
        self._remote = ObservedWay(FIRST_REMOTE_BYTES_PER_S, tiers.remote_path())

    async def started(self) -> None:
        await self._registry.open()
        self._tiers.when_stored(self._report)
        self._report()

    # Registrations.

    @handles(RegisterModel, concurrent=True)
    async def register(self, message: RegisterModel) -> Model:
        with self._registry.change(message.name):
            model, changed = await self._registry.register(message)
            if changed:
                # Last: one of the old may have come up while this was being stored.
                await self._stop_all(model.name)
            self._report()
            return model

    @handles(RemoveModel, concurrent=True)
    async def remove(self, message: RemoveModel) -> Model:
        with self._registry.change(message.name):
            model = await self._registry.remove(message.name)
            self._times.forget(message.name)
            await self._stop_all(message.name)
            self._report()
            return model

    @handles(PullModel)
    async def pull(self, message: PullModel) -> AsyncIterator[PullProgress]:
        """Bring the model to the SSD; each item tells how far that is."""
        wanted = await self._registry.wanted(self._registry.find(message.name))
        if not isinstance(wanted, Card):
            size_bytes = wanted.size_bytes
            yield PullProgress(done_bytes=size_bytes, total_bytes=size_bytes)
            return
        async with aclosing(self._tiers.pulled(wanted)) as progress:
            async for done_bytes, total_bytes in progress:
                yield PullProgress(done_bytes=done_bytes, total_bytes=total_bytes)
        self._report()

    @handles(GetModel)
    def get(self, message: GetModel) -> Model:
        return self._registry.find(message.name)

    @handles(ListModels)
    async def list_models(self, _: ListModels) -> tuple[ModelStatus, ...]:
        held = {resident.fingerprint: resident.size_bytes for resident in self._tiers.loader.residents()}
        instances, starting = self._instances.values(), self._starting.values()
        return tuple(standing(model, self._registry, instances, starting, held) for model in self._registry.models())

    @handles(ListTiers)
    async def list_tiers(self, _: ListTiers) -> TiersView:
        return tiers_view(self._tiers, self._registry, self._clock)

    @handles(PinModel, concurrent=True)
    async def pin(self, message: PinModel) -> TiersChanged:
        with self._registry.change(message.name):  # Who removes the name takes its pins with it.
            return await self._changed(keeping.pin, message)

    @handles(UnpinModel, concurrent=True)
    async def unpin(self, message: UnpinModel) -> TiersChanged:
        return await self._changed(keeping.unpin, message)

    @handles(EvictModel, concurrent=True)
    async def evict(self, message: EvictModel) -> TiersChanged:
        return await self._changed(keeping.evict, message)

    async def _changed(self, change: keeping.Change, message: PinModel | UnpinModel | EvictModel) -> TiersChanged:
        changed = await change(self._tiers, await self._registry.kept(message.name), message.tier)
        self._report()
        return TiersChanged(tiers=tuple(changed))

    # Instances.

    @handles(StartInstance)
    async def start(self, message: StartInstance) -> AsyncIterator[StartProgress | InstanceStarted]:
        reported_s = self._clock.monotonic_s()
        async with aclosing(followed(lambda told: self._start(message, told))) as steps:
            async for step in steps:
                if not isinstance(step, Step):
                    yield step
                    continue
                yield StartProgress(done_bytes=step.done, total_bytes=step.total)
                # So that the Scheduler keeps its room, and knows how long the queues are.
                if self._clock.monotonic_s() >= reported_s + REPORT_EVERY_S:
                    reported_s = self._clock.monotonic_s()
                    self._report()

    async def _start(self, message: StartInstance, on_progress: OnProgress) -> InstanceStarted:
        self._starting[message.placement_id] = message.model
        self._report()
        failed = True
        try:
            model = self._registry.find(message.model)
            if message.adapter:
                self._bring(self._registry.find(ModelName(message.adapter)))
            started = await self._starter.start(model, await self._registry.wanted(model), on_progress)
            self._counts.started(started.spans)
            try:
                installed = await self._install(model, started)
                failed = False
                return installed
            except BaseException:
                await self._discard(started)
                raise
        except SllmError as error:
            self._counts.failed[error.code] += 1
            raise
        finally:
            del self._starting[message.placement_id]
            self._report(ended=message.placement_id, failed=failed)

    def _bring(self, adapter: Model) -> None:
        """Have an adapter come to host memory beside its base. What this fails with, its request meets again."""
        task = self.context.tasks.spawn(self._lease_adapter(adapter), "adapter", on_failure=lambda _: None)
        task.add_done_callback(lambda done: None if done.cancelled() or done.exception() else done.result().release())

    async def _lease_adapter(self, adapter: Model) -> HostLease:
        return await self._starter.lease(await self._registry.wanted(adapter))

    @handles(HoldAdapter)
    async def hold_adapter(self, message: HoldAdapter) -> AsyncIterator[AdapterHeld]:
        instance = self._instances.get(message.instance_id)
        if instance is None:
            raise Draining(f"instance {message.instance_id} is being stopped", retry_after_s=1.0)
        adapter = self._registry.find(message.adapter)
        if adapter.base != instance.model.name:
            raise Conflict(f"{adapter.name} is no longer an adapter of {instance.model.name}", param="model")
        async with instance.adapters.hold(adapter) as spans:
            if spans:
                self._learn_bandwidth()
                self._report()
            yield AdapterHeld(key=adapter.fingerprint, spans=spans)
            await asyncio.Event().wait()  # Until whoever asked closes the stream.

    async def _install(self, model: Model, started: Started) -> InstanceStarted:
        if not self._registry.is_current(model):
            raise ModelNotFound(f"{model.name} was removed while it started", param="model")
        instance_id = f"{model.name}-{next(self._instance_ids)}"
        worker = InferenceWorker(
            started.engine,
            instance_id,
            self.context.self_ref,
            self._clock,
            keep_alive_s=model.keep_alive_s,
            max_requests=self._limits.max_requests_per_instance,
            room=self._room,
            stop_timeout_s=self._limits.engine_stop_timeout_s,
        )
        ref = await self.context.system.spawn(worker, f"worker/{instance_id}")
        adapters = InstanceAdapters(
            started.engine,
            self._lease_adapter,
            self._clock,
            instance_id,
            chunk_bytes=self._starter.chunk_bytes,
            limit=self._limits.max_adapters_per_instance,
        )
        self._instances[instance_id] = Instance(
            instance_id, model, started, adapters, ref, self._times, self._clock.monotonic_s()
        )
        started.lease.is_of(instance_id)
        self._learn_bandwidth()
        return InstanceStarted(
            instance_id=instance_id, model=model.name, node=self._node, worker=ref.name, spans=started.spans
        )

    def _learn_bandwidth(self) -> None:
        self._ssd.learn(self._tiers.loader.paths().ssd)
        self._remote.learn(self._tiers.remote_path())

    @handles(StopInstances, concurrent=True)
    async def stop_instances(self, message: StopInstances) -> int:
        chosen = [
            instance
            for instance in self._instances.values()
            if instance.model.name == message.model
            and message.instance_id in ("", instance.instance_id)
            and not (message.only_idle and instance.active)
        ]
        await asyncio.gather(*(self._retire(instance) for instance in chosen))
        await asyncio.gather(
            *(
                instance.adapters.forget(message.model, self._limits.drain_timeout_s, only_idle=message.only_idle)
                for instance in self._instances.values()
            )
        )
        return len(chosen)

    async def _stop_all(self, name: ModelName) -> None:
        await self.stop_instances(StopInstances(model=name))

    async def _retire(self, instance: Instance) -> None:
        """Stop one instance, letting it finish its answers first; whoever asks again waits for the same end."""
        if instance.retired is None:
            task = self.context.tasks.spawn(self._retirement(instance), f"retire-{instance.instance_id}")
            instance.retired = task
        await asyncio.shield(instance.retired)

    async def _retirement(self, instance: Instance) -> None:
        self._tell_gone(instance)
        try:
            await instance.worker.ask(Retire(), timeout_s=self._limits.drain_timeout_s)
        except DeliveryFailed as error:
            log.warning("instance %s did not retire in time: %s", instance.instance_id, error)
        await self._uninstall(instance)

    async def _uninstall(self, instance: Instance) -> None:
        """End the worker and its engine, and only then give its memory back."""
        if self._instances.pop(instance.instance_id, None) is None:
            return
        try:
            await self.context.system.stop(instance.worker.name)
        finally:
            await self._discard(instance.started)
            await instance.adapters.close()
            self._report()

    async def _discard(self, started: Started) -> None:
        started.engine.kill()
        try:
            await started.engine.leave(self._limits.engine_stop_timeout_s)
        finally:
            # Also where nobody waits any longer: what is killed computes nothing more.
            started.lease.release()

    @handles(InstanceActivity)
    async def activity(self, message: InstanceActivity) -> None:
        instance = self._instances.get(message.instance_id)
        if instance is None:
            return
        instance.hear(message, self._clock.monotonic_s())
        self._report()

    @handles(InstanceExpired, concurrent=True)
    async def expired(self, message: InstanceExpired) -> None:
        instance = self._instances.get(message.instance_id)
        if instance is not None and not instance.active:
            await self._retire(instance)

    @handles(InstanceDied, concurrent=True)
    async def died(self, message: InstanceDied) -> None:
        instance = self._instances.get(message.instance_id)
        if instance is None or instance.retired is not None:
            return
        log.error("the engine of instance %s has died: %s", message.instance_id, message.reason)
        self._tell_gone(instance)
        await self._uninstall(instance)

    @handles(ListInstances)
    async def list_instances(self, _: ListInstances) -> tuple[InstanceStatus, ...]:
        now_s = self._clock.monotonic_s()
        return tuple(instance.status(self._node, now_s) for instance in self._instances.values())

    async def stopped(self) -> None:
        for instance in list(self._instances.values()):
            await self._discard(instance.started)
            await instance.adapters.close()

    # Reports.

    def _tell_gone(self, instance: Instance) -> None:
        gone = InstanceGone(instance_id=instance.instance_id, model=instance.model.name)
        self.context.system.ref("router").tell(gone)

    def _report(self, ended: str = "", *, failed: bool = False) -> None:
        """Tell the Scheduler what this node has, once it is up and after every change."""
        residents = self._tiers.loader.residents()
        pinned = {resident.fingerprint for resident in residents if resident.pinned}
        self.context.system.ref("scheduler").tell(
            NodeReport(
                node=self._node,
                manager=self.context.self_ref.name,
                slots=self._limits.max_instances,
                host_pool_bytes=self._limits.host_pool_bytes,
                instances=tuple(one.view(pinned, self._clock.monotonic_s()) for one in self._instances.values()),
                pinned_host_bytes={
                    model.fingerprint: model.host_bytes
                    for model in self._registry.models()
                    if model.fingerprint in pinned
                },
                ended_placements=(ended,) if ended else (),
                starting_placements=tuple(self._starting),
                host_fingerprints=tuple(resident.fingerprint for resident in residents),
                ssd_fingerprints=self._registry.fingerprints_on_disk(),
                ssd_bytes_per_s=self._ssd.bytes_per_s,
                disk_queues_s=self._registry.disk_queues_s(),
                remote_bytes_per_s=self._remote.bytes_per_s,
                remote_queue_s=self._tiers.queues().remote_s,
                failed_placements=(ended,) if failed else (),
            )
        )
