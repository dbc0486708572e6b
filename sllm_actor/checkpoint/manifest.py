"""`sllm.json`: what a converted checkpoint says of its own bytes.

Parses, checks and writes that file, and holds it against what a folder was found to hold; reads no weights.
The fields are described one by one in docs/checkpoint_format.md.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec

from sllm_actor.checkpoint.bounded import read_bounded
from sllm_actor.checkpoint.digests import chunk_count
from sllm_actor.checkpoint.sentence_layout import find_pooling
from sllm_actor.domain.sentence_modules import wrong_below
from sllm_actor.errors import CheckpointInvalid

MANIFEST_NAME = "sllm.json"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 128_000_000
MAX_DIGESTS = 2_000_000
MAX_PARTITIONS = 256
MAX_OTHER_FILES = 1000
MIN_CHUNK_BYTES = 4096
MAX_CHUNK_BYTES = 2**30
DEFAULT_CHUNK_BYTES = 4 * 2**20
_MAX_SIZE_BYTES = 2**53

# What decides a model's answers beside its weights. Neither code nor pickles are ever among it.
_OTHER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}")
_OTHER_FILES = re.compile(
    r"config\.json|generation_config\.json|(?:pre)?processor_config\.json|model\.safetensors\.index\.json"
    r"|modules\.json|sentence_.*_config\.json|config_sentence_transformers\.json"
    r"|special_tokens_map\.json|added_tokens\.json|tokenizer.*|chat_template.*|vocab.*|merges.*|.*\.model|.*\.tiktoken"
)
_CODE_AND_WEIGHTS = re.compile(
    r".*\.(?:py|pyc|so|bin|pt|pth|ckpt|pkl|pickle|dill|joblib|npy|npz|h5|msgpack|onnx|gguf|safetensors)"
)

Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Name = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}\Z")]
# The pooling of sentence-transformers lies in a folder below the model's own, and nothing else does.
OtherName = Annotated[
    str, msgspec.Meta(pattern=r"\A(?:[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}|[A-Za-z0-9_][A-Za-z0-9_-]{0,63}/config\.json)\Z")
]
Size = Annotated[int, msgspec.Meta(ge=0, le=_MAX_SIZE_BYTES)]
TensorName = Annotated[str, msgspec.Meta(max_length=4096)]
Dimension = Annotated[int, msgspec.Meta(ge=0, le=63)]


class PartitionKind(StrEnum):
    NONE = "none"
    LAYERS = "layers"
    TENSOR_PARALLEL = "tensor_parallel"


class OriginFormat(StrEnum):
    SAFETENSORS = "safetensors"
    PICKLE = "pickle"
    SLLM_STORE = "sllm_store"


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A weight file: `digests` holds one XXH3-128 for each chunk of it, `header_digest` that of its header."""

    name: Name
    size_bytes: Size
    header_digest: Digest
    digests: tuple[Digest, ...]


class OtherRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file beside the weights, digested as a whole."""

    name: OtherName
    size_bytes: Size
    digest: Digest


class Partition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How tensors are spread over files; `split` has the dimension of each tensor of which a rank has a slice."""

    kind: PartitionKind = PartitionKind.NONE
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_PARTITIONS)] = 1
    split: dict[TensorName, Dimension] = {}


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was converted: `generation` tells one original from another, and its later versions."""

    format: OriginFormat
    generation: Digest


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of `sllm.json`; `model_id` digests all of it but itself and `origin`."""

    format_version: int
    model_id: Sha256
    chunk_bytes: Annotated[int, msgspec.Meta(ge=MIN_CHUNK_BYTES, le=MAX_CHUNK_BYTES)]
    files: Annotated[tuple[FileRecord, ...], msgspec.Meta(min_length=1, max_length=MAX_PARTITIONS)]
    others: Annotated[tuple[OtherRecord, ...], msgspec.Meta(max_length=MAX_OTHER_FILES)]
    aliases: dict[TensorName, TensorName]
    partition: Partition
    origin: Origin


class FoundFile(msgspec.Struct, frozen=True):
    """A weight file as it is in the folder, for comparison; `tensors` maps names to dtype and shape."""

    name: str
    size_bytes: int
    header_digest: str
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]


class _Version(msgspec.Struct, frozen=True):
    format_version: int


