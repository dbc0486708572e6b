"""The bounds that a ModelManager keeps."""

from __future__ import annotations

from typing import NamedTuple

from sllm_actor.actors.prepared import MigrationLimits


class Limits(NamedTuple):
    """The manager's knobs; the names are those of `Config`."""

    max_instances: int
    max_requests_per_instance: int
    drain_timeout_s: float
    engine_stop_timeout_s: float
    max_adapters_per_instance: int
    migration: MigrationLimits
    report_every_s: float
