"""Checkpoints on the node's own disk, within a quota: which are there, which may go, which are on their way.

Content-addressed: the same bytes under two names are stored once. A model is visible only whole; what a killed process
leaves is whole, or can be resumed, or is reclaimed by the next `open`. Does no network I/O: it is handed chunks.
docs/ssd_tier.md has the layout on disk and why a kill at any moment is harmless.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from sllm_actor.checkpoint.manifest import Manifest
from sllm_actor.errors import Conflict, Draining, ModelNotFound, TargetBusy, WriteFailed
from sllm_actor.loader import ssd_files, ssd_layout
from sllm_actor.loader.holder import LOAD, Holder
from sllm_actor.loader.ssd_layout import MODELS, PARTIAL, TRASH, Trash
from sllm_actor.loader.ssd_partial import Gate, SsdPartial, expected_digests, take_up
from sllm_actor.loader.ssd_quota import Held, HeldModel, HeldPartial, Quota, SsdEntry, SsdLease
from sllm_actor.loader.ssd_record import Plan, PlannedFile, Record, check_model_id, folder_name, make_plan
from sllm_actor.loader.ssd_uses import LastUses
from sllm_actor.loader.ssd_work import DiskWork
from sllm_actor.runtime.clock import Clock
from sllm_actor.runtime.threads import to_the_end
from sllm_actor.sources.source import SourceFile
from sllm_actor.units import format_bytes

log = logging.getLogger(__name__)

WRITING_THREADS = 4


class SsdTier:
    """The models in one folder. Belongs to the event loop that opened it; one process holds a folder at a time."""

    def __init__(self, folder: Path, quota: Quota, clock: Clock, gate: Gate | None, work: DiskWork, lock: int) -> None:
        self.folder = folder
        self._quota = quota
        self._gate, self._clock = gate, clock
        self._work = work
        self._lock = lock
        self._trash = Trash(folder / TRASH)
        # Held while names of models change on the disk, in the order in which the books had them change.
        self._names = asyncio.Lock()
        self._leaving: set[Path] = set()
        self._open: dict[str, SsdPartial] = {}
        self._beginning: set[str] = set()
        self._deleting: set[asyncio.Task[None]] = set()
        self._uses = LastUses(quota, clock, work)
        self._closing: asyncio.Task[None] | None = None
        self.given_up = quota.given_up  # When this was opened.

    @classmethod
    async def open(
        cls,
        folder: Path,
        quota_bytes: int,
        clock: Clock,
        gate: Gate | None = None,
        writing_threads: int = WRITING_THREADS,
    ) -> SsdTier:
        """Take a folder, made where it is missing, and recover what is in it; evict what a smaller quota does not hold.

        `gate` is awaited with the number of bytes before each chunk is written.

        Raises:
            DataFolderInUse: another living process holds it.
            TargetInvalid: there is something in it that no SSD tier has made, or a symbolic link in a folder's place.
            WriteFailed: the disk refused.
        """
        work = DiskWork(writing_threads)
        opening = cls._open_with(folder.absolute(), quota_bytes, clock, gate, work)
        try:
            return await work.whole(opening, "open", undo=cls.close)
        except BaseException:
            await work.close()
            raise

    @classmethod
    async def _open_with(
        cls, folder: Path, quota_bytes: int, clock: Clock, gate: Gate | None, work: DiskWork
    ) -> SsdTier:
        owned = (MODELS, PARTIAL, TRASH)
        lock = await work.aside(ssd_files.lock_folder, folder, ssd_layout.LOCK_NAME, owned)
        try:
            trash, quota = Trash(folder / TRASH), Quota(quota_bytes)
            models, partials = await work.aside(ssd_layout.recover, folder, trash)
            for model in models:
                quota.add(model)
            for partial in partials:
                quota.add(partial)
            for held in quota.shrink():
                await work.aside(ssd_layout.delete, await work.aside(trash.take, held.path))
        except BaseException:
            os.close(lock)
            raise
        if quota.used_bytes > quota_bytes:
            log.warning(
                "%s: pinned models take %s, more than the quota of %s",
                folder, format_bytes(quota.used_bytes), format_bytes(quota_bytes),
            )  # fmt: skip
        return cls(folder, quota, clock, gate, work, lock)

    def whole(self) -> tuple[Collection[str], int]:
        """Give the ids of the whole models, and how often these have changed."""
        return self._quota.models, self._quota.revision

    @property
    def quota_bytes(self) -> int:
        """What the models may take together."""
        return self._quota.quota_bytes

    @property
    def used_bytes(self) -> int:
        """What whole and partial models take; more than the quota where it was made smaller and models are pinned."""
        return self._quota.used_bytes

    def entries(self) -> list[SsdEntry]:
        """List whole and partial models, the least recently used first."""
        for key, partial in self._open.items():
            self._quota.partials[key].done_bytes = partial.done_bytes
        return self._quota.entries()

    def holds(self, model_id: str) -> bool:
        """Tell whether a whole model of this id is here; none is of an empty one."""
        return model_id in self._quota.models

    def lease(self, model_id: str, who: str = LOAD) -> SsdLease | None:
        """Keep a whole model from being evicted, for `who`; None where there is none.

        Raises:
            InvalidName: that is no model id.
            Draining: the tier is closing.
        """
        held = self._quota.models.get(check_model_id(model_id))
        if self._closing is not None:
            raise Draining("the SSD tier is closing")
        if held is None:
            return None
        self._uses.touch(held)
        return SsdLease(held, Holder(who, self._clock.monotonic_s()))

    async def pin(self, model_id: str) -> None:
        """Keep a model until it is unpinned, over restarts.

        Raises:
            InvalidName, ModelNotFound: there is no such whole model.
            WriteFailed: the disk refused.
            Draining: the tier is closing.
        """
        await self._work.whole(self._mark(check_model_id(model_id), pinned=True), "pin")

    async def unpin(self, model_id: str) -> None:
        """Let a model be evicted again; raises what `pin` does."""
        await self._work.whole(self._mark(check_model_id(model_id), pinned=False), "unpin")

    async def _mark(self, model_id: str, pinned: bool) -> None:
        async with self._names:
            held = self._model(model_id)
            before = held.pinned
            # While the disk is asked, it is in nobody's way.
            held.pinned = True
            try:
                await self._work.aside(ssd_files.mark, held.path / ssd_layout.PIN_NAME, pinned)
            except WriteFailed:
                held.pinned = before
                raise
            held.pinned = pinned

    async def evict(self, model_id: str) -> None:
        """Remove a model; the disk gets its room back a little later.

        Raises:
            InvalidName, ModelNotFound: there is no such whole model.
            Conflict: it is leased or pinned.
            WriteFailed: the disk refused; it is still there.
            Draining: the tier is closing.
        """
        await self._work.whole(self._evict(check_model_id(model_id)), "evict")

    async def _evict(self, model_id: str) -> None:
        held = self._model(model_id)
        if not held.free:
            why = f"is leased {len(held.holders)} times" if held.holders else "is pinned"
            raise Conflict(f"{model_id} {why} and can't be evicted", param="model_id")
        self._quota.remove(held)
        await self._clear([held])

    async def forget(self, key: str) -> None:
        """Give up what a paused partial has; one that is being written is dropped by who writes it.

        Raises:
            ModelNotFound: there is no partial of this key.
            Conflict: it is being written.
            WriteFailed: the disk refused; it is still there.
            Draining: the tier is closing.
        """
        await self._work.whole(self._forget_paused(key), "forget")

    async def _forget_paused(self, key: str) -> None:
        held = self._quota.partials.get(key)
        if held is None:
            raise ModelNotFound(f"{key[:200]} is not on its way to the SSD tier", param="key")
        if not held.free:
            raise Conflict(f"{key[:200]} is being written", param="key")
        self._quota.remove(held)
        await self._clear([held])

    def _model(self, model_id: str) -> HeldModel:
        held = self._quota.models.get(model_id)
        if held is None:
            raise ModelNotFound(f"{model_id} is not in the SSD tier", param="model_id")
        return held

    async def begin(
        self,
        key: str,
        files: Sequence[SourceFile | PlannedFile],
        smalls: Mapping[str, bytes | Path],
        chunk_bytes: int,
    ) -> SsdPartial:
        """Make room for a model and begin to write it, or go on with what a former begin of `key` has left.

        It goes on where weight files and `chunk_bytes` are the same, and something tells versions apart: validators,
        which are the same too, or a manifest; chunks whose bytes on the disk differ from their digests are
        missing again. Otherwise what was left is given up. The small files are those of now. `key` is any text.

        Raises:
            ModelTooLarge: it is larger than the quota.
            NoCapacity: what is leased, pinned and being written leaves too little.
            TargetBusy: this key is being written already.
            WriteFailed: the disk is full or refuses; nothing is left behind.
            InvalidName, ConfigInvalid, CheckpointInvalid: an argument is impossible.
            Draining: the tier is closing.
        """
        work = self._begin(key, tuple(files), dict(smalls), chunk_bytes)
        return await self._work.whole(work, "begin", undo=SsdPartial.pause)

    async def _begin(
        self,
        key: str,
        files: tuple[SourceFile | PlannedFile, ...],
        smalls: Mapping[str, bytes | Path],
        chunk_bytes: int,
    ) -> SsdPartial:
        old = self._quota.partials.get(key)
        if key in self._beginning or (old is not None and old.busy):
            raise TargetBusy(f"{key[:200]} is being written already", param="key")
        self._beginning.add(key)
        if old is not None:
            old.busy = True
        try:
            read = await self._work.aside(ssd_layout.read_smalls, smalls)
            plan, manifest = await self._work.aside(make_plan, key, files, read, chunk_bytes)
            return await self._admit(old, plan, manifest, read)
        finally:
            self._beginning.discard(key)
            if old is not None:
                old.busy = False

    async def _admit(
        self, old: HeldPartial | None, plan: Plan, manifest: Manifest | None, smalls: Mapping[str, bytes]
    ) -> SsdPartial:
        path = self.folder / PARTIAL / folder_name(plan.key)
        resumes = old is not None and await self._resumes(old, plan, manifest)
        new = HeldPartial(plan.key, path, plan.size_bytes, self._uses.now_s(), 0)
        new.busy, new.busy_since_s = True, self._clock.monotonic_s()
        victims = self._quota.exchange(old, new)
        try:
            await self._clear(victims)
            # The disk may be no larger than the quota.
            await self.trash_emptied()
            expected = await self._work.aside(expected_digests, plan, manifest)
            journal, done = await take_up(self._work, path, plan, smalls, expected, resumes)
        except BaseException:
            self._quota.remove(new)
            left = await self._work.aside(ssd_layout.plan_of, path)
            if old is not None and left is not None:
                old.size_bytes = left.size_bytes
                self._quota.add(old)
            raise
        partial = SsdPartial(self, self._work, self._gate, path, plan, manifest, expected, journal, done)
        self._open[plan.key] = partial
        return partial

    async def _resumes(self, old: HeldPartial, plan: Plan, manifest: Manifest | None) -> bool:
        if manifest is None and not all(file.validator for file in plan.files):
            return False
        before = await self._work.aside(ssd_layout.plan_of, old.path)
        return before is not None and plan.continues(before, of_any_version=manifest is not None)

    async def settle(self, partial: SsdPartial, record: Record) -> SsdEntry:
        """Publish a complete partial (for the partial itself)."""
        path, finished = self.folder / MODELS / record.model_id, False
        while True:
            if not finished and record.model_id not in self._quota.models:
                await self._finish_files(partial, record)
                finished = True
            async with self._names:
                held = self._quota.models.get(record.model_id)
                # One that the books have let go, and the disk not yet, is waited for.
                if held is None and finished and path not in self._leaving:
                    await self._work.aside(ssd_files.move, partial.folder / ssd_layout.MODEL_FOLDER, path)
                    held = HeldModel(record.model_id, path, record.size_bytes, self._uses.now_s(), pinned=False)
                    self._quota.add(held)
                if held is not None:
                    self._quota.remove(self._quota.partials[partial.key])
                    break
        self._release(partial)
        self._uses.touch(held)
        try:
            self._delete(await self._work.aside(self._trash.take, partial.folder))
        except WriteFailed as wrong:
            log.warning("removed by the next start: %s", wrong)
        return held.describe()

    async def _finish_files(self, partial: SsdPartial, record: Record) -> None:
        try:
            await self._work.aside(ssd_layout.sync_weights, partial.folder, partial.plan)
        except WriteFailed:
            # What the disk has lost may still be in the page cache: digests would not tell.
            with contextlib.suppress(WriteFailed):
                await self.give_up(partial)
            raise
        await self._work.aside(ssd_layout.write_record, partial.folder, record, self._uses.now_s())

    async def put_aside(self, partial: SsdPartial) -> None:
        """Pause a partial (for the partial itself)."""
        held = self._quota.partials[partial.key]
        held.busy, held.done_bytes, held.last_used_s = False, partial.done_bytes, self._uses.now_s()
        self._release(partial)
        with contextlib.suppress(WriteFailed):
            await self._work.aside(ssd_files.stamp, partial.folder / ssd_layout.JOURNAL_NAME, held.last_used_s)

    async def give_up(self, partial: SsdPartial) -> None:
        """Drop a partial (for the partial itself)."""
        held = self._quota.partials[partial.key]
        held.done_bytes = partial.done_bytes
        try:
            gone = await self._work.aside(self._trash.take, partial.folder)
            self._quota.remove(held)
        finally:
            held.busy = False
            self._release(partial)
        await asyncio.wait([self._delete(gone)])

    def _release(self, partial: SsdPartial) -> None:
        partial.ended()
        del self._open[partial.key]

    async def _clear(self, victims: Sequence[Held]) -> None:
        """Move to the trash what the books no longer have."""
        self._leaving.update(held.path for held in victims)
        try:
            async with self._names:
                for at, held in enumerate(victims):
                    try:
                        gone = await self._work.aside(self._trash.take, held.path)
                    except WriteFailed:
                        for kept in victims[at:]:
                            self._quota.add(kept)
                        raise
                    log.info("evicted %s", held.path.name)
                    self._delete(gone)
        finally:
            self._leaving.difference_update(held.path for held in victims)

    def _delete(self, gone: Path) -> asyncio.Task[None]:
        task = self._work.spawn(self._work.aside(ssd_layout.delete, gone), f"delete-{gone.name}")
        self._deleting.add(task)
        task.add_done_callback(self._deleting.discard)
        return task

    async def trash_emptied(self) -> None:
        """Wait until what was evicted or dropped so far has been deleted."""
        if self._deleting:
            await asyncio.wait(set(self._deleting))

    async def close(self) -> None:
        """Pause what is being written, finish what is under way, and give the folder free. Twice is once."""
        if self._closing is None:
            self._work.refuse()
            self._closing = self._work.spawn(self._close(), "close")
        await to_the_end(self._closing)

    async def _close(self) -> None:
        try:
            await self._work.idle()
            for partial in list(self._open.values()):
                await partial.close()
            await self._work.close()
        finally:
            os.close(self._lock)
