"""A node in a simulation: the production actors, wired as a node wires them, on simulated tiers, engines and store."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from math import inf
from typing import Any, NamedTuple, TypeVar, cast

import msgspec

from sllm_actor.actors.migration_counts import MigrationCounts
from sllm_actor.actors.node_keeper import NODE_KEEPER
from sllm_actor.actors.registration import Examiner
from sllm_actor.actors.registry import Registry
from sllm_actor.actors.shared_models import Decode, decode_model
from sllm_actor.actors.start_counts import StartCounts
from sllm_actor.config import Config
from sllm_actor.domain import Backend, Model, ModelName
from sllm_actor.engine.pool import EnginePool, Engines
from sllm_actor.errors import DeliveryFailed
from sllm_actor.loader.tiers import Tiers
from sllm_actor.messages.between_nodes import BETWEEN_NODES
from sllm_actor.messages.operations import StopEverything
from sllm_actor.metadata import Changes
from sllm_actor.node.cluster import Many
from sllm_actor.node.wiring import Actors, Parts, spawn_actors
from sllm_actor.runtime import ActorRef, ActorSystem, Clock, Limits, Network, Security
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.testing.engine_handle import SimulatedEngine, fork
from sllm_actor.testing.process_loop import context_of
from sllm_actor.testing.simulated_cores import Cores
from sllm_actor.testing.simulated_engine import EngineProcess, Heard, Speed
from sllm_actor.testing.simulated_store import MemoryStore, Way
from sllm_actor.testing.simulated_tiers import SimulatedCard, SimulatedTiers, folder_of

T = TypeVar("T")

MIB = 1024 * 1024
PORT = 7000
SECRET = b"the secret of a simulated cluster"
# How often a watch looks whether its node can be reached again.
LOOK_S = 0.05
LIMITS = Limits(handshake_timeout_s=1.0, heartbeat_s=1.0, acceptable_pause_s=1.0, redial_last_s=0.5)


def config_of(name: str, slots: int, placement_policy: str, bytes_first_s: float = 3.0) -> Config:
    """Give a node's knobs: short times, so that little virtual time does, and few slots, so that bounds are met."""
    return Config(
        node_id=name,
        listen=f"tcp://{name}:{PORT}",
        metadata="etcd://store:2379",
        lease_ttl_s=2,
        host_pool_bytes=256 * MIB,
        chunk_bytes=MIB,
        max_instances=slots,
        placement_policy=placement_policy,
        bytes_first_s=bytes_first_s,
        migration_timeout_s=10.0,
        warm_engines=1,
        max_requests_per_instance=2,
        kv_cache_bytes=MIB,
        engine_start_timeout_s=10.0,
        engine_stop_timeout_s=1.0,
        start_timeout_s=20.0,
        drain_timeout_s=5.0,
        ask_timeout_s=5.0,
        migration_threshold_tokens=1,
    )


def model_of(name: str, size_bytes: int, keep_alive_s: float) -> Model:
    """Register a model of which nobody will ever see a byte."""
    return Model(
        name=ModelName(name), path=str(folder_of(name)), source=f"simulated://{name}", card=name,
        fingerprint=SimulatedCard(name, size_bytes).checkpoint.fingerprint, architecture="OPTForCausalLM",
        dtype="float16", size_bytes=size_bytes, host_bytes=size_bytes, context_tokens=2048, vocabulary_tokens=50_000,
        eos_token_ids=(2,), default_temperature=1.0, default_top_p=1.0, chat=False, keep_alive_s=keep_alive_s,
        registered_wall_s=0.0,
    )  # fmt: skip


class Means(msgspec.Struct, frozen=True, kw_only=True):
    """What nodes are made of: their knobs, bytes a second, room on their disks, how fast models compute.

    `cores` are what all of their processes compute on, where engines have no devices of their own; of each request a
    gateway computes `request_s` there before anything else. With `echoes`, late tokens come where none should.
    """

    config_of: Callable[[str], Config]
    limits: Limits = LIMITS
    ssd_bytes_per_s: float = 500e6
    remote_bytes_per_s: float = 100e6
    ssd_quota_bytes: float = inf
    keeps_host: bool = True
    speed_of: Callable[[str], Speed] = lambda _: Speed()
    cores: Cores = msgspec.field(default_factory=Cores)
    request_s: float = 0.0
    echoes: bool = False
    decode: Decode = decode_model


class Home(NamedTuple):
    """Where an answer is generated or prepared: the node, its life and the engine."""

    node: str
    process: str
    pid: int


# Is told what an engine heard of the request with a prompt, in which epoch.
Hears = Callable[[Home, Heard, bytes, int], None]


class StoreWay(Way):
    """One node's way to the store. What has come there is carried out, whatever happens to who sent it."""

    def __init__(self, truth: MemoryStore, clock: Clock) -> None:
        super().__init__(truth, clock, patience_s=3.0)
        self._server = TaskScope("store", lambda: context_of(""))

    async def watch(self, prefix: str, from_revision: int) -> AsyncGenerator[Changes, None]:
        async with aclosing(self._truth.watch(prefix, from_revision)) as watch:
            async for changes in watch:
                await self._clock.sleep(self.latency_s)
                while self.cut:
                    await self._clock.sleep(LOOK_S)
                yield changes

    async def _asked(self, call: Callable[[], Awaitable[T]]) -> T:
        return await super()._asked(lambda: self._carried_out(call))

    async def _carried_out(self, call: Callable[[], Awaitable[T]]) -> T:
        async def carry_out() -> T:
            return await call()

        work: asyncio.Task[T] = self._server.spawn(carry_out(), "call", on_failure=lambda _: None)
        await asyncio.wait([work])
        return work.result()


