"""Start one instance: bytes to host memory and a skeleton in an engine, at once; then the one into the other."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import msgspec

from sllm_actor.actors.engine_in_time import EngineInTime
from sllm_actor.actors.preparing import prepare_of
from sllm_actor.checkpoint.folder import Checkpoint
from sllm_actor.domain import Backend, EngineLimits, Model, Span
from sllm_actor.engine.client import Engine
from sllm_actor.engine.pool import Engines
from sllm_actor.loader.cards import Card
from sllm_actor.loader.lease import HostLease, LoadReport
from sllm_actor.loader.loads import OnProgress
from sllm_actor.loader.mapping import HostFile
from sllm_actor.loader.memory import available_bytes
from sllm_actor.loader.order import OnPlaced
from sllm_actor.loader.tiers import FIRST_REMOTE_BYTES_PER_S, Tiers
from sllm_actor.runtime.clock import Clock


class Started(NamedTuple):
    """A running engine and the lease on the memory that it maps; whoever has it ends both, in this order."""

    engine: Engine
    lease: HostLease
    spans: tuple[Span, ...]
    late_imports: tuple[str, ...]


class InstanceStarter:
    """Runs starts. Owns nothing that outlives one."""

    def __init__(
        self,
        tiers: Tiers,
        engines: Mapping[Backend, Engines],
        clock: Clock,
        *,
        chunk_bytes: int,
        map_in_place: bool,
        verify: bool,
        stop_timeout_s: float,
        limits: EngineLimits,
        max_instances: int,
    ) -> None:
        self._tiers = tiers
        self._engines = engines
        self._clock = clock
        self.chunk_bytes = chunk_bytes
        self._map_in_place = map_in_place
        self._verify = verify
        self._stop_timeout_s = stop_timeout_s
        self._limits = limits
        self._max_instances = max_instances

    async def start(self, model: Model, wanted: Checkpoint | Card, on_progress: OnProgress | None = None) -> Started:
        """Bring the model up. On any failure the engine has left and the lease is given back.

        `on_progress` is told what has arrived in host memory, also whenever it is for others whose turn is first.

        Raises:
            SllmError: whatever went wrong, by its type.
        """
        begin_s = self._clock.monotonic_s()
        checkpoint = wanted.checkpoint if isinstance(wanted, Card) else wanted
        prepare = prepare_of(model, checkpoint)
        seat = EngineInTime(self._engines[model.backend], prepare, self._clock, self.chunk_bytes)
        lease: HostLease | None = None
        try:
            from_afar = self._tiers.comes_from_afar(wanted)
            if not from_afar:
                await seat.take()
                begin_s = seat.taken.end_s
            lease = await self.lease(
                wanted,
                self._telling(seat, on_progress) if from_afar else on_progress,
                partial(self._placed, seat, checkpoint.size_bytes) if from_afar else seat.placed,
            )
            loaded = self._load_spans(lease.report, begin_s)
            engine = await seat.give()
            ready = await engine.attach(self._engine_limits(model.backend))
        except BaseException:
            try:
                await seat.give_up(self._stop_timeout_s)
            finally:
                if lease is not None:
                    lease.release()
            raise
        return Started(engine, lease, (seat.taken, *loaded, *ready.spans), ready.late_imports)

    async def fetch(self, wanted: Checkpoint | Card, on_progress: OnProgress) -> tuple[Span, ...]:
        """Bring a model's bytes to host memory, and hold them no longer; give the spans of that.

        Raises:
            SllmError: as `lease` does.
        """
        begin_s = self._clock.monotonic_s()
        lease = await self.lease(wanted, on_progress)
        lease.release()
        return self._load_spans(lease.report, begin_s)

    def _telling(self, seat: EngineInTime, on_progress: OnProgress | None) -> OnProgress:
        def tell(arrived_bytes: int, total_bytes: int) -> None:
            seat.arrived(arrived_bytes, total_bytes, self._remote_bytes_per_s())
            if on_progress is not None:
                on_progress(arrived_bytes, total_bytes)

        return tell

    def _placed(self, seat: EngineInTime, size_bytes: int, files: tuple[HostFile, ...]) -> None:
        seat.placed(files)
        seat.arrived(0, size_bytes, self._remote_bytes_per_s())

    def _remote_bytes_per_s(self) -> float:
        return self._tiers.remote_path().bytes_per_s or FIRST_REMOTE_BYTES_PER_S

    async def lease(
        self, wanted: Checkpoint | Card, on_progress: OnProgress | None = None, on_placed: OnPlaced | None = None
    ) -> HostLease:
        """Have a model's or an adapter's bytes where engines map them.

        Raises:
            SllmError: as `Tiers.lease` does.
        """
        checkpoint = wanted.checkpoint if isinstance(wanted, Card) else wanted
        return await self._tiers.lease(
            wanted,
            verify=self._verify,
            # Others may be written to where they lie; what `convert` or the SSD tier wrote is only ever replaced.
            in_place=self._map_in_place and (checkpoint.manifest is not None or checkpoint.identity != ""),
            on_progress=on_progress,
            on_placed=on_placed,
        )

    def _engine_limits(self, backend: Backend) -> EngineLimits:
        """Where no bytes are set for keys and values: what half the free memory is for each of all instances.

        vLLM's are on a device, whose memory it looks at itself.
        """
        if backend is Backend.VLLM or self._limits.kv_cache_bytes:
            return self._limits
        return msgspec.structs.replace(self._limits, kv_cache_bytes=available_bytes() // (2 * self._max_instances))

    def _load_spans(self, report: LoadReport, begin_s: float) -> tuple[Span, ...]:
        """One span for each tier that bytes came from; they share the time of the load."""
        end_s = self._clock.monotonic_s()
        tiers = {
            "host memory": report.pool_bytes,
            "page cache": report.page_cache_bytes,
            "page cache in place": report.in_place_bytes,
            "ssd": report.ssd_bytes,
            "source": report.remote_bytes,
        }
        return tuple(
            Span(name="load", begin_s=begin_s, end_s=end_s, size_bytes=size_bytes, tier=tier)
            for tier, size_bytes in tiers.items()
            if size_bytes
        )
