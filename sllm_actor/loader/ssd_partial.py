"""One model on its way to the SSD: chunks come in any order, are digested, written, noted, and are a model at once.

It is handed bytes and knows no source. What is done outlives a pause, the process and, digests being compared again,
a power cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import mmap
from collections.abc import Awaitable, Callable, Iterator, Mapping
from enum import Enum, auto
from pathlib import Path
from typing import Protocol

from sllm_actor.checkpoint.digests import DIGEST_BYTES, ChunkDigests, chunk_count
from sllm_actor.checkpoint.manifest import Manifest
from sllm_actor.errors import AlreadyThere, CheckpointCorrupt, CheckpointTruncated, TargetBusy
from sllm_actor.loader import ssd_files, ssd_layout
from sllm_actor.loader.chunk_place import ChunkPlace
from sllm_actor.loader.ssd_journal import Journal
from sllm_actor.loader.ssd_quota import SsdEntry
from sllm_actor.loader.ssd_record import Plan, PlannedFile, Record, make_record
from sllm_actor.loader.ssd_work import DiskWork

_BLOCK_BYTES = 4 * 2**20
# Awaited with a number of bytes before they are written, so that the disk can be left to more urgent work.
Gate = Callable[[int], Awaitable[None]]


class Home(Protocol):
    """The tier that a partial belongs to."""

    async def settle(self, partial: SsdPartial, record: Record) -> SsdEntry:
        """Make a model of a complete partial."""

    async def put_aside(self, partial: SsdPartial) -> None:
        """Keep what a partial has for a later one of its key."""

    async def give_up(self, partial: SsdPartial) -> None:
        """Remove a partial."""


class _State(Enum):
    OPEN = auto()
    ENDING = auto()
    ENDED = auto()


class SsdPartial:
    """A model that is being written. Belongs to one event loop; chunks may be written concurrently."""

    def __init__(
        self, home: Home, work: DiskWork, gate: Gate | None, folder: Path, plan: Plan, manifest: Manifest | None,
        expected: Mapping[ChunkPlace, bytes], journal: Journal, done: dict[ChunkPlace, bytes],
    ) -> None:  # fmt: skip
        self.folder = folder
        self.plan = plan
        self._home = home
        self._work = work
        self._gate = gate
        self._manifest = manifest
        self._expected = expected
        self._journal = journal
        self._done = done
        self._done_bytes = sum(plan.length(place) for place in done)
        self._writing: set[ChunkPlace] = set()
        # Files that have the SHA-256 that their source tells.
        self._compared: set[int] = set()
        self._under_way: set[asyncio.Task[None]] = set()
        self._state = _State.OPEN

    @property
    def key(self) -> str:
        """What it was begun with."""
        return self.plan.key

    @property
    def files(self) -> tuple[PlannedFile, ...]:
        """The weight files, in the order of their indices."""
        return self.plan.files

    @property
    def size_bytes(self) -> int:
        """What the model takes of the quota, small files included."""
        return self.plan.size_bytes

    @property
    def done_bytes(self) -> int:
        """How many bytes of the weight files are on the disk."""
        return self._done_bytes

    def missing(self) -> Iterator[ChunkPlace]:
        """Give the chunks that are still to be written, as (file index, chunk index), in order."""
        for number, file in enumerate(self.plan.files):
            for chunk in range(chunk_count(file.size_bytes, self.plan.chunk_bytes)):
                place = ChunkPlace(number, chunk)
                if place not in self._done:
                    yield place

    async def write(self, file_index: int, chunk_index: int, data: memoryview) -> None:
        """Write one chunk and note it; `data` is not looked at any more when this ends, however it ends.

        Where there is a manifest whose chunks are not larger than ours, the bytes are compared with it first.

        Raises:
            AlreadyThere: it is written already, or being written.
            CheckpointCorrupt: the bytes are not the manifest's; the message names file, chunk and both digests.
            WriteFailed: the disk refused; the chunk is still missing, and may be written again.
            TargetBusy, Draining: the partial has ended, or the tier is closing.
        """
        place = self._place(file_index, chunk_index, data)
        if place in self._done or place in self._writing:
            raise AlreadyThere(f"chunk {chunk_index} of {self.plan.files[file_index].name} is there, or on its way")
        self._writing.add(place)
        try:
            if self._gate is not None:
                await self._gate(len(data))
            self._check_open()
            await self._work.whole(self._write(place, data.cast("B")), "write")
        finally:
            self._writing.discard(place)

    async def _write(self, place: ChunkPlace, data: memoryview) -> None:
        with self._counted():
            self._done[place] = await self._work.aside(self._write_and_note, place, data)
            self._done_bytes += len(data)

    def _write_and_note(self, place: ChunkPlace, data: memoryview) -> bytes:
        path, offset = self._path(place), place.chunk * self.plan.chunk_bytes
        digests = self.plan.digests(data)
        self._compare(place, digests, self._expected.get(place))
        ssd_files.write_at(path, data, offset)
        self._journal.append(place, digests)
        return digests

    async def read(self, file_index: int, chunk_index: int, into: memoryview) -> None:
        """Fill `into` with a chunk that is done; `into` is not touched any more when this ends.

        Raises:
            CheckpointTruncated: it is not done.
            CheckpointCorrupt: the disk gave other bytes than were written; the chunk is missing again.
            ReadFailed: the disk fails.
            TargetBusy, Draining: the partial has ended, or the tier is closing.
        """
        place = self._place(file_index, chunk_index, into)
        self._check_open()
        if place not in self._done:
            raise CheckpointTruncated(f"chunk {chunk_index} of {self.plan.files[file_index].name} is not there yet")
        await self._work.whole(self._read(place, into.cast("B")), "read")

    async def _read(self, place: ChunkPlace, into: memoryview) -> None:
        with self._counted():
            written = self._done[place]
            found = await self._work.aside(self._read_and_digest, place, into)
            if found != written[: len(found)]:
                await self._discard(place)
            self._compare(place, found, written)

    def _read_and_digest(self, place: ChunkPlace, into: memoryview) -> bytes:
        ssd_files.read_at(self._path(place), into, place.chunk * self.plan.chunk_bytes)
        return self.plan.digests(into)

    async def discard(self, file_index: int, chunk_index: int) -> None:
        """Make a chunk missing again, because its bytes have turned out to be wrong.

        Raises:
            WriteFailed: the disk refused.
            TargetBusy, Draining: the partial has ended, or the tier is closing.
        """
        self._check_open()
        await self._work.whole(self._discard(ChunkPlace(file_index, chunk_index)), "discard")

    async def _discard(self, place: ChunkPlace) -> None:
        if self._done.pop(place, None) is not None:
            self._compared.discard(place.file)
            self._done_bytes -= self.plan.length(place)
            await self._work.aside(self._journal.discard, place)

    async def publish(self, model_id: str | None = None) -> SsdEntry:
        """Make it a model: all of it on the disk, then visible in one step. Return it, or the one that was there.

        Without `model_id` the id is the manifest's, or computed. Wrong chunks are missing again afterwards.

        Raises:
            CheckpointTruncated: chunks are missing.
            CheckpointCorrupt: a chunk is not the manifest's, or the model is not `model_id`.
            CheckpointInvalid: the files are no checkpoint.
            WriteFailed: the disk refused; where it refused to sync weights, the partial is given up.
            TargetBusy, Draining: the partial has ended, or the tier is closing.
        """
        return await self._work.whole(self._publish(model_id), "publish")

    async def _publish(self, model_id: str | None) -> SsdEntry:
        self._check_open()
        self._state = _State.ENDING
        try:
            return await self._check_and_settle(model_id)
        finally:
            if self._state is _State.ENDING:
                self._state = _State.OPEN

    async def identify(self) -> str:
        """Tell which id a complete partial will have as a model.

        Raises:
            CheckpointTruncated, CheckpointCorrupt: as `publish` does.
            TargetBusy, Draining: the partial has ended, or the tier is closing.
        """
        self._check_open()
        return (await self._work.whole(self._record(), "identify")).model_id

    async def _check_and_settle(self, model_id: str | None) -> SsdEntry:
        record = await self._record()
        if model_id is not None and model_id != record.model_id:
            raise CheckpointCorrupt(f"{self.key} is the model {record.model_id} and should be {model_id[:80]}")
        return await self._home.settle(self, record)

    async def _record(self) -> Record:
        await self._quiet()
        missing_bytes = sum(file.size_bytes for file in self.plan.files) - self._done_bytes
        if missing_bytes:
            raise CheckpointTruncated(f"{missing_bytes} bytes of {self.key} are missing")
        if self._manifest is None:
            await self._compare_whole_files()
        elif self._manifest.chunk_bytes > self.plan.digest_bytes:
            await self._compare_larger_chunks(self._manifest)
        return await self._work.aside(make_record, self.plan, self._manifest, self._done)

    async def _compare_whole_files(self) -> None:
        """Read again, in order, what has no digests but the one that the source tells of the whole; once."""
        wrong = []
        for number, file in enumerate(self.plan.files):
            if not file.sha256 or number in self._compared:
                continue
            whole, path = hashlib.sha256(), self.folder / ssd_layout.MODEL_FOLDER / file.name
            for at in range(0, file.size_bytes, _BLOCK_BYTES):
                length = min(_BLOCK_BYTES, file.size_bytes - at)
                if self._gate is not None:  # It takes as much of the disk as writing it did.
                    await self._gate(length)
                await self._work.aside(_hash, whole, path, at, length)
            self._compared.add(number)
            if whole.hexdigest() != file.sha256:
                wrong.append(f"{file.name} has SHA-256 {whole.hexdigest()} and should have {file.sha256}")
                for chunk in range(chunk_count(file.size_bytes, self.plan.chunk_bytes)):
                    await self._discard(ChunkPlace(number, chunk))
        if wrong:
            raise CheckpointCorrupt(f"{self.key}: {'; '.join(wrong[:8])}")

    async def _compare_larger_chunks(self, manifest: Manifest) -> None:
        """Read again what is digested in larger chunks by the manifest than by the partial."""
        ratio = manifest.chunk_bytes // self.plan.chunk_bytes
        wrong = []
        for listed in manifest.files:
            number = next(k for k, file in enumerate(self.plan.files) if file.name == listed.name)
            path = self.folder / ssd_layout.MODEL_FOLDER / listed.name
            found = await self._work.aside(_digests_of, path, listed.size_bytes, manifest.chunk_bytes)
            for chunk, (has, should) in enumerate(zip(found, listed.digests, strict=True)):
                if has.hex() == should:
                    continue
                wrong.append(f"{listed.name} chunk {chunk} has digest {has.hex()} and should have {should}")
                for ours in range(chunk * ratio, (chunk + 1) * ratio):
                    await self._discard(ChunkPlace(number, ours))
        if wrong:
            raise CheckpointCorrupt(f"{self.key}: {'; '.join(wrong[:8])}")

    async def pause(self) -> None:
        """Keep what is done for a later `begin` of the same key; what is being written is finished. Twice is once."""
        await self._end(self._home.put_aside)

    async def drop(self) -> None:
        """Give it up: its room is free afterwards. Twice is once.

        Raises:
            WriteFailed: the disk refused; it is then as if paused.
        """
        await self._end(self._home.give_up)

    async def close(self) -> None:
        """Pause, as the tier does when it closes and takes no more work."""
        if self._state is not _State.ENDED:
            await self._end_now(self._home.put_aside)

    async def _end(self, how: Callable[[SsdPartial], Awaitable[None]]) -> None:
        if self._state is not _State.ENDED:
            await self._work.whole(self._end_now(how), "end")

    async def _end_now(self, how: Callable[[SsdPartial], Awaitable[None]]) -> None:
        self._check_open()
        self._state = _State.ENDING
        try:
            await self._quiet()
            await how(self)
        finally:
            self.ended()

    def ended(self) -> None:
        """Be told that the partial is no more, or that of another begin."""
        self._state = _State.ENDED

    async def _quiet(self) -> None:
        while self._under_way:
            await asyncio.wait(self._under_way)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        # What had to wait for its turn may find that the partial has ended meanwhile.
        self._check_open()
        task = asyncio.current_task()
        assert task is not None
        self._under_way.add(task)
        try:
            yield
        finally:
            self._under_way.discard(task)

    def _check_open(self) -> None:
        if self._state is not _State.OPEN:
            raise TargetBusy(f"{self.key} is no longer being written here")

    def _place(self, file_index: int, chunk_index: int, data: memoryview) -> ChunkPlace:
        place = ChunkPlace(file_index, chunk_index)
        assert 0 < self.plan.length(place) == data.nbytes, "a chunk is handed over whole, and there is one"
        return place

    def _path(self, place: ChunkPlace) -> Path:
        return self.folder / ssd_layout.MODEL_FOLDER / self.plan.files[place.file].name

    def _compare(self, place: ChunkPlace, found: bytes, expected: bytes | None) -> None:
        if expected is None or expected[: len(found)] == found:
            return
        for at in range(0, len(found), DIGEST_BYTES):
            has, should = found[at : at + DIGEST_BYTES], expected[at : at + DIGEST_BYTES]
            if has != should:
                number = place.chunk * self.plan.pieces + at // DIGEST_BYTES
                raise CheckpointCorrupt(
                    f"{self.key}: {self.plan.files[place.file].name} chunk {number} (from byte "
                    f"{number * self.plan.digest_bytes}) has digest {has.hex()} and should have {should.hex()}"
                )


async def take_up(
    work: DiskWork,
    path: Path,
    plan: Plan,
    smalls: Mapping[str, bytes],
    expected: Mapping[ChunkPlace, bytes],
    go_on: bool,
) -> tuple[Journal, dict[ChunkPlace, bytes]]:
    """Make the folder of a partial; or go on with what is there, its chunks compared with their digests.

    Raises:
        WriteFailed, ReadFailed: the disk refused.
    """
    if not go_on:
        return await work.aside(ssd_layout.make_partial, path, plan, smalls), {}
    journal, noted = await work.aside(ssd_layout.reopen_partial, path, plan, smalls)
    items = sorted(noted.items())
    step = -(-len(items) // work.threads) or 1
    shares = [items[at : at + step] for at in range(0, len(items), step)]
    found = await asyncio.gather(*(work.aside(ssd_layout.verified, path, plan, share, expected) for share in shares))
    done = {place: digests for share in found for place, digests in share.items()}
    await work.aside(journal.begin, done, plan.chunks)
    return journal, done


def expected_digests(plan: Plan, manifest: Manifest | None) -> dict[ChunkPlace, bytes]:
    """Return the digests that a manifest has for each chunk; none where its own chunks are larger than ours."""
    if manifest is None or manifest.chunk_bytes != plan.digest_bytes:
        return {}
    listed = {file.name: file.digests for file in manifest.files}
    expected = {}
    for number, file in enumerate(plan.files):
        digests = listed[file.name]
        for chunk in range(chunk_count(file.size_bytes, plan.chunk_bytes)):
            pieces = digests[chunk * plan.pieces : (chunk + 1) * plan.pieces]
            expected[ChunkPlace(number, chunk)] = bytes.fromhex("".join(pieces))
    return expected


def _hash(whole: hashlib._Hash, path: Path, at: int, length: int) -> None:
    with mmap.mmap(-1, length) as mapped, memoryview(mapped) as block:  # On a page, as direct reads need it.
        ssd_files.read_at(path, block, at)
        whole.update(block)


def _digests_of(path: Path, size_bytes: int, chunk_bytes: int) -> tuple[bytes, ...]:
    digests = ChunkDigests(chunk_bytes)
    block = memoryview(bytearray(min(_BLOCK_BYTES, size_bytes)))
    for at in range(0, size_bytes, _BLOCK_BYTES):
        part = block[: min(_BLOCK_BYTES, size_bytes - at)]
        ssd_files.read_at(path, part, at)
        digests.update(part)
    return digests.finish()
