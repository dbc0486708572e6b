"""Knows the registered models, which tier holds which, and starts and stops their instances on this node."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing

from sllm_actor.actors.adapters import InstanceAdapters
from sllm_actor.actors.bringing import fetched, pulled
from sllm_actor.actors.inference_worker import InferenceWorker
from sllm_actor.actors.instance import WORKERS, Instance
from sllm_actor.actors.instance_starter import InstanceStarter, Started
from sllm_actor.actors.manager_limits import Limits as Limits
from sllm_actor.actors.place import Place
from sllm_actor.actors.registry import Registry
from sllm_actor.actors.reporting import Reporting
from sllm_actor.actors.scheduler_way import SchedulerWay
from sllm_actor.actors.standing import standing
from sllm_actor.actors.start_counts import StartCounts
from sllm_actor.actors.tiers_view import tiers_view
from sllm_actor.actors.under_way import UnderWay
from sllm_actor.actors.waiting_room import WaitingRoom
from sllm_actor.domain import Model, ModelName
from sllm_actor.errors import Conflict, DeliveryFailed, Draining, ModelNotFound, SllmError
from sllm_actor.loader import keeping
from sllm_actor.loader.lease import HostLease
from sllm_actor.loader.loads import OnProgress
from sllm_actor.loader.tiers import Tiers
from sllm_actor.messages.instances import (
    AdapterHeld,
    EndAnswers,
    EndStarts,
    FetchModel,
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
from sllm_actor.messages.placement import ReportNow
from sllm_actor.policy.answer_times import LearnedTimes
from sllm_actor.runtime import Actor, Clock, handles
from sllm_actor.runtime.progress import Step, followed

log = logging.getLogger(__name__)


class ModelManager(Actor):
    """Owns the registrations, the instances of this node and their leases on host memory."""

    def __init__(
        self,
        place: Place,
        way: SchedulerWay,
        registry: Registry,
        tiers: Tiers,
        starter: InstanceStarter,
        clock: Clock,
        limits: Limits,
        room: WaitingRoom,
        counts: StartCounts,
    ) -> None:
        self._place = place
        self._registry = registry
        self._tiers = tiers
        self._starter = starter
        self._clock = clock
        self._limits = limits
        self._room = room
        self._counts = counts
        self._instances: dict[str, Instance] = {}
        self._under_way = UnderWay()
        self._starting = self._under_way.models
        self._times = LearnedTimes()
        self._instance_ids = itertools.count(1)
        self._reporting = Reporting(place, way, registry, tiers, clock, limits, room)

    async def started(self) -> None:
        await self._registry.open()
        self._reporting.begin(self.context.self_ref.name, self._instances, self._starting)
        self.context.tasks.spawn(self._reporting.keep_telling(), "report")
        if not self._place.alone:
            self.context.tasks.spawn(self._reporting.introduce(), "introduce")
            self.context.tasks.spawn(self._follow_models(), "follow")

    # Registrations.

    @handles(RegisterModel, concurrent=True)
    async def register(self, message: RegisterModel) -> Model:
        with self._registry.change(message.name):
            model, changed = await self._registry.register(message)
            if changed:
                # Last: one of the old may have come up while this was being stored.
                await self._stop_all(model.name)
            self._rescale(model.name)
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
        async with aclosing(pulled(self._registry, self._tiers, message.name)) as progress:
            async for step in progress:
                yield step
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
                if self._clock.monotonic_s() >= reported_s + self._limits.report_every_s:
                    reported_s = self._clock.monotonic_s()
                    self._report()

    async def _start(self, message: StartInstance, on_progress: OnProgress) -> InstanceStarted:
        self._place.check(message.epoch)
        failed = True
        try:
            with self._under_way.going(message.placement_id, message.model):
                self._report()
                installed = await self._bring_up(message, on_progress)
            failed = False
            return installed
        except SllmError as error:
            self._counts.failed[error.code] += 1
            raise
        finally:
            self._reporting.ended(message.placement_id, failed=failed)
            self._report()

    async def _bring_up(self, message: StartInstance, on_progress: OnProgress) -> InstanceStarted:
        model = self._registry.find(message.model)
        if message.adapter:
            self._bring(self._registry.find(ModelName(message.adapter)))
        started = await self._starter.start(model, await self._registry.wanted(model), on_progress)
        self._counts.started(started.spans)
        try:
            return await self._install(model, started)
        except BaseException:
            await self._discard(started)
            raise

    @handles(EndStarts)
    async def end_starts(self, _: EndStarts) -> int:
        return self._under_way.end()

    @handles(FetchModel)
    async def fetch(self, message: FetchModel) -> AsyncIterator[StartProgress]:
        self._place.check(message.epoch)
        async with aclosing(fetched(self._registry, self._starter, message.model, self._counts)) as progress:
            async for step in progress:
                yield step
        self._reporting.tell_what_moved()

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
                self._reporting.tell_what_moved()
            yield AdapterHeld(key=adapter.fingerprint, spans=spans)
            await asyncio.Event().wait()  # Until whoever asked closes the stream.

    async def _install(self, model: Model, started: Started) -> InstanceStarted:
        if not self._registry.is_current(model):
            raise ModelNotFound(f"{model.name} was removed while it started", param="model")
        instance_id = f"{model.name}-{self._place.tag}{next(self._instance_ids)}"
        worker = InferenceWorker(
            started.engine, instance_id, self.context.self_ref, self._clock, keep_alive_s=model.keep_alive_s,
            max_requests=self._limits.max_requests_per_instance, room=self._room,
            stop_timeout_s=self._limits.engine_stop_timeout_s, migration=self._limits.migration,
        )  # fmt: skip
        ref = await self.context.system.spawn(worker, f"{WORKERS}{instance_id}")
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
        self._reporting.learn_bandwidth()
        route = self._instances[instance_id].route(self._place)
        self._place.published(route)
        return route

    @handles(StopInstances, concurrent=True)
    async def stop_instances(self, message: StopInstances) -> int:
        named = [one for one in self._instances.values() if message.instance_id in ("", one.instance_id)]
        chosen = [one for one in named if one.model.name == message.model and not (message.only_idle and one.active)]
        if message.only_idle and not chosen:
            self._report()  # Before the answer: whoever takes it for idle would ask again at once.
        retiring = (self._retire(instance, was_idle=message.only_idle, preempt=message.preempt) for instance in chosen)
        await asyncio.gather(*retiring)
        await asyncio.gather(
            *(
                instance.adapters.forget(message.model, self._limits.drain_timeout_s, only_idle=message.only_idle)
                for instance in self._instances.values()
            )
        )
        return len(chosen)

    async def _stop_all(self, name: ModelName) -> None:
        await self.stop_instances(StopInstances(model=name))

    async def _retire(self, instance: Instance, *, was_idle: bool = False, preempt: bool = False) -> None:
        """Stop one instance, letting it finish its answers first; whoever asks again waits for the same end."""
        if instance.retired is None:
            task = self.context.tasks.spawn(self._retirement(instance, was_idle), f"retire-{instance.instance_id}")
            instance.retired = task
        if preempt:
            instance.worker.tell(EndAnswers())
        await asyncio.shield(instance.retired)

    async def _retirement(self, instance: Instance, was_idle: bool) -> None:
        self._tell_gone(instance)
        try:
            await instance.worker.ask(Retire(was_idle=was_idle), timeout_s=self._limits.drain_timeout_s)
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
    def activity(self, message: InstanceActivity) -> None:
        instance = self._instances.get(message.instance_id)
        if instance is None:
            return
        instance.hear(message, self._clock.monotonic_s())
        self._reporting.tell_of(instance)

    @handles(InstanceExpired, concurrent=True)
    async def expired(self, message: InstanceExpired) -> None:
        instance = self._instances.get(message.instance_id)
        if instance is not None and not instance.active and not instance.kept:
            await self._retire(instance, was_idle=True)

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
        return tuple(instance.status(self._place.node, now_s) for instance in self._instances.values())

    async def stopped(self) -> None:
        self._reporting.close()
        for instance in list(self._instances.values()):
            await self._discard(instance.started)
            await instance.adapters.close()

    def _tell_gone(self, instance: Instance) -> None:
        self._place.withdrawn(instance.route(self._place))
        gone = InstanceGone(instance_id=instance.instance_id, model=instance.model.name)
        self.context.system.ref("router").tell(gone)

    def _report(self) -> None:
        """Tell the Scheduler what this node has, once it is up and after every change."""
        self._reporting.tell()

    @handles(ReportNow)
    async def report_now(self, _: ReportNow) -> None:
        self._report()

    async def _follow_models(self) -> None:
        """Stop what runs of a model that another node has registered anew or removed."""
        async with aclosing(self._registry.followed()) as names:
            async for name, is_another in names:
                if is_another:
                    self._times.forget(name)
                    self.context.tasks.spawn(self._stop_all(name), f"stop-{name}")
                self._rescale(name)
                self._report()

    def _rescale(self, name: ModelName) -> None:
        """Keep what is to run while nobody asks, and let go what no longer is."""
        kept = self._registry.keeps(name)
        for instance in self._instances.values():
            if instance.model.name == name and instance.kept != kept:
                instance.kept = kept
                if not kept and not instance.active:
                    self.context.tasks.spawn(self._retire(instance), "let-go")
