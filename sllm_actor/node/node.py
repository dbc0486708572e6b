"""One node: everything wired together, started in order, stopped in the reverse order.

The composition root: the only module that knows every room.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from sllm_actor.actors import PeerServer
from sllm_actor.actors.migration_counts import MigrationCounts
from sllm_actor.actors.node_keeper import NODE_KEEPER
from sllm_actor.actors.registration import Examiner, TokenizerFacts
from sllm_actor.actors.registry import Registry
from sllm_actor.actors.start_counts import StartCounts
from sllm_actor.config import Config
from sllm_actor.domain import Backend, check_node_id
from sllm_actor.domain.roles import Role, roles_of
from sllm_actor.engine.client import Engine
from sllm_actor.engine.pool import EnginePool, Engines
from sllm_actor.errors import AddressInUse, ConfigInvalid, DeliveryFailed, InvalidName, SllmError
from sllm_actor.frontend.access import Access
from sllm_actor.frontend.connections import ConnectionLimits
from sllm_actor.frontend.gateway import Gateway
from sllm_actor.frontend.gateway import Limits as GatewayLimits
from sllm_actor.frontend.grammars import GrammarService
from sllm_actor.frontend.server import HttpServer, bind
from sllm_actor.frontend.stream_log import StreamLimits, StreamLog
from sllm_actor.frontend.telemetry import Telemetry, open_telemetry
from sllm_actor.frontend.text import TextService
from sllm_actor.loader.tiers import Tiers
from sllm_actor.messages.between_nodes import BETWEEN_NODES
from sllm_actor.messages.models import ListModels, ModelStatus, RegisterModel
from sllm_actor.messages.operations import StopEverything
from sllm_actor.node.cluster import open_cluster
from sllm_actor.node.data_folder import DataFolder
from sllm_actor.node.first_models import first_models
from sllm_actor.node.held_models import RegisteredModels
from sllm_actor.node.limits import ENGINE_THREADS, GRAMMAR_BYTES, GRAMMAR_MEMORY_BYTES, MAX_FRAME_BYTES
from sllm_actor.node.secret_files import read_cluster_secret
from sllm_actor.node.storage import open_storage
from sllm_actor.node.vllm_engines import VllmEngines
from sllm_actor.node.wiring import Parts, spawn_actors
from sllm_actor.runtime import ActorRef, ActorSystem, Clock, Limits, SystemClock
from sllm_actor.runtime.cores import CoreDemand
from sllm_actor.runtime.forking import ForkServer
from sllm_actor.runtime.lag import LoopLag
from sllm_actor.runtime.network import Endpoint
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.sources.builtin import BUILTIN
from sllm_actor.sources.peer import PEER_ACTOR
from sllm_actor.sources.peer_messages import PEER_MESSAGES

log = logging.getLogger(__name__)

PRELOADED_TOKENIZERS = 64


Knobs = TypeVar("Knobs", GatewayLimits, ConnectionLimits, StreamLimits)


def knobs_of(kind: type[Knobs], config: Config) -> Knobs:
    """Give a room its knobs, which it calls by their own names."""
    return kind(**{name: getattr(config, name) for name in kind._fields})


class Node:
    """A running node, as an async context manager: `async with Node(config) as node`.

    `url` is where its HTTP endpoint listens; `system` takes actors of the embedding program's own.

    Raises:
        ConfigInvalid: the cluster secret can't be read, or is too short; or `models` names none.
    """

    def __init__(self, config: Config, clock: Clock | None = None) -> None:
        self.config = config
        self.clock = clock or SystemClock()
        self._first_models = first_models(config.models)
        limits = Limits(mailbox_messages=config.mailbox_messages, stream_credit=config.stream_credit)
        self.system = ActorSystem(
            node_id=config.node_id,
            messages=(*PEER_MESSAGES, *BETWEEN_NODES),
            security=read_cluster_secret(config.cluster_secret_file),
            limits=limits.silent_within(config.node_silence_s),
            clock=self.clock,
        )
        self.lag = LoopLag(self.clock, config.loop_lag_fault_s)
        self._cores = CoreDemand(self.clock)
        self.url = ""
        self._roles = roles_of(config.roles)
        self._starts = StartCounts()
        self._migrations = MigrationCounts()
        self._stack = AsyncExitStack()
        self._http: HttpServer | None = None

    @property
    def address(self) -> str:
        """Where other nodes find it, `ID@ENDPOINT`; empty where it does not listen to them."""
        return str(self.system.address) if self.system.address.endpoint else ""

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is being answered."""
        return self._http is None or self._http.is_quiet

    async def __aenter__(self) -> Node:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish running answers within the drain time, then leave nothing behind."""
        if self._http is not None:
            await self._cluster.step_down()
            finishing = [self._finish()] if self._cluster.shared else []
            await asyncio.gather(self._http.drain(), *finishing)
        await self._stack.aclose()

    async def _finish(self) -> None:
        """Let what instances of this node generate go on elsewhere, or finish it."""
        limit_s = self.config.drain_timeout_s
        try:
            await self.system.ref(NODE_KEEPER).ask(StopEverything(), timeout_s=limit_s)
        except DeliveryFailed as error:
            log.warning("answers for other nodes were not finished within %g s: %s", limit_s, error)

    async def _start(self) -> None:
        config, stack = self.config, self._stack
        try:
            node_id = check_node_id(config.node_id)
        except InvalidName as error:
            raise ConfigInvalid(f"node_id: {error.message}", param="node_id") from None
        self._access = Access(config.api_key_file, self.clock)
        # What fails often and costs nothing comes first: the ports and the folder.
        listening = bind(config.host, config.port, has_key=self._access.needs_key)
        stack.callback(listening.close)
        stack.push_async_callback(self.system.close)
        await self._listen()
        folder = DataFolder.open(Path(config.data_dir).expanduser().absolute())
        stack.callback(folder.close)

        tasks = TaskScope("node")
        stack.push_async_callback(tasks.close)
        tasks.spawn(self.lag.watch(), "lag")
        tasks.spawn(self._cores.watch(), "cores")

        forks = self._fork_server()
        stack.push_async_callback(forks.stop)
        # The imports of the fork server take seconds; the pool is faulted in beside them.
        importing = tasks.spawn(self._fork(forks), "forkserver", on_failure=lambda _: None)
        cluster = self._cluster = await open_cluster(config, folder.path, node_id, self.system, self.clock, stack)
        cluster.place.core_threads = lambda: self._cores.threads
        self._storage = await open_storage(config, folder.path, self.clock, stack, self.system, cluster.peers)
        tiers = self._storage.tiers

        engines = EnginePool(
            lambda: Engine.fork(forks, tiers.loader.pool_fd, config.max_frame_bytes),
            config.warm_engines if Role.WORKER in self._roles else 0,
            config.engine_refill_delay_s,
            self.clock,
        )
        stack.push_async_callback(engines.close, config.engine_stop_timeout_s)
        text = TextService(forks, timeout_s=config.text_timeout_s, max_frame_bytes=config.max_frame_bytes)
        stack.push_async_callback(text.close)
        grammars = self._grammars(forks)
        stack.push_async_callback(grammars.close)
        backends: dict[Backend, Engines] = {
            Backend.SLLM: engines,
            Backend.VLLM: VllmEngines(config, tiers.loader.pool_fd),
        }
        examiner = self._examiner(backends, text, tiers)
        registry = Registry(cluster.store, examiner, tiers, self.clock, shared=cluster.shared)
        stack.push_async_callback(registry.close)
        text.restore = registry.restore
        # Once more, because actors stop before what they use.
        stack.push_async_callback(self.system.close)

        await self.system.spawn(PeerServer(RegisteredModels(registry, tiers), max_reads=config.peer_reads), PEER_ACTOR)
        parts = Parts(
            config, self.system, self.clock, cluster, registry, tiers, backends, self._starts, self._migrations
        )
        gateway = await self._open_gateway(parts, text, grammars, tasks)
        self._http = HttpServer(gateway, knobs_of(ConnectionLimits, config))
        stack.push_async_callback(self._http.close)
        await self._http.start(listening)
        self.url = self._http.url
        folder.serve_at(self.url)
        await importing
        await engines.start()
        if Role.GATEWAY in self._roles:
            await text.start()
            await self._load_tokenizers(gateway, text)
        await self._register(gateway.manager)
        gateway.ready = True
        self.lag.tell()
        log.info("node %s is ready at %s", node_id, self.url)

    def _fork_server(self) -> ForkServer:
        config = self.config
        return ForkServer(
            "sllm_actor.node.children",
            {
                ENGINE_THREADS: str(config.engine_threads),
                MAX_FRAME_BYTES: str(config.max_frame_bytes),
                GRAMMAR_BYTES: str(min(config.grammar_bytes, config.max_frame_bytes // 2)),
                GRAMMAR_MEMORY_BYTES: str(config.grammar_memory_bytes),
            },
        )

    async def _fork(self, forks: ForkServer) -> None:
        """Begin to import, unless this node has nothing to fork."""
        if self._roles & {Role.GATEWAY, Role.WORKER}:
            await forks.start()

    async def _listen(self) -> None:
        config, knob = self.config, "advertise"
        try:
            if config.advertise:
                Endpoint.parse(config.advertise)
            knob = "listen"
            if config.listen:
                await self.system.listen(config.listen, advertise=config.advertise or None)
        except (AddressInUse, ConfigInvalid) as error:
            knob = "advertise" if error.param == "advertise" else knob
            raise type(error)(f"{knob}: {error.message}", param=knob) from None

    def _grammars(self, forks: ForkServer) -> GrammarService:
        return GrammarService(
            forks,
            timeout_s=self.config.grammar_timeout_s,
            cache_bytes=self.config.grammar_cache_bytes,
            max_frame_bytes=self.config.max_frame_bytes,
        )

    def _examiner(self, engines: Mapping[Backend, Engines], text: TextService, tiers: Tiers) -> Examiner:
        async def inspect(path: str) -> TokenizerFacts:
            loaded = await text.load(path)
            return TokenizerFacts(loaded.vocabulary_tokens, loaded.chat)

        return Examiner(
            engines,
            inspect,
            BUILTIN,
            tiers.describe,
            max_adapter_rank=self.config.max_adapter_rank,
            max_adapter_bytes=self.config.max_adapter_bytes,
            pool_bytes=self.config.host_pool_bytes,
            chunk_bytes=self.config.chunk_bytes,
            keep_alive_s=self.config.keep_alive_s,
            stop_timeout_s=self.config.engine_stop_timeout_s,
        )

    async def _open_gateway(
        self, parts: Parts, text: TextService, grammars: GrammarService, tasks: TaskScope
    ) -> Gateway:
        actors = await spawn_actors(parts)
        self._room = actors.room
        return Gateway(
            router=actors.router,
            manager=actors.manager,
            coordinator=actors.coordinator,
            nodes=actors.nodes,
            text=text,
            grammars=grammars,
            clock=self.clock,
            limits=knobs_of(GatewayLimits, self.config),
            observe=self._observe,
            tasks=tasks,
            access=self._access,
            telemetry=await self._open_telemetry(actors.router),
            streams=await self._open_streams(),
            roles=self._roles,
        )

    async def _open_streams(self) -> StreamLog:
        cluster = self._cluster
        streams = StreamLog(cluster.store, self.clock, knobs_of(StreamLimits, self.config), shared=cluster.shared)
        await streams.open()
        self._stack.push_async_callback(streams.close)
        return streams

    async def _open_telemetry(self, router: ActorRef) -> Telemetry | None:
        config = self.config
        telemetry = open_telemetry(
            config.otlp_endpoint, config.node_id, router, self.clock, timeout_s=config.ask_timeout_s
        )
        if telemetry is not None:
            self._stack.push_async_callback(telemetry.close)
        return telemetry

    def _observe(self) -> dict[str, Any]:
        lag = {"worst_s": self.lag.worst_s, "faults": self.lag.faults}
        loader = self._storage.tiers.loader.observe()
        writes = self._storage.gate.observe()
        return {
            "system": self.system.stats(),
            "loop_lag": lag,
            "loader": loader,
            "writes": writes,
            "waiting": self._room.waiting(),
            "starts": self._starts.observe(),
            "migrations": self._migrations.observe(),
        }

    async def _register(self, manager: ActorRef) -> None:
        """Register the models of the configuration, one after the other: what is written there holds."""
        for name, source in self._first_models.items():
            model = RegisterModel(name=name, source=source, keep_alive_s=None, replace=True)
            try:
                await manager.ask(model, timeout_s=self.config.engine_start_timeout_s)
            except SllmError as error:
                raise type(error)(f"models: {name}={source}: {error.message}", param="models") from None

    async def _load_tokenizers(self, gateway: Gateway, text: TextService) -> None:
        """Load the tokenizers of registered models, so that the first request to each need not."""
        statuses: tuple[ModelStatus, ...] = await gateway.manager.ask(ListModels(), timeout_s=self.config.ask_timeout_s)
        # Several names may share one folder, and each load reads it anew.
        paths = dict.fromkeys(status.model.texts for status in statuses)
        for path in list(paths)[:PRELOADED_TOKENIZERS]:
            try:
                await text.load(path)
            except SllmError as error:
                log.warning("the tokenizer of %s can't be loaded: %s", path, error)
