"""How models and partials lie in the SSD tier's folder: made, found again after any end of the process, removed.

A model is a folder of `models` with a record that its files agree with; a partial is a folder of `partial` with a plan
and its files. What of ours is neither goes to the trash; what can't be ours is left alone. Blocks.
docs/ssd_tier.md has the whole.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from sllm_actor.checkpoint.bounded import read_bounded
from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.errors import CheckpointInvalid, ReadFailed, WriteFailed
from sllm_actor.loader import ssd_files
from sllm_actor.loader.chunk_place import ChunkPlace
from sllm_actor.loader.ssd_journal import Journal
from sllm_actor.loader.ssd_quota import HeldModel, HeldPartial
from sllm_actor.loader.ssd_record import (
    MAX_PLAN_BYTES,
    MAX_RECORD_BYTES,
    MAX_SMALL_BYTES,
    MAX_SMALLS_BYTES,
    RECORD_NAME,
    Plan,
    Record,
    encode_plan,
    encode_record,
    folder_name,
    is_model_id,
    parse_plan,
    parse_record,
)

log = logging.getLogger(__name__)

LOCK_NAME = "tier.lock"
MODELS, PARTIAL, TRASH = "models", "partial", "trash"
PIN_NAME = ".sllm-pinned"
MODEL_FOLDER, JOURNAL_NAME, PLAN_NAME = "model", "journal", "plan.json"


class Trash:
    """Where whatever is removed goes in one step, to be deleted afterwards."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()

    def take(self, path: Path) -> Path:
        """Move something here; return its new path.

        Raises:
            WriteFailed: the disk refused; it is where it was.
        """
        while os.path.lexists(target := self._folder / f"{path.name}.{next(self._numbers)}"):
            pass
        ssd_files.move(path, target)
        return target

    def empty(self) -> None:
        """Delete what is here, as far as the disk allows; what it does not is deleted by the next one."""
        for name in _names_in(self._folder):
            delete(self._folder / name)


def delete(path: Path) -> None:
    """Delete something out of the trash; a failure is logged."""
    try:
        ssd_files.remove(path)
    except WriteFailed as wrong:
        log.warning("left in the trash: %s", wrong)


def recover(folder: Path, trash: Trash) -> tuple[list[HeldModel], list[HeldPartial]]:
    """Make the folders of a tier where they are missing, find what is whole or can be resumed, and reclaim the rest.

    Raises:
        TargetInvalid: one of the folders is something else, such as a symbolic link.
        WriteFailed: the disk refused.
    """
    for name in (MODELS, PARTIAL, TRASH):
        ssd_files.make_folder(folder / name)
    ssd_files.sync_folder(folder)
    models, partials = [], []
    for path in _ours(folder / MODELS):
        try:
            models.append(_find_model(path))
        except CheckpointInvalid as wrong:
            log.warning("no whole model, removed: %s: %s", path, wrong)
            trash.take(path)
    for path in _ours(folder / PARTIAL):
        try:
            partials.append(_find_partial(path))
        except (CheckpointInvalid, ReadFailed) as wrong:
            log.info("can't be resumed, removed: %s: %s", path, wrong)
            trash.take(path)
    trash.empty()
    return models, partials


def _ours(folder: Path) -> Iterable[Path]:
    for name in _names_in(folder):
        if is_model_id(name):
            yield folder / name
        else:
            log.warning("%s is not the SSD tier's, and left alone", folder / name)


def _names_in(folder: Path) -> list[str]:
    with ssd_files.writing(folder):
        return sorted(os.listdir(folder))


def _find_model(path: Path) -> HeldModel:
    record = parse_record(_read(path / RECORD_NAME, MAX_RECORD_BYTES, path))
    if record.model_id != path.name:
        raise CheckpointInvalid(f"its record is that of {record.model_id}")
    for name, size_bytes in record.sizes.items():
        if not ssd_files.is_folder((path / name).parent) or not ssd_files.is_file_of(path / name, size_bytes):
            raise CheckpointInvalid(f"{name} is no file of {size_bytes} bytes")
    last_used_s = ssd_files.stamped_s(path / RECORD_NAME)
    return HeldModel(path.name, path, record.size_bytes, last_used_s, os.path.lexists(path / PIN_NAME))


def _find_partial(path: Path) -> HeldPartial:
    plan = read_plan(path)
    for file in plan.files:
        if not ssd_files.is_file_of(path / MODEL_FOLDER / file.name, file.size_bytes):
            raise CheckpointInvalid(f"{file.name} is no file of {file.size_bytes} bytes")
    for name in set(_names_in(path)) - {MODEL_FOLDER, JOURNAL_NAME, PLAN_NAME}:
        ssd_files.remove(path / name)
    done = Journal(path / JOURNAL_NAME, plan.pieces).replay(plan.chunks)
    last_used_s = ssd_files.stamped_s(path / JOURNAL_NAME)
    return HeldPartial(plan.key, path, plan.size_bytes, last_used_s, sum(plan.length(place) for place in done))