def belongs(name: str) -> bool:
    """Tell whether a file of this name, beside the weights, is part of a checkpoint."""
    return bool(
        _OTHER_NAME.fullmatch(name) and _OTHER_FILES.fullmatch(name) and not _CODE_AND_WEIGHTS.fullmatch(name.lower())
    )


def file_names(partition: Partition) -> tuple[str, ...]:
    """Return the names of the weight files, in the order of their partitions."""
    count = partition.count
    if partition.kind is PartitionKind.NONE:
        return ("model.safetensors",)
    if partition.kind is PartitionKind.LAYERS:
        return tuple(f"model-{k:05}-of-{count:05}.safetensors" for k in range(1, count + 1))
    return tuple(f"model-rank-{rank:05}-of-{count:05}.safetensors" for rank in range(count))


def make_manifest(
    chunk_bytes: int,
    files: Sequence[FileRecord],
    others: Iterable[OtherRecord],
    aliases: Mapping[str, str],
    partition: Partition,
    origin: Origin,
) -> Manifest:
    """Put a manifest together and give it its model id."""
    ordered = tuple(sorted(others, key=lambda other: other.name))
    blank = Manifest(
        FORMAT_VERSION, "0" * 64, chunk_bytes, tuple(files), ordered, dict(sorted(aliases.items())), partition, origin
    )
    return msgspec.structs.replace(blank, model_id=model_id(blank))


def model_id(manifest: Manifest) -> str:
    """Digest the content that a manifest describes: SHA-256, the same for the same bytes wherever they came from."""
    content = msgspec.to_builtins(manifest)
    del content["model_id"], content["origin"]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def encode(manifest: Manifest) -> bytes:
    """Write a manifest as JSON, one field a line for people.

    Raises:
        CheckpointInvalid: it would be longer than any may be.
    """
    digests = sum(len(file.digests) for file in manifest.files)
    raw = msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
    if digests > MAX_DIGESTS or len(raw) > MAX_MANIFEST_BYTES:
        raise CheckpointInvalid(f"{MANIFEST_NAME} would need {digests} digests; choose larger chunks")
    return raw


def read_manifest(folder: Path) -> Manifest | None:
    """Read and check the manifest of a folder; None where it has none, as a stock folder.

    Raises:
        CheckpointInvalid: it can't be read, or contradicts itself.
    """
    path = folder / MANIFEST_NAME
    if not path.exists() and not path.is_symlink():
        return None
    return parse_manifest(read_bounded(path, MAX_MANIFEST_BYTES, CheckpointInvalid), str(path))


def parse_manifest(raw: bytes, name: str = MANIFEST_NAME) -> Manifest:
    """Parse a manifest and check that it does not contradict itself; `name` is for messages.

    Raises:
        CheckpointInvalid: it is no manifest, of another version, or one part of it denies another.
    """
    try:
        version = msgspec.json.decode(raw, type=_Version).format_version
        if version != FORMAT_VERSION:
            _refuse(name, f"format version {version}, and this program reads {FORMAT_VERSION}")
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as wrong:
        _refuse(name, str(wrong))
    if manifest.chunk_bytes & (manifest.chunk_bytes - 1):
        _refuse(name, f"chunk_bytes {manifest.chunk_bytes} is not a power of two")
    _check_partition(manifest, name)
    _check_others(manifest, name)
    for file in manifest.files:
        needed = chunk_count(file.size_bytes, manifest.chunk_bytes)
        if len(file.digests) != needed:
            _refuse(name, f"{file.name} of {file.size_bytes} bytes has {len(file.digests)} digests and needs {needed}")
    for alias, stored in manifest.aliases.items():
        if stored in manifest.aliases:
            _refuse(name, f"alias {alias!r} stands for {stored!r}, itself an alias")
    expected = model_id(manifest)
    if manifest.model_id != expected:
        _refuse(name, f"its model id is {manifest.model_id} and its content has {expected}")
    return manifest


def _check_partition(manifest: Manifest, name: str) -> None:
    partition = manifest.partition
    if (partition.kind is PartitionKind.NONE) != (partition.count == 1):
        _refuse(name, f"{partition.count} partitions of kind {partition.kind}")
    if partition.split and partition.kind is not PartitionKind.TENSOR_PARALLEL:
        _refuse(name, f"split tensors and the partition kind {partition.kind}")
    expected, named = file_names(partition), tuple(file.name for file in manifest.files)
    if named != expected:
        _refuse(name, f"it lists {', '.join(named[:4])}, and {partition.kind} of {partition.count} needs {expected[0]}")


