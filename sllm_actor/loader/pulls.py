"""Checkpoints on their way to the SSD alone: one download for all who asked for the same.

A load of the same checkpoint takes over; who waits for the pull then waits for the load's copy.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from sllm_actor.errors import CheckpointCorrupt, CheckpointInvalid, Draining, WriteFailed
from sllm_actor.loader.cards import Card
from sllm_actor.loader.load_queue import LoadQueue
from sllm_actor.loader.loads import OnProgress
from sllm_actor.loader.pull import Pull
from sllm_actor.loader.remote_loads import RemoteLoads, is_cancelled
from sllm_actor.runtime.tasks import TaskScope

# At once, where there is memory for them; and chunks that each has under way.
MAX_PULLS, MAX_READS = 2, 4


class _Pulling:
    """A pull under way, and those who wait for it."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self.waiters: dict[object, OnProgress | None] = {}
        self.task: asyncio.Task[None]

    def arrived(self, size_bytes: int) -> None:
        self.done_bytes += size_bytes
        self.tell()

    def tell(self) -> None:
        for tell in list(self.waiters.values()):
            if tell is not None:
                tell(self.done_bytes, self.total_bytes)


class Pulls:
    """Runs pulls. Belongs to one event loop."""

    def __init__(self, loads: RemoteLoads, memory_bytes: int, bytes_per_s: Callable[[], float]) -> None:
        """Have as many pulls at once, and chunks of each, as `memory_bytes` holds: at least one, through one chunk."""
        chunks = max(1, memory_bytes // loads.chunk_bytes)
        at_once = min(MAX_PULLS, chunks)
        self._reads = min(MAX_READS, chunks // at_once)
        self._queue = LoadQueue(at_once, lambda _: bytes_per_s())
        self._loads = loads
        self._scope = TaskScope("pulls")
        self._running: dict[str, _Pulling] = {}
        self._closed = False

    async def give_way(self, identity: str) -> None:
        """End a pull, because a load goes on with what it has stored."""
        pulling = self._running.get(identity)
        if pulling is not None:
            pulling.task.cancel()
            await asyncio.wait([pulling.task])

    async def pull(self, card: Card, on_progress: OnProgress | None) -> None:
        """Bring the checkpoint of `card` to the SSD and return when it is there, whole and checked.

        Raises:
            SourceError, SourceInvalid, CheckpointCorrupt: no source gives it.
            ModelTooLarge, NoCapacity, WriteFailed: the SSD does not take it.
            Draining: the node is closing.
        """
        while not self._loads.is_stored(card):
            if self._closed:
                raise Draining("the node is closing")
            if not await self._loaded(card, on_progress):
                await self._join(card, on_progress)

    async def _loaded(self, card: Card, on_progress: OnProgress | None) -> bool:
        """Wait for a load that is on its way and stores what it gets; false where there is none."""
        load, copy = self._loads.under_way(card, on_progress)
        if load is None and copy is None:
            return False
        await asyncio.wait([task for task in (load, copy) if task is not None])
        failed = load is not None and (load.cancelled() or load.exception() is not None)
        if not failed and not self._loads.is_stored(card) and self._loads.under_way(card, None) == (None, None):
            raise WriteFailed(f"{card.url} was loaded, and could not be stored; the node's log says why")
        return True

    async def _join(self, card: Card, on_progress: OnProgress | None) -> None:
        identity, me = card.checkpoint.identity, object()
        pulling = self._running.get(identity)
        if pulling is None:
            pulling = self._running[identity] = _Pulling(card.checkpoint.size_bytes)
            pulling.task = self._scope.spawn(self._run(card, pulling), "pull", on_failure=lambda _: None)
            pulling.task.add_done_callback(lambda _: self._running.pop(identity, None))
        pulling.waiters[me] = on_progress
        try:
            await asyncio.shield(pulling.task)
        except asyncio.CancelledError:
            # One that was cancelled itself has given way to a load, or the node is closing.
            if is_cancelled():
                raise
        finally:
            del pulling.waiters[me]
            if not pulling.waiters and not pulling.task.done():
                pulling.task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([pulling.task])

    async def _run(self, card: Card, pulling: _Pulling) -> None:
        async with self._queue.turn(card.checkpoint.size_bytes) as turn:
            if self._loads.is_stored(card):
                return
            partial = await self._loads.begin(card)
            pulling.done_bytes = turn.arrived_bytes = partial.done_bytes
            pulling.tell()

            def arrived(size_bytes: int) -> None:
                turn.arrive(turn.arrived_bytes + size_bytes)
                pulling.arrived(size_bytes)

            try:
                async with self._loads.suppliers(card) as suppliers:
                    with self._loads.meter.running():
                        await Pull(
                            card.checkpoint, suppliers, partial, self._loads.chunk_bytes, self._reads, arrived
                        ).run()
                self._loads.meter.add(pulling.done_bytes)
                await self._loads.publish(card, partial)
            except BaseException as wrong:
                # Wrong chunks have been let go; a folder that is no checkpoint would never become one.
                useless = isinstance(wrong, CheckpointInvalid) and not isinstance(wrong, CheckpointCorrupt)
                await (partial.drop() if useless else partial.pause())
                raise

    async def close(self) -> None:
        """End every pull; what the SSD has of them can be gone on with."""
        self._closed = True
        await self._scope.close()
