"""What is kept of a checkpoint that is not, or not only, on this node: everything but its weights.

A card is a folder as `read_folder` takes it: configuration, tokenizer and manifest as they are, and for each weight
file a stand-in that has its header and its size, and a hole for the rest. A model is examined, and an engine built,
from its card alone; the weights come from the SSD tier or from a source. It is small, and stays while it is wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from operator import attrgetter
from pathlib import Path
from weakref import WeakValueDictionary

import msgspec

from sllm_actor.checkpoint.bounded import read_bounded
from sllm_actor.checkpoint.digests import digest
from sllm_actor.checkpoint.folder import MAX_CONFIG_BYTES, MAX_INDEX_BYTES, Checkpoint, read_folder
from sllm_actor.checkpoint.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, MAX_OTHER_FILES, parse_manifest
from sllm_actor.checkpoint.safetensors_header import LENGTH_BYTES, header_end
from sllm_actor.checkpoint.staging import staged
from sllm_actor.checkpoint.writer import write_in_new_folder
from sllm_actor.domain.sentence_modules import MAX_MODULES_BYTES, MODULES_NAME, is_pooling_name
from sllm_actor.errors import (
    CheckpointChanged,
    CheckpointCorrupt,
    CheckpointInvalid,
    SourceInvalid,
    TargetExists,
    WriteFailed,
)
from sllm_actor.loader.fetch import Read, read_and_settle
from sllm_actor.loader.suppliers import Supplier, Suppliers, list_files
from sllm_actor.runtime.clock import Clock
from sllm_actor.runtime.threads import on_thread
from sllm_actor.sources.source import Source, SourceFile
from sllm_actor.units import format_bytes

log = logging.getLogger(__name__)

RECORD_NAME = ".sllm-card.json"
_NEW_RECORD_NAME = f"{RECORD_NAME}.new"
# The SSD tier's own bound.
MAX_SMALL_BYTES = 256_000_000
_MAX_RECORD_BYTES = 16_000_000
_WEIGHTS = ".safetensors"
_FORMAT_VERSION = 1
_BOUNDS = {MODULES_NAME: MAX_MODULES_BYTES, "config.json": MAX_CONFIG_BYTES, MANIFEST_NAME: MAX_MANIFEST_BYTES}


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    """`model_id` is the id under which the SSD tier keeps the bytes; empty as long as it isn't known.

    `identity` is the same for equal bytes where that can be known beforehand, from their manifest.
    """

    format_version: int
    key: str
    identity: str
    url: str
    files: tuple[SourceFile, ...]
    model_id: str


class Card:
    """One checkpoint by its description."""

    def __init__(self, record: _Record, checkpoint: Checkpoint) -> None:
        self._record = record
        self.checkpoint = checkpoint

    @property
    def key(self) -> str:
        """What names it: the digest of where it comes from and of the files that were listed there."""
        return self._record.key

    @property
    def url(self) -> str:
        """Where it comes from."""
        return self._record.url

    @property
    def model_id(self) -> str:
        """Under which id the SSD tier keeps its bytes; empty as long as it isn't known."""
        return self._record.model_id

    @property
    def files(self) -> dict[str, SourceFile]:
        """All files as its source listed them, by name."""
        return {file.name: file for file in self._record.files}

    @property
    def weights(self) -> tuple[SourceFile, ...]:
        """The weight files as its source listed them, in the checkpoint's order."""
        files = self.files
        return tuple(files[file.name] for file in self.checkpoint.files)

    def small_paths(self) -> dict[str, Path]:
        """Where the files are that the card has whole, by name."""
        return {name: self.checkpoint.path / name for name in self.files if not name.endswith(_WEIGHTS)}

    async def is_whole(self) -> bool:
        """Tell whether all of it is still in its folder."""
        return await on_thread(_lacks, self.checkpoint.path, self._record) is None

    def on_ssd(self, folder: Path) -> Checkpoint:
        """Describe the same checkpoint with its weights in a folder of the SSD tier. Blocks for a moment.

        Raises:
            CheckpointChanged: a file is missing, or of another size.
        """
        files = []
        for file in self.checkpoint.files:
            try:
                found = (folder / file.name).stat()
            except OSError as wrong:
                raise CheckpointChanged(f"{folder / file.name} can't be looked at: {wrong.strerror}") from None
            if found.st_size != file.size_bytes:
                raise CheckpointChanged(f"{folder / file.name} has {found.st_size} bytes and had {file.size_bytes}")
            files.append(
                msgspec.structs.replace(file, mtime_ns=found.st_mtime_ns, inode=found.st_ino, disk=found.st_dev)
            )
        return msgspec.structs.replace(self.checkpoint, files=tuple(files), weights=folder)

    def _learn(self, model_id: str) -> None:
        record = msgspec.structs.replace(self._record, model_id=model_id)
        path = self.checkpoint.path / _NEW_RECORD_NAME
        _write_whole(path, msgspec.json.encode(record))
        os.replace(path, path.with_name(RECORD_NAME))
        self._record = record

    async def learn(self, model_id: str) -> None:
        """Note under which id the SSD tier keeps its bytes.

        Raises:
            WriteFailed: the disk refused it.
        """
        try:
            await on_thread(self._learn, model_id)
        except OSError as wrong:
            raise WriteFailed(f"{self.checkpoint.path} can't be written: {wrong.strerror}") from None