class SimulatedNode:
    """One life of one node. All of it runs in the node's own context, but its engines, which are other processes."""

    def __init__(
        self,
        name: str,
        life: int,
        *,
        truth: MemoryStore,
        cards: Mapping[str, SimulatedCard],
        stored: Sequence[str],
        clock: Clock,
        network: Network,
        dice: random.Random,
        problem: Callable[[str], None],
        moves: Hears,
        means: Means,
    ) -> None:
        self.name = name
        self._means = means
        self.process = f"{name}/{life}"
        self.context = context_of(self.process)
        self.clock = clock
        self.config = means.config_of(name)
        self.way = StoreWay(truth, clock)
        self.processes: list[EngineProcess] = []
        self.actors: Actors
        self.cluster: Many
        self.ready = False
        self.closed = False
        self._network = network
        self._dice = dice
        self._problem = problem
        self._moves = moves
        self._limits = means.limits
        self._stack = AsyncExitStack()
        self.tiers = SimulatedTiers(
            cards,
            stored,
            clock,
            pool_bytes=self.config.host_pool_bytes,
            ssd_bytes_per_s=means.ssd_bytes_per_s,
            remote_bytes_per_s=means.remote_bytes_per_s,
            ssd_quota_bytes=means.ssd_quota_bytes,
            keeps_host=means.keeps_host,
        )

    def _fork(self) -> SimulatedEngine:
        context, pid = context_of(f"engine of {self.process}"), len(self.processes) + 1
        engine = fork(context, pid, self._means.speed_of, self, self._means.cores, self._means.echoes)
        self.processes.append(engine.process)
        return engine

    def problem(self, text: str) -> None:
        """Hear of what may not be."""
        self._problem(f"{self.process}: {text}")

    def hears(self, process: EngineProcess, heard: Heard, prompt: bytes, epoch: int) -> None:
        """Pass on what an engine of this node heard of a request."""
        self._moves(Home(self.name, self.process, process.pid), heard, prompt, epoch)

    def _escalated(self, ref: ActorRef, failure: BaseException) -> None:
        self.problem(f"{ref.name} escalates {failure!r}")

    @property
    def engines(self) -> list[EngineProcess]:
        """The engine processes that live."""
        return [process for process in self.processes if not process.ended]

    @property
    def router(self) -> ActorRef:
        """Where its requests go."""
        return self.actors.router

    async def start(self) -> None:
        """Do what `Node` does, in its order, and be ready; on any failure nothing is left.

        Raises:
            SllmError: the store can't be asked, or another life of this node is still a member.
        """
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise

    async def _start(self) -> None:
        config, clock, stack = self.config, self.clock, self._stack
        self.system = ActorSystem(
            node_id=self.name, messages=BETWEEN_NODES, security=Security(secret=SECRET), limits=self._limits,
            clock=clock, network=self._network, randomness=self._dice.randbytes, on_escalation=self._escalated,
        )  # fmt: skip
        stack.push_async_callback(self.system.close)
        await self.system.listen(config.listen)
        self.cluster = cluster = Many(self.way, self.system, clock, config)
        stack.push_async_callback(cluster.close)
        await cluster.join()

        async def forked() -> SimulatedEngine:
            return self._fork()

        self.pool = EnginePool(forked, config.warm_engines, config.engine_refill_delay_s, clock)
        stack.push_async_callback(self.pool.close, config.engine_stop_timeout_s)
        tiers = cast(Tiers, self.tiers)
        registry = Registry(self.way, cast(Examiner, None), tiers, clock, shared=True, decode=self._means.decode)
        stack.push_async_callback(registry.close)
        # Once more, because actors stop before what they use.
        stack.push_async_callback(self.system.close)
        engines: dict[Backend, Engines] = {Backend.SLLM: self.pool}
        self.parts = Parts(
            config, self.system, clock, cluster, registry, tiers, engines, StartCounts(), MigrationCounts()
        )
        self.actors = await spawn_actors(self.parts)
        await self.pool.start()
        self.ready = True

    async def accept(self) -> None:
        """Compute what a gateway does with a request before its Router hears of it."""
        if self._means.request_s:
            await self._means.cores.work(self._means.request_s)

    async def close(self) -> None:
        """Leave as `Node` does: finish what runs, and leave nothing behind."""
        self.ready = False
        await self.cluster.step_down()
        try:
            limit_s = self.config.drain_timeout_s
            await self.system.ref(NODE_KEEPER).ask(StopEverything(), timeout_s=limit_s)
        except DeliveryFailed:
            pass  # They took too long, and are ended now.
        await self._stack.aclose()
        self.closed = True

    async def abandon(self) -> None:
        """Give up what a crashed node is made of."""
        await self._stack.aclose()

    def actor(self, name: str) -> Any:
        """Give an actor itself, to be looked at."""
        return self.system.cells[name].actor


def registered(models: Sequence[Model]) -> list[tuple[str, bytes]]:
    """Give what the store has of these models."""
    return [(f"models/{model.name}", msgspec.msgpack.encode(model)) for model in models]