def _check_others(manifest: Manifest, name: str) -> None:
    names = [other.name for other in manifest.others]
    if len(set(names)) < len(names):
        _refuse(name, "it lists a file twice")
    wrong = wrong_below(names)
    for other in names:
        if other == wrong or ("/" not in other and not belongs(other)):
            _refuse(name, f"{other} is not a file that belongs to a checkpoint")


def check_agreement(
    manifest: Manifest, folder: Path, files: Sequence[FoundFile], present: Iterable[str], config_digest: str
) -> None:
    """Hold a manifest against the folder that it lies in: headers, sizes and names, no weights.

    Raises:
        CheckpointInvalid: they disagree; the message names the first thing that does.
    """
    name = str(folder / MANIFEST_NAME)
    for record, found in zip(manifest.files, files, strict=True):
        if found.size_bytes != record.size_bytes:
            _refuse(name, f"{record.name} has {found.size_bytes} bytes and should have {record.size_bytes}")
        if found.header_digest != record.header_digest:
            _refuse(
                name, f"the header of {record.name} has digest {found.header_digest} and should have "
                f"{record.header_digest}",
            )  # fmt: skip
    known = {*(file.name for file in manifest.files), *(other.name for other in manifest.others)}
    for extra in sorted(set(present) - known):
        if belongs(extra) or extra.endswith(".safetensors"):
            _refuse(name, f"{extra} is in the folder and not listed")
    _check_below(name, folder, {other.name for other in manifest.others if "/" in other.name})
    for other in manifest.others:
        _check_other(name, folder, other, config_digest)
    _check_tensors(manifest, name, files)


def _check_below(name: str, folder: Path, listed: set[str]) -> None:
    """Compare what is listed below the folder, at most one file, with what modules.json names and is there."""
    try:
        found = find_pooling(folder)
    except OSError as wrong:
        _refuse(name, f"the pooling can't be looked at: {wrong.strerror}")
    if found is not None and found not in listed:
        _refuse(name, f"{found} is in the folder and not listed")
    for other in listed - {found}:
        if (folder / other).is_file():
            _refuse(name, f"{other} is listed, and modules.json does not name it")


def _check_other(name: str, folder: Path, other: OtherRecord, config_digest: str) -> None:
    path = folder / other.name
    try:
        size_bytes = path.stat().st_size if path.is_file() else None
    except OSError as wrong:
        _refuse(name, f"{other.name} can't be looked at: {wrong.strerror}")
    if size_bytes is None:
        _refuse(name, f"{other.name} is listed and missing")
    if size_bytes != other.size_bytes:
        _refuse(name, f"{other.name} has {size_bytes} bytes and should have {other.size_bytes}")
    if other.name == "config.json" and other.digest != config_digest:
        _refuse(name, f"config.json has digest {config_digest} and should have {other.digest}")


def _check_tensors(manifest: Manifest, name: str, files: Sequence[FoundFile]) -> None:
    stored = {tensor for file in files for tensor in file.tensors}
    for alias, target in manifest.aliases.items():
        if alias in stored:
            _refuse(name, f"{alias!r} is both stored and an alias")
        if target not in stored:
            _refuse(name, f"alias {alias!r} stands for {target!r}, which is not stored")
    for tensor, dimension in manifest.partition.split.items():
        shape = files[0].tensors.get(tensor, ("", ()))[1]
        if dimension >= len(shape):
            _refuse(name, f"{tensor!r} is split along dimension {dimension} and has the shape {list(shape)}")
    if manifest.partition.kind is PartitionKind.TENSOR_PARALLEL:
        for file in files[1:]:
            for tensor in sorted(set(file.tensors) ^ set(files[0].tensors)):
                _refuse(name, f"tensor {tensor!r} is not in both {files[0].name} and {file.name}")
            for tensor, described in file.tensors.items():
                if described != files[0].tensors[tensor]:
                    _refuse(
                        name, f"tensor {tensor!r} differs in dtype or shape between {files[0].name} and {file.name}"
                    )


def _refuse(name: str, what: str) -> NoReturn:
    raise CheckpointInvalid(f"{name} disagrees: {what}")
