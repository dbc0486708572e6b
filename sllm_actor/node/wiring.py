"""The actors of a node and how they know each other: the same on a machine and in a simulation."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import NamedTuple

from sllm_actor.actors import MigrationCoordinator, ModelManager, Router, Scheduler
from sllm_actor.actors.autoscaler import Autoscaler
from sllm_actor.actors.estimate_book import EstimateBook
from sllm_actor.actors.migration_coordinator import ROUTER
from sllm_actor.actors.migration_counts import MigrationCounts
from sllm_actor.actors.node_keeper import COORDINATOR, NODE_KEEPER, NodeKeeper
from sllm_actor.actors.nodes_desk import MANAGER, NodesDesk
from sllm_actor.actors.registry import Registry
from sllm_actor.actors.request_log import RequestLog
from sllm_actor.actors.scheduler import Limits as SchedulerLimits
from sllm_actor.actors.start_counts import StartCounts
from sllm_actor.actors.starting import Starting
from sllm_actor.actors.waiting_room import WaitingRoom
from sllm_actor.config import Config
from sllm_actor.domain import Backend, NodeId
from sllm_actor.engine.pool import Engines
from sllm_actor.loader.tiers import Tiers
from sllm_actor.node.cluster import Cluster
from sllm_actor.node.making import make_starter, manager_limits_of
from sllm_actor.runtime import ActorRef, ActorSystem, Clock


class Parts(NamedTuple):
    """What the actors of one node stand on."""

    config: Config
    system: ActorSystem
    clock: Clock
    cluster: Cluster
    registry: Registry
    tiers: Tiers
    engines: Mapping[Backend, Engines]
    starts: StartCounts
    migrations: MigrationCounts


class Actors(NamedTuple):
    """The actors of one node that others ask, and where its requests wait."""

    router: ActorRef
    manager: ActorRef
    coordinator: ActorRef
    nodes: ActorRef
    room: WaitingRoom


async def spawn_actors(parts: Parts) -> Actors:
    """Spawn a node's actors, lowest first, and be ready to lead."""
    config, system, clock, cluster = parts.config, parts.system, parts.clock, parts.cluster
    room = WaitingRoom(clock, max_in_all=config.max_waiting_requests, max_per_model=config.max_waiting_per_model)
    place, way, tiers = cluster.place, cluster.way, parts.tiers
    starter, limits = make_starter(config, clock, tiers, parts.engines), manager_limits_of(config)
    manager = await system.spawn(
        ModelManager(place, way, parts.registry, tiers, starter, clock, limits, room, parts.starts), MANAGER
    )
    nodes = await _spawn_operators(parts, manager)
    starting = Starting(
        manager,
        way,
        clock,
        parts.starts,
        ask_timeout_s=config.ask_timeout_s,
        placement_timeout_s=config.start_timeout_s,
        start_timeout_s=config.engine_start_timeout_s,
    )
    routing = Router(
        way,
        starting,
        RequestLog(clock, config.request_history),
        clock,
        routes=cluster.routes,
        room=room,
        counts=parts.starts,
        ask_timeout_s=config.ask_timeout_s,
    )
    router = await system.spawn(routing, ROUTER)
    await cluster.lead(system, partial(_scheduler, parts))
    coordinating = MigrationCoordinator(
        place.node,
        cluster.members,
        starting,
        parts.migrations,
        cluster.moves,
        ask_timeout_s=config.ask_timeout_s,
        migration_timeout_s=config.migration_timeout_s,
        stop_timeout_s=config.drain_timeout_s + config.engine_stop_timeout_s,
        max_migrations=config.max_migrations,
    )
    coordinator = await system.spawn(coordinating, COORDINATOR)
    return Actors(router, manager, coordinator, nodes, room)


def _scheduler(parts: Parts, epoch: int, members: Mapping[NodeId, int], gone: Collection[NodeId]) -> Scheduler:
    config = parts.config
    autoscaler = Autoscaler(
        parts.registry.kept_running, parts.registry.known, parts.clock, instance_takes=config.max_requests_per_instance
    )
    limits = SchedulerLimits(
        lease_s=config.engine_start_timeout_s,
        evict_timeout_s=config.drain_timeout_s + config.engine_stop_timeout_s,
        max_waiting=config.max_waiting_requests,
        placement_policy=config.placement_policy,
        locality_wait_s=config.locality_wait_s,
        decision_history=config.decision_history,
        switch_hold_s=config.switch_hold_s,
        move_timeout_s=config.migration_timeout_s,
        bytes_first_s=config.bytes_first_s,
    )
    book = EstimateBook(parts.cluster.store, parts.cluster.commit, parts.clock)
    return Scheduler(parts.clock, limits, parts.starts, epoch, members, autoscaler, book, gone)


async def _spawn_operators(parts: Parts, manager: ActorRef) -> ActorRef:
    """Spawn those who carry out what is asked of this node, and of all of them; give the latter."""
    config, cluster = parts.config, parts.cluster
    ask_timeout_s = config.ask_timeout_s
    stop_timeout_s = config.drain_timeout_s + config.engine_stop_timeout_s
    keeper = NodeKeeper(
        cluster.place, cluster.store, manager, parts.clock, ask_timeout_s=ask_timeout_s, stop_timeout_s=stop_timeout_s
    )
    await parts.system.spawn(keeper, NODE_KEEPER)
    desk = NodesDesk(
        cluster.place.node,
        cluster.members,
        cluster.roles,
        cluster.way,
        cluster.store,
        ask_timeout_s=ask_timeout_s,
        stop_timeout_s=stop_timeout_s,
    )
    return await parts.system.spawn(desk, "nodes")