def read_plan(path: Path) -> Plan:
    """Read the plan of a partial.

    Raises:
        CheckpointInvalid: the folder is no partial, or that of another key.
    """
    plan = parse_plan(_read(path / PLAN_NAME, MAX_PLAN_BYTES, path))
    if folder_name(plan.key) != path.name or not ssd_files.is_folder(path / MODEL_FOLDER):
        raise CheckpointInvalid("it is the folder of another key, or has no files")
    return plan


def plan_of(path: Path) -> Plan | None:
    """Read the plan of a partial; None where it can't be read any more."""
    try:
        return read_plan(path)
    except CheckpointInvalid:
        return None


def _read(path: Path, max_bytes: int, folder: Path) -> bytes:
    if not ssd_files.is_folder(folder) or path.is_symlink():
        raise CheckpointInvalid(f"{path} is not a file in a folder of its own")
    return read_bounded(path, max_bytes, CheckpointInvalid)


def read_smalls(smalls: Mapping[str, bytes | Path]) -> dict[str, bytes]:
    """Take the small files of a model into memory.

    Raises:
        CheckpointInvalid: one can't be read, or they are too large.
    """
    read: dict[str, bytes] = {}
    for name, small in smalls.items():
        read[name] = read_bounded(small, MAX_SMALL_BYTES, CheckpointInvalid) if isinstance(small, Path) else small
        if sum(map(len, read.values())) > MAX_SMALLS_BYTES or len(read[name]) > MAX_SMALL_BYTES:
            raise CheckpointInvalid(f"the small files are longer than may be, with {name[:120]!r}")
    return read


def make_partial(path: Path, plan: Plan, smalls: Mapping[str, bytes]) -> Journal:
    """Make the folder of a partial, its room on the disk taken; its plan comes last and makes it one.

    Raises:
        WriteFailed: the disk is full or refuses; nothing is left behind.
    """
    journal = Journal(path / JOURNAL_NAME, plan.pieces)
    try:
        ssd_files.remove(path)
        for folder in (path, path / MODEL_FOLDER):
            ssd_files.make_folder(folder)
        for file in plan.files:
            ssd_files.allocate(path / MODEL_FOLDER / file.name, file.size_bytes)
        _write_smalls(path / MODEL_FOLDER, smalls)
        journal.begin({}, plan.chunks)
        ssd_files.replace_small(path / PLAN_NAME, encode_plan(plan))
        ssd_files.sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(WriteFailed):
            ssd_files.remove(path)
        raise
    return journal


def reopen_partial(path: Path, plan: Plan, smalls: Mapping[str, bytes]) -> tuple[Journal, dict[ChunkPlace, bytes]]:
    """Take up a partial, with the small files of now; return its chunks as the journal has them, to be verified.

    Raises:
        WriteFailed, ReadFailed: the disk refuses or fails.
    """
    model = path / MODEL_FOLDER
    for name in set(_names_in(model)) - {file.name for file in plan.files}:
        ssd_files.remove(model / name)
    _write_smalls(model, smalls)
    ssd_files.replace_small(path / PLAN_NAME, encode_plan(plan))
    journal = Journal(path / JOURNAL_NAME, plan.pieces)
    noted = {place: digests for place, digests in journal.replay(plan.chunks).items() if plan.length(place)}
    return journal, noted


def _write_smalls(model: Path, smalls: Mapping[str, bytes]) -> None:
    for name, raw in smalls.items():
        below = (model / name).parent != model
        if below:
            ssd_files.make_folder((model / name).parent)
        ssd_files.write_small(model / name, raw)
        if below:
            ssd_files.sync_folder((model / name).parent)
    ssd_files.sync_folder(model)


def verified(
    path: Path, plan: Plan, noted: Iterable[tuple[ChunkPlace, bytes]], expected: Mapping[ChunkPlace, bytes]
) -> dict[ChunkPlace, bytes]:
    """Return those chunks whose bytes on the disk have the digests that were noted, and those of the manifest."""
    found: dict[ChunkPlace, bytes] = {}
    # Mapped memory begins on a page, which direct reads need.
    with mmap.mmap(-1, plan.chunk_bytes) as mapped, memoryview(mapped) as block:
        for place, digests in noted:
            with block[: plan.length(place)] as chunk, contextlib.suppress(ReadFailed):
                ssd_files.read_at(
                    path / MODEL_FOLDER / plan.files[place.file].name, chunk, place.chunk * plan.chunk_bytes
                )
                has = plan.digests(chunk)
                if digests.startswith(has) and expected.get(place, has) == has:
                    found[place] = has
    return found


def sync_weights(path: Path, plan: Plan) -> None:
    """Wait until the disk has the weights of a partial.

    Raises:
        WriteFailed: it has lost some; which ones is unknown from then on.
    """
    for file in plan.files:
        ssd_files.sync_file(path / MODEL_FOLDER / file.name)


def write_record(path: Path, record: Record, now_s: float) -> None:
    """Make the files of a complete partial a checkpoint that can be published.

    Raises:
        CheckpointInvalid: they are none.
        WriteFailed: the disk refused.
    """
    model = path / MODEL_FOLDER
    read_folder(model)
    ssd_files.write_small(model / RECORD_NAME, encode_record(record))
    ssd_files.stamp(model / RECORD_NAME, now_s)
    ssd_files.sync_folder(model)