class Cards:
    """Owns a folder of cards."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # One object for each card that somebody has: what one learns, all know.
        self._known: WeakValueDictionary[str, Card] = WeakValueDictionary()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def _lock(self, key: str) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())

    async def make(self, source: Source, clock: Clock, chance: Callable[[], float]) -> Card:
        """Fetch everything but the weights, unless the very same is here already.

        Raises:
            SourceError, SourceInvalid, CheckpointCorrupt: the source does not give it, or gives what is no checkpoint.
            CheckpointInvalid: what it gives can't be served.
            WriteFailed: the disk refused it.
        """
        listed = await list_files(source, clock, chance)
        _check_listing(source.url, listed)
        key = card_key(source.url, listed)
        async with self._lock(key):
            with contextlib.suppress(CheckpointInvalid):
                return await self.open(key)
            suppliers = Suppliers([Supplier(source, {file.name: file for file in listed})], clock, chance)
            smalls, headers = await _fetch(source.url, suppliers, listed)
            # What was lost may still be known here: of a stock checkpoint nothing else tells the SSD's copy.
            lost = self._known.get(key)
            model_id = await on_thread(_model_id, smalls, source.url) or (lost.model_id if lost else "")
            identity = model_id if MANIFEST_NAME in smalls else key
            record = _Record(_FORMAT_VERSION, key, identity, source.url, listed, model_id)
            await on_thread(self._write, record, smalls, headers)
            try:
                return await self.open(key)
            except CheckpointInvalid:
                await self._remove(key)
                raise

    def _write(self, record: _Record, smalls: dict[str, bytes], headers: dict[str, bytes]) -> None:
        sizes = {file.name: file.size_bytes for file in record.files}
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            # The one that is there can't be read, or it would have been taken.
            with staged(self._folder / record.key, replace=True, check_old=lambda _: None) as stage:
                for name, content in smalls.items():
                    (write_in_new_folder if is_pooling_name(name) else _write_whole)(stage / name, content)
                for name, header in headers.items():
                    _write_whole(stage / name, header, sizes[name])
                    # The card's fingerprint digests this time: so it differs where the source's files do.
                    moment_ns = int(record.identity[:12], 16)
                    os.utime(stage / name, ns=(moment_ns, moment_ns))
                _write_whole(stage / RECORD_NAME, msgspec.json.encode(record))
        except TargetExists as wrong:
            raise WriteFailed(wrong.message) from None
        except OSError as wrong:
            raise WriteFailed(f"{self._folder} can't be written: {wrong.strerror}") from None

    async def open(self, key: str) -> Card:
        """Read a card that is here.

        Raises:
            CheckpointInvalid: there is none, or it can't be read.
        """
        card = await on_thread(self._open, key)
        known = self._known.get(key)
        if known is not None and known.checkpoint.fingerprint == card.checkpoint.fingerprint:
            return known
        self._known[key] = card
        return card

    def _open(self, key: str) -> Card:
        path = self._folder / key
        checkpoint = read_folder(path)
        try:
            raw = read_bounded(path / RECORD_NAME, _MAX_RECORD_BYTES, CheckpointInvalid)
            record = msgspec.json.decode(raw, type=_Record)
        except msgspec.DecodeError as wrong:
            raise CheckpointInvalid(f"{path / RECORD_NAME} can't be read: {wrong}") from None
        if record.key != key or record.format_version != _FORMAT_VERSION:
            raise CheckpointInvalid(f"{path / RECORD_NAME} is that of another card")
        if lacks := _lacks(path, record):
            raise CheckpointInvalid(f"{path} has no {lacks} of the size that was listed")
        return Card(record, msgspec.structs.replace(checkpoint, identity=record.identity))

    def folder(self, key: str) -> Path:
        """Give where the card of that key is, if there is one."""
        return self._folder / key

    async def keep(self, is_wanted: Callable[[str], bool]) -> None:
        """Remove every card that is not wanted; what the SSD tier has stays."""
        for key in await on_thread(self._keys):
            if is_wanted(key):
                continue
            async with self._lock(key):
                # It may be by now.
                if not is_wanted(key):
                    await self._remove(key)

    async def _remove(self, key: str) -> None:
        await on_thread(lambda: shutil.rmtree(self._folder / key, ignore_errors=True))

    def _keys(self) -> list[str]:
        try:
            return sorted(entry.name for entry in self._folder.iterdir() if not entry.name.startswith("."))
        except OSError:
            return []

    async def recover(self) -> None:
        """Remove what a killed process has left half made; this one has the folder to itself."""
        await on_thread(self._recover)

    def _recover(self) -> None:
        for left in self._folder.glob(".*.sllm-*"):
            shutil.rmtree(left, ignore_errors=True)
        for left in self._folder.glob(f"*/{_NEW_RECORD_NAME}"):
            left.unlink(missing_ok=True)


def _check_listing(url: str, listed: tuple[SourceFile, ...]) -> None:
    """Refuse, before anything is fetched, what would be too much, or could not be told from a later version."""
    weights = [file for file in listed if file.name.endswith(_WEIGHTS)]
    smalls = [file for file in listed if not file.name.endswith(_WEIGHTS)]
    if not weights:
        raise SourceInvalid(f"{url} has no weights as safetensors", param="source")
    if sum(file.size_bytes for file in smalls) > MAX_SMALL_BYTES or len(smalls) > MAX_OTHER_FILES + 1:
        raise SourceInvalid(
            f"{url} has {len(smalls)} files beside its weights; at most {MAX_OTHER_FILES}, of "
            f"{format_bytes(MAX_SMALL_BYTES)} in all, are allowed",
            param="source",
        )
    if all(file.name != MANIFEST_NAME for file in smalls) and not all(file.validator for file in weights):
        raise SourceInvalid(
            f"{url} tells no version of its files (ETag or Last-Modified) and has no {MANIFEST_NAME}: "
            "bytes of two versions could not be told apart",
            param="source",
        )


async def _fetch(
    url: str, suppliers: Suppliers, listed: tuple[SourceFile, ...]
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Fetch the small files and the headers of the others, each compared with the manifest where there is one."""
    files = {file.name: file for file in listed}
    smalls: dict[str, bytes] = {}
    wanted: dict[str, str] = {}
    if MANIFEST_NAME in files:
        smalls[MANIFEST_NAME] = await _small(suppliers, files[MANIFEST_NAME], "")
        manifest = await on_thread(parse_manifest, smalls[MANIFEST_NAME], f"{MANIFEST_NAME} of {url}")
        wanted |= {other.name: other.digest for other in manifest.others}
        wanted |= {file.name: file.header_digest for file in manifest.files}
    headers: dict[str, bytes] = {}
    for file in listed:
        if file.name.endswith(_WEIGHTS):
            headers[file.name] = await _header(suppliers, file, wanted.get(file.name, ""))
            if sum(map(len, headers.values())) > MAX_SMALL_BYTES:
                raise SourceInvalid(
                    f"the headers of {url} take more than {format_bytes(MAX_SMALL_BYTES)}", param="source"
                )
        elif file.name not in smalls:
            smalls[file.name] = await _small(suppliers, file, wanted.get(file.name, ""))
    return smalls, headers


