"""The LoRA adapters that one instance has: loaded when a request needs one, and kept until others need the room."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager

from sllm_actor.actors.engine_in_time import pooled
from sllm_actor.domain import Model, ModelName, Span
from sllm_actor.engine.client import Engine
from sllm_actor.errors import Draining, EngineError, NoCapacity, SllmError
from sllm_actor.loader.lease import HostLease, LoadReport
from sllm_actor.runtime import Clock
from sllm_actor.runtime.tasks import TaskScope

Lease = Callable[[Model], Awaitable[HostLease]]
"""Has an adapter's bytes in host memory."""


class _Kept:
    """An adapter that is in the engine, or on its way there."""

    def __init__(self, model: Model, loading: asyncio.Task[tuple[Span, ...]]) -> None:
        self.model = model
        self.loading = loading
        self.uses = 0
        self.lease: HostLease | None = None
        self.leaving = False
        self.gone = asyncio.Event()

    @property
    def is_idle(self) -> bool:
        return not self.uses and not self.leaving and self.loading.done()


class InstanceAdapters:
    """Owns an engine's adapters and their leases, at most `limit` of them: those not in use make room, longest unused
    first. Where all are in use, a request waits. Belongs to one event loop.
    """

    def __init__(self, engine: Engine, lease: Lease, clock: Clock, who: str, *, chunk_bytes: int, limit: int) -> None:
        self._engine = engine
        self._lease = lease
        self._clock = clock
        self._who = who
        self._chunk_bytes = chunk_bytes
        self._limit = limit
        self._scope = TaskScope(f"adapters-{who}")
        # By fingerprint, the longest unused first.
        self._kept: dict[str, _Kept] = {}
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def fingerprints(self) -> Collection[str]:
        return self._kept.keys()

    def host_bytes(self, pinned: Collection[str]) -> int:
        """Count the host memory that they hold beside what is pinned."""
        if not self._kept:
            return 0
        return sum(kept.model.host_bytes for key, kept in self._kept.items() if key not in pinned)

    @asynccontextmanager
    async def hold(self, model: Model) -> AsyncIterator[tuple[Span, ...]]:
        """Have an adapter in the engine for the length of the block; give what its load took, where this waited for it.

        Requests name it by its fingerprint. Closing the block early ends no load that has begun.

        Raises:
            SllmError: it can't be loaded; the others are as they were.
        """
        kept = await self._take(model)
        waits = not kept.loading.done()
        try:
            await asyncio.wait([kept.loading])
            if kept.loading.cancelled():
                raise Draining(f"{self._who} is being stopped", retry_after_s=1.0)
            spans = kept.loading.result()
            yield spans if waits else ()
        finally:
            kept.uses -= 1
            if kept.leaving and not kept.uses and self._kept.get(model.fingerprint) is kept:
                self._drop_later(kept)
            self._tell()

    async def _take(self, model: Model) -> _Kept:
        key = model.fingerprint
        while not self._closed:
            kept = self._kept.get(key)
            if kept is not None and not kept.leaving:
                self._kept[key] = self._kept.pop(key)
                kept.uses += 1
                return kept
            if kept is None and len(self._kept) < self._limit:
                kept = _Kept(model, self._scope.spawn(self._load(model), f"load-{key}", on_failure=lambda _: None))
                self._kept[key] = kept
                kept.uses += 1
                return kept
            if kept is None:
                self._make_room()
            changed = self._changed
            await changed.wait()
        raise Draining(f"{self._who} is being stopped", retry_after_s=1.0)

    def _tell(self) -> None:
        """Let those who wait look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _make_room(self) -> None:
        """Begin to drop the longest unused one, unless one is leaving already."""
        if any(kept.leaving and not kept.uses for kept in self._kept.values()):
            return
        for kept in self._kept.values():
            if kept.is_idle:
                self._drop_later(kept)
                return

    def _drop_later(self, kept: _Kept) -> None:
        kept.leaving = True
        self._scope.spawn(self._drop(kept), f"drop-{kept.model.fingerprint}")

    async def _load(self, model: Model) -> tuple[Span, ...]:
        begin_s, key = self._clock.monotonic_s(), model.fingerprint
        try:
            lease = await self._room_and_lease(model)
            lease.is_of(self._who)
            # Whoever ends this meanwhile has the engine leave first, and then gives it back.
            self._kept[key].lease = lease
            await self._engine.load_adapter(key, model.path, self._chunk_bytes, [pooled(file) for file in lease.files])
        except SllmError:
            kept = self._kept.pop(key)
            if kept.lease is not None:
                kept.lease.release()
            kept.gone.set()
            self._tell()
            raise
        self._tell()
        tier = _tier(lease.report)
        return (
            Span(
                name="adapter", begin_s=begin_s, end_s=self._clock.monotonic_s(), size_bytes=model.size_bytes, tier=tier
            ),
        )

    async def _room_and_lease(self, model: Model) -> HostLease:
        """Lease its bytes; where host memory has no room, adapters that nobody uses make some."""
        try:
            return await self._lease(model)
        except NoCapacity:
            idle = [kept for kept in self._kept.values() if kept.is_idle]
            if not idle:
                raise
            for kept in idle:
                kept.leaving = True
            for kept in idle:
                await self._drop(kept)
            return await self._lease(model)

    async def _drop(self, kept: _Kept) -> None:
        # An engine that can't be told has left, or is about to; the lease is given back once it has.
        with contextlib.suppress(EngineError):
            await self._engine.drop_adapter(kept.model.fingerprint)
            if kept.lease is not None:
                kept.lease.release()
            del self._kept[kept.model.fingerprint]
        kept.gone.set()
        self._tell()

    async def forget(self, name: ModelName, timeout_s: float, *, only_idle: bool = False) -> None:
        """Drop an adapter once nobody uses it, and wait for that, `timeout_s` at most."""
        leaving = [
            kept for kept in self._kept.values() if kept.model.name == name and not (only_idle and not kept.is_idle)
        ]
        for kept in leaving:
            if kept.is_idle:
                self._drop_later(kept)
            kept.leaving = True
        try:
            async with asyncio.timeout(timeout_s):
                for kept in leaving:
                    await kept.gone.wait()
        except TimeoutError:
            return

    async def close(self) -> None:
        """Give all memory back. The engine has left."""
        self._closed = True
        await self._scope.close()
        for kept in self._kept.values():
            if kept.lease is not None:
                kept.lease.release()
            kept.gone.set()
        self._kept.clear()
        self._tell()


def _tier(report: LoadReport) -> str:
    """Name the lowest tier that bytes came from."""
    came = {
        "source": report.remote_bytes,
        "ssd": report.ssd_bytes,
        "page cache": report.page_cache_bytes,
        "page cache in place": report.in_place_bytes,
    }
    return next((tier for tier, size_bytes in came.items() if size_bytes), "host memory")
