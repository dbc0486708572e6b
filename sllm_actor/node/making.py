"""What the rooms of a node are made with: their knobs, out of the node's configuration."""

from __future__ import annotations

from collections.abc import Mapping

from sllm_actor.actors.instance_starter import InstanceStarter
from sllm_actor.actors.model_manager import Limits
from sllm_actor.actors.prepared import MigrationLimits
from sllm_actor.config import Config
from sllm_actor.domain import Backend, EngineLimits
from sllm_actor.domain.roles import Role, roles_of
from sllm_actor.engine.pool import Engines
from sllm_actor.loader.tiers import Tiers
from sllm_actor.runtime import Clock


def make_starter(config: Config, clock: Clock, tiers: Tiers, engines: Mapping[Backend, Engines]) -> InstanceStarter:
    """Make what starts instances."""
    return InstanceStarter(
        tiers,
        engines,
        clock,
        chunk_bytes=config.chunk_bytes,
        map_in_place=config.map_resident_files,
        verify=config.verify_loads,
        stop_timeout_s=config.engine_stop_timeout_s,
        limits=EngineLimits(
            slots=config.max_requests_per_instance,
            kv_cache_bytes=config.kv_cache_bytes,
            prefill_chunk_tokens=config.prefill_chunk_tokens,
        ),
        max_instances=config.max_instances,
    )


def manager_limits_of(config: Config) -> Limits:
    """Give the ModelManager its knobs, and those of its workers."""
    works = Role.WORKER in roles_of(config.roles)
    return Limits(
        max_instances=config.max_instances if works else 0,
        max_requests_per_instance=config.max_requests_per_instance,
        max_adapters_per_instance=config.max_adapters_per_instance,
        drain_timeout_s=config.drain_timeout_s,
        engine_stop_timeout_s=config.engine_stop_timeout_s,
        migration=MigrationLimits(
            max_rounds=config.migration_max_rounds,
            threshold_tokens=config.migration_threshold_tokens,
            round_timeout_s=config.migration_timeout_s,
            hand_over_timeout_s=config.ask_timeout_s,
            take_over_timeout_s=config.take_over_timeout_s,
        ),
        report_every_s=config.report_every_s,
    )