def card_key(url: str, files: Iterable[SourceFile]) -> str:
    """Give the key of the card of what was listed at a URL, in the order of names."""
    digest = hashlib.sha256()
    for part in (
        url,
        *(f"{file.name}\0{file.size_bytes}\0{file.validator}" for file in sorted(files, key=attrgetter("name"))),
    ):
        raw = part.encode()
        digest.update(b"%d:" % len(raw))
        digest.update(raw)
    return digest.hexdigest()


async def _small(suppliers: Suppliers, file: SourceFile, wanted: str) -> bytes:
    bound = MAX_MODULES_BYTES if is_pooling_name(file.name) else _BOUNDS.get(file.name, MAX_INDEX_BYTES)
    if file.size_bytes > bound:
        raise SourceInvalid(f"{file.name} has {file.size_bytes} bytes; at most {bound} are allowed", param="source")
    return await _read(suppliers, file, file.size_bytes, wanted)


async def _header(suppliers: Suppliers, file: SourceFile, wanted: str) -> bytes:
    """Read the header of a weight file, its length first."""
    length = await _read(suppliers, file, min(LENGTH_BYTES, file.size_bytes), "")
    return await _read(suppliers, file, header_end(length, file.size_bytes, file.name), wanted)


async def _read(suppliers: Suppliers, file: SourceFile, length: int, wanted: str) -> bytes:
    """Read the beginning of a file until it has the digest that is wanted, if one is."""
    content = bytearray(length)

    async def settle() -> None:
        if wanted and digest(content).hex() != wanted:
            raise CheckpointCorrupt(f"{file.name}: its first {length} bytes are not what was written")

    if content:
        await read_and_settle(suppliers, [Read(file.name, 0, memoryview(content))], settle)
    return bytes(content)


def _lacks(path: Path, record: _Record) -> str | None:
    """Name a file of a card that is not there, or not of its size."""
    for file in record.files:
        try:
            size_bytes = (path / file.name).stat().st_size
        except OSError:
            return file.name
        if size_bytes != file.size_bytes:
            return file.name
    return None if (path / RECORD_NAME).is_file() else RECORD_NAME


def _model_id(smalls: dict[str, bytes], url: str) -> str:
    raw = smalls.get(MANIFEST_NAME)
    if raw is None:
        return ""
    return parse_manifest(raw, f"{MANIFEST_NAME} of {url}").model_id


def _write_whole(path: Path, content: bytes, size_bytes: int | None = None) -> None:
    with path.open("wb") as opened:
        opened.write(content)
        if size_bytes is not None:
            opened.truncate(size_bytes)
        opened.flush()
        os.fsync(opened.fileno())
