"""What each tier of this node holds, by whom and since when, for people and for the admin API."""

from __future__ import annotations

from collections.abc import Sequence

from sllm_actor.actors.registry import Registry
from sllm_actor.loader.holder import Holder
from sllm_actor.loader.tiers import Tiers
from sllm_actor.messages.models import HolderView, TierEntry, TiersView, WayView
from sllm_actor.runtime import Clock


def tiers_view(tiers: Tiers, registry: Registry, clock: Clock) -> TiersView:
    """Describe host memory and the SSD."""
    now_s, now_wall_s = clock.monotonic_s(), clock.wall_s()
    by_fingerprint: dict[str, list[str]] = {}
    for model in registry.models():
        by_fingerprint.setdefault(model.fingerprint, []).append(model.name)
    by_id = registry.names_by_model_id()
    host = tuple(
        TierEntry(
            models=tuple(by_fingerprint.get(resident.fingerprint, ())),
            model_id="",
            size_bytes=resident.size_bytes,
            done_bytes=resident.size_bytes,
            leases=resident.leases,
            held_by=_holders(resident.holders, now_s),
            pinned=resident.pinned,
            idle_s=0.0 if resident.leases else max(0.0, now_s - resident.last_used_s),
        )
        for resident in tiers.loader.residents()
    )
    ssd = tuple(
        TierEntry(
            models=tuple(by_id.get(entry.model_id, ())),
            model_id=entry.model_id,
            size_bytes=entry.size_bytes,
            done_bytes=entry.done_bytes,
            leases=entry.leases,
            held_by=_holders(entry.holders, now_s),
            pinned=entry.pinned,
            idle_s=0.0 if entry.leases else max(0.0, now_wall_s - entry.last_used_wall_s),
        )
        for entry in tiers.ssd.entries()
    )
    queues, paths = tiers.queues(), tiers.loader.paths()
    ways = {"ssd": paths.ssd, "page cache": paths.page_cache, "device": paths.device, "remote": tiers.remote_path()}
    return TiersView(
        host=host,
        host_free_bytes=tiers.loader.free_bytes,
        host_bytes=tiers.loader.pool_bytes,
        ssd=ssd,
        ssd_used_bytes=tiers.ssd.used_bytes,
        ssd_quota_bytes=tiers.ssd.quota_bytes,
        local_queues_s=queues.local_s,
        remote_queue_s=queues.remote_s,
        ways={
            name: WayView(size_bytes=way.size_bytes, busy_s=way.busy_s, bytes_per_s=way.bytes_per_s)
            for name, way in ways.items()
        },
    )


def _holders(holders: Sequence[Holder], now_s: float) -> tuple[HolderView, ...]:
    return tuple(HolderView(who=holder.who, held_s=max(0.0, now_s - holder.since_s)) for holder in holders)
