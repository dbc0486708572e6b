"""Convert a checkpoint folder into one that is laid out for loading.

Puts the parts of this room together: an original, a plan, the writer, a manifest, a folder that appears whole.
Blocking; takes minutes for large models, so it reports progress, and whatever the report raises cancels it.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from sllm_actor.checkpoint.digests import digest
from sllm_actor.checkpoint.folder import STORE_INDEX_NAME, Checkpoint, read_config, read_folder
from sllm_actor.checkpoint.layout import FileLayout, is_pad, lay_out, pad_count
from sllm_actor.checkpoint.manifest import (
    DEFAULT_CHUNK_BYTES,
    MANIFEST_NAME,
    MAX_CHUNK_BYTES,
    MAX_OTHER_FILES,
    MIN_CHUNK_BYTES,
    Manifest,
    Origin,
    OriginFormat,
    OtherRecord,
    PartitionKind,
    belongs,
    encode,
    file_names,
    make_manifest,
)
from sllm_actor.checkpoint.originals import Original, SafetensorsFolder
from sllm_actor.checkpoint.partitions import Piece, Plan, by_layers, check_count
from sllm_actor.checkpoint.pickles import PickledFiles
from sllm_actor.checkpoint.sentence_layout import find_pooling
from sllm_actor.checkpoint.staging import staged
from sllm_actor.checkpoint.store_files import TOKENIZER_FOLDER, StoreFiles
from sllm_actor.checkpoint.tensor_parallel import for_tensor_parallel
from sllm_actor.checkpoint.verify import verify_files
from sllm_actor.checkpoint.writer import check_free, write_bytes, write_in_new_folder, write_weights
from sllm_actor.domain.sentence_modules import MAX_MODULES_BYTES
from sllm_actor.errors import (
    AdapterInvalid,
    CheckpointEmpty,
    CheckpointInvalid,
    CheckpointUnsplittable,
    InvalidInput,
    PickleCheckpoint,
    ReadFailed,
    TargetExists,
    TargetInvalid,
)

INDEX_NAME = "model.safetensors.index.json"
MAX_OTHER_BYTES = 256 * 2**20
MANIFEST_ROW_BYTES = 48
# Called with the bytes done and the bytes to do; what it raises cancels the work.
OnProgress = Callable[[int, int], None]


class Conversion(msgspec.Struct, frozen=True):
    """What a conversion has made. Sizes in bytes; `size_bytes` counts the weight files."""

    path: Path
    manifest: Manifest
    size_bytes: int
    tensors: int
    pads: int


class _Beside(NamedTuple):
    """A file to be copied; `name` is below the folder for the pooling of sentence-transformers."""

    name: str
    path: Path
    size_bytes: int


class _Work(NamedTuple):
    """What is to be written, all of it known before the first byte."""

    original: Original
    checkpoint: Checkpoint | None
    plan: Plan
    layouts: tuple[FileLayout, ...]
    others: list[_Beside]
    chunk_bytes: int


class _Progress:
    def __init__(self, total_bytes: int, report: OnProgress | None) -> None:
        self._total_bytes = total_bytes
        self._report = report
        self._done_bytes = 0

    def add(self, size_bytes: int) -> None:
        self._done_bytes += size_bytes
        if self._report is not None:
            self._report(self._done_bytes, self._total_bytes)


def convert(
    source: Path,
    target: Path,
    *,
    partitions: int = 1,
    tensor_parallel: int = 1,
    replace: bool = False,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    on_progress: OnProgress | None = None,
) -> Conversion:
    """Convert the folder `source` into the new folder `target`, which appears when it is whole and on the disk.

    Raises:
        CheckpointInvalid: the source can't be converted, or not into these partitions; the class tells why.
        TargetInvalid, TargetExists, TargetBusy: nothing may be written to the target.
        InvalidInput: a number is out of bounds.
        ReadFailed, ConversionFailed: the source could not be read.
        WriteFailed: the disk is full, or fails; what was at the target is as it was.
    """
    check_count(partitions)
    check_count(tensor_parallel)
    if partitions > 1 and tensor_parallel > 1:
        raise InvalidInput("a checkpoint is partitioned by layers or for tensor-parallel ranks, not both")
    if not MIN_CHUNK_BYTES <= chunk_bytes <= MAX_CHUNK_BYTES or chunk_bytes & (chunk_bytes - 1):
        raise InvalidInput(f"{chunk_bytes} bytes a chunk: a power of two from {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES}")
    folder, place = _resolve(source, target)
    with _opened(folder) as (original, checkpoint, config):
        if tensor_parallel > 1:
            plan = for_tensor_parallel(original.tensors, config, original.aliases, tensor_parallel)
        else:
            plan = by_layers(original.tensors, partitions)
        layouts = _layouts(plan, original)
        work = _Work(original, checkpoint, plan, layouts, _others(folder, original.format), chunk_bytes)
        with staged(place, replace=replace, check_old=_check_replaceable) as stage:
            manifest = _write(stage, work, on_progress)
    return Conversion(
        path=place,
        manifest=manifest,
        size_bytes=sum(layout.size_bytes for layout in layouts),
        tensors=len(original.tensors),
        pads=sum(map(pad_count, layouts)),
    )


def _resolve(source: Path, target: Path) -> tuple[Path, Path]:
    """Return both as real paths, refusing a target that is, holds, or lies in the source."""
    try:
        folder = source.resolve(strict=True)
        place = target.parent.resolve(strict=True) / target.name
    except (OSError, RuntimeError, ValueError) as wrong:
        if isinstance(wrong, FileNotFoundError) and source.exists():
            raise TargetInvalid(f"{target.parent} does not exist", param="target") from None
        raise CheckpointInvalid(f"{source} can't be resolved: {wrong}") from None
    if target.name in ("", "..", ".") or "\0" in target.name:
        raise TargetInvalid(f"{target} is no name for a new folder", param="target")
    if place.is_symlink():
        raise TargetInvalid(f"{place} is a symbolic link", param="target")
    if place == folder or _is_in(place, folder):
        raise TargetInvalid(f"{place} is the source or lies in it", param="target")
    if _is_in(folder, place):
        raise TargetInvalid(f"{place} holds the source", param="target")
    if place.is_dir():
        # A folder of links, as the Hub's cache has them, may lead into what is to be replaced.
        pooling = find_pooling(folder)
        below = [folder / pooling] if pooling is not None else []
        for entry in (*folder.iterdir(), *below) if folder.is_dir() else ():
            if entry.is_symlink() and _is_in(Path(os.path.realpath(entry)), place):
                raise TargetInvalid(f"{entry} of the source is a link into {place}", param="target")
    return folder, place


def _is_in(inner: Path, outer: Path) -> bool:
    """Tell whether `inner` is `outer` or below it; by identity too, as mounts give one folder two paths."""
    for folder in (inner, *inner.parents):
        if folder == outer:
            return True
        with contextlib.suppress(OSError):
            if os.path.samefile(folder, outer):
                return True
    return False


def _check_replaceable(old: Path) -> None:
    """Only what a conversion has written is replaced: a mistyped target is not a folder to remove."""
    if not (old / MANIFEST_NAME).is_file() and any(old.iterdir()):
        raise TargetExists(f"{old} has no {MANIFEST_NAME}: it was not converted, and is not replaced", param="target")


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[tuple[Original, Checkpoint | None, Mapping[str, object]]]:
    original: Original
    try:
        checkpoint: Checkpoint | None = read_folder(folder)
    except PickleCheckpoint:
        checkpoint = None
    except CheckpointEmpty:
        if not (folder / STORE_INDEX_NAME).is_file():
            raise
        checkpoint = None
    config: Mapping[str, object]
    if checkpoint is None:
        original = _to_convert(folder)
        config = _config_of(folder, original)
    else:
        if checkpoint.adapter is not None:
            raise AdapterInvalid(
                f"{folder} is a LoRA adapter, which is loaded as it is; deploy it beside its base model"
            )
        if checkpoint.ranks > 1:
            raise CheckpointUnsplittable(f"{folder} holds slices for {checkpoint.ranks} ranks; convert its original")
        config, original = checkpoint.config, SafetensorsFolder(checkpoint)
    with contextlib.closing(original):
        yield original, checkpoint, config


def _to_convert(folder: Path) -> Original:
    return StoreFiles(folder) if (folder / STORE_INDEX_NAME).is_file() else PickledFiles(folder)


def _config_of(folder: Path, original: Original) -> Mapping[str, object]:
    try:
        return read_config(folder)[0]
    except BaseException:
        original.close()
        raise


def _layouts(plan: Plan, original: Original) -> tuple[FileLayout, ...]:
    # transformers refuses a file that does not say for which framework it is.
    metadata = {"format": "pt"} | dict(original.metadata)
    layouts: list[FileLayout] = []
    pads = 0
    for pieces in plan.files:
        # A name twice over the files of a checkpoint is refused, but every rank has the same names.
        first_pad = 0 if plan.partition.kind is PartitionKind.TENSOR_PARALLEL else pads
        layouts.append(lay_out((piece.tensor for piece in pieces), metadata, first_pad=first_pad))
        pads += pad_count(layouts[-1])
    return tuple(layouts)


def _write(stage: Path, work: _Work, on_progress: OnProgress | None) -> Manifest:
    original, plan, chunk_bytes = work.original, work.plan, work.chunk_bytes
    checkpoint = work.checkpoint if work.checkpoint is not None and work.checkpoint.manifest is not None else None
    writing_bytes = sum(layout.size_bytes for layout in work.layouts)
    beside_bytes = sum(other.size_bytes for other in work.others) + writing_bytes // chunk_bytes * MANIFEST_ROW_BYTES
    check_free(stage, writing_bytes + beside_bytes)
    progress = _Progress(writing_bytes + (checkpoint.size_bytes if checkpoint is not None else 0), on_progress)
    if checkpoint is not None:
        # What is damaged already must not be given digests anew.
        verify_files(checkpoint, progress.add)
    records = []
    for name, pieces, layout in zip(file_names(plan.partition), plan.files, work.layouts, strict=True):
        records.append(write_weights(stage / name, layout, _blocks(original, pieces, layout, progress), chunk_bytes))
    original.finish()
    others = [_copy(other, stage) for other in work.others]
    if plan.partition.kind is PartitionKind.LAYERS:
        others.append(_write_other(stage, INDEX_NAME, _index(work.layouts, plan)))
    origin = Origin(original.format, original.generation)
    manifest = make_manifest(chunk_bytes, records, others, original.aliases, plan.partition, origin)
    write_bytes(stage / MANIFEST_NAME, encode(manifest))
    return manifest


def _blocks(
    original: Original, pieces: Sequence[Piece], layout: FileLayout, progress: _Progress
) -> Iterator[memoryview]:
    by_name = {piece.tensor.name: piece for piece in pieces}
    progress.add(len(layout.header))
    for tensor in layout.tensors:
        if is_pad(tensor.name):
            yield memoryview(bytes(tensor.size_bytes))
            progress.add(tensor.size_bytes)
            continue
        for block in original.read(tensor.name, by_name[tensor.name].runs):
            yield block
            progress.add(len(block))


def _index(layouts: Sequence[FileLayout], plan: Plan) -> bytes:
    names = file_names(plan.partition)
    weight_map = {
        tensor.name: name
        for name, layout in zip(names, layouts, strict=True)
        for tensor in layout.tensors
        if not is_pad(tensor.name)
    }
    total_bytes = sum(piece.tensor.size_bytes for pieces in plan.files for piece in pieces)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=1, ensure_ascii=False).encode() + b"\n"


def _others(folder: Path, format: OriginFormat) -> list[_Beside]:
    """List what is copied beside the weights; the index is written anew."""
    try:
        beside = [path for path in folder.iterdir() if belongs(path.name) and path.name != INDEX_NAME]
        tokenizer = folder / TOKENIZER_FOLDER
        if format is OriginFormat.SLLM_STORE and tokenizer.is_dir():
            taken = {path.name for path in beside}
            beside += [path for path in tokenizer.iterdir() if belongs(path.name) and path.name not in taken]
        pooling = find_pooling(folder)
        found = [(path.name, path) for path in sorted(beside, key=lambda path: path.name)]
        found += [(pooling, folder / pooling)] if pooling is not None else []
        files = [_Beside(name, path, path.stat().st_size) for name, path in found if path.is_file()]
    except OSError as wrong:
        raise ReadFailed(f"{folder} can't be read: {wrong.strerror}") from wrong
    if len(files) > MAX_OTHER_FILES - 1:
        raise CheckpointInvalid(f"{folder} has {len(files)} files beside its weights, at most {MAX_OTHER_FILES} can be")
    return files


def _copy(other: _Beside, stage: Path) -> OtherRecord:
    path, max_bytes = other.path, MAX_OTHER_BYTES if "/" not in other.name else MAX_MODULES_BYTES
    try:
        with path.open("rb") as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise ReadFailed(f"{path} is not a regular file")
            raw = opened.read(max_bytes + 1)
    except OSError as wrong:
        raise ReadFailed(f"{path} can't be read: {wrong.strerror}") from wrong
    if len(raw) > max_bytes:
        raise CheckpointInvalid(f"{path} is longer than {max_bytes} bytes, too long for what it is")
    return _write_other(stage, other.name, raw)


def _write_other(stage: Path, name: str, raw: bytes) -> OtherRecord:
    (write_in_new_folder if "/" in name else write_bytes)(stage / name, raw)
    return OtherRecord(name, len(raw), digest(raw).hex())
