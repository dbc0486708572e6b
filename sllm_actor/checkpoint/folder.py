"""Describe a checkpoint folder: its weight files, their tensors, its configuration and its manifest.

Reads headers and JSON, never weights. Knows nothing of where the folder came from or who will load it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from sllm_actor.checkpoint import adapter
from sllm_actor.checkpoint.adapter import LoraConfig, is_adapter, read_lora_config
from sllm_actor.checkpoint.bounded import read_bounded
from sllm_actor.checkpoint.digests import DIGEST_BYTES, digest
from sllm_actor.checkpoint.layout import is_pad
from sllm_actor.checkpoint.manifest import FoundFile, Manifest, PartitionKind, check_agreement, read_manifest
from sllm_actor.checkpoint.safetensors_header import LENGTH_BYTES, Header, header_end, parse_header
from sllm_actor.errors import (
    CheckpointConfigInvalid,
    CheckpointEmpty,
    CheckpointHeaderInvalid,
    CheckpointInvalid,
    CheckpointMissing,
    CheckpointTruncated,
    PickleCheckpoint,
)

MAX_CONFIG_BYTES = 1_000_000
MAX_INDEX_BYTES = 100_000_000
MAX_SHARDS = 10_000
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}\.safetensors")
_SHARD_OF_SET = re.compile(r"model-[0-9]{5}-of-([0-9]{5})\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth")
# What ServerlessLLM's sllm-store calls the index of the tensors that it has saved.
STORE_INDEX_NAME = "tensor_index.json"


class WeightFile(msgspec.Struct, frozen=True):
    """One safetensors file as it was found; `mtime_ns` and `inode` tell it from a later one of its name.

    `disk` is the number of the device that it lies on. `digests` has 16 bytes for each `Checkpoint.digest_bytes` of the
    file; nothing where there is no manifest.
    """

    name: str
    size_bytes: int
    mtime_ns: int
    inode: int
    header: Header
    digests: bytes = b""
    disk: int = 0


class Checkpoint(msgspec.Struct, frozen=True):
    """A folder that can be loaded; `fingerprint` tells whether it is still that one, digesting no weights.

    `identity` names its bytes wherever they lie; it is empty for a folder that others may write to. `weights` is the
    folder of the weight files where that is another one. One that has an `adapter` is a LoRA adapter, whose `config` is
    its adapter_config.json.
    """

    path: Path
    files: tuple[WeightFile, ...]
    config: dict[str, Any]
    size_bytes: int
    fingerprint: str
    dtype: str
    architectures: tuple[str, ...]
    manifest: Manifest | None = None
    weights: Path | None = None
    identity: str = ""
    adapter: LoraConfig | None = None

    @property
    def digest_bytes(self) -> int:
        """How many bytes of a file one digest covers; 0 where there are none."""
        return self.manifest.chunk_bytes if self.manifest is not None else 0

    @property
    def aliases(self) -> dict[str, str]:
        """Tensors that are stored under another name, by the name that is not stored."""
        return self.manifest.aliases if self.manifest is not None else {}

    @property
    def ranks(self) -> int:
        """How many tensor-parallel ranks the files are for; 1 where tensors are whole."""
        if self.manifest is None or self.manifest.partition.kind is not PartitionKind.TENSOR_PARALLEL:
            return 1
        return self.manifest.partition.count

    def files_of_rank(self, rank: int) -> tuple[WeightFile, ...]:
        """Return the files that a tensor-parallel rank loads: its own one, or all where tensors are whole."""
        assert 0 <= rank < self.ranks, "ranks are counted from 0"
        return self.files if self.ranks == 1 else (self.files[rank],)

    @property
    def disks(self) -> frozenset[int]:
        """The numbers of the devices that the files lie on."""
        return frozenset(file.disk for file in self.files)

    def file_path(self, file: WeightFile) -> Path:
        """Return where `file` of this checkpoint is."""
        return (self.weights or self.path) / file.name


def read_folder(path: Path) -> Checkpoint:
    """Read what a checkpoint folder holds, or an adapter's, opening every weight file for its header only.

    Raises:
        AdapterInvalid: it is a LoRA adapter, of a kind that is not served.
        CheckpointMissing: no such folder.
        CheckpointEmpty: no weights in it, or in a layout that is converted only; the message says how.
        PickleCheckpoint: its weights are pickled; the message says how to convert them.
        CheckpointTruncated, CheckpointHeaderInvalid: a weight file is damaged.
        CheckpointConfigInvalid: config.json or the index can't be used.
        CheckpointInvalid: sllm.json disagrees with the folder.
    """
    folder = _resolve(path)
    manifest = read_manifest(folder)
    adapts = manifest is None and is_adapter(_entries(folder))
    names, weight_map = (_adapter_names(folder), {}) if adapts else _weight_names(folder, manifest)
    fingerprint = xxhash.xxh3_128()
    files: list[WeightFile] = []
    header_digests: list[str] = []
    for name in names:
        file, header_bytes = _read_weight_file(folder, name)
        for part in (name.encode(), b"%d %d" % (file.size_bytes, file.mtime_ns), header_bytes):
            fingerprint.update(b"%d:" % len(part))
            fingerprint.update(part)
        files.append(file)
        header_digests.append(digest(header_bytes).hex())
    if manifest is None or manifest.partition.kind is not PartitionKind.TENSOR_PARALLEL:
        _check_weight_map(folder, files, weight_map)
    config, config_bytes = read_config(folder, adapter.CONFIG_NAME if adapts else "config.json")
    fingerprint.update(config_bytes)
    if manifest is not None:
        files = _with_digests(folder, manifest, files, header_digests, digest(config_bytes).hex())
        fingerprint.update(manifest.model_id.encode())
    return Checkpoint(
        path=folder,
        files=tuple(files),
        config=config,
        size_bytes=sum(file.size_bytes for file in files),
        fingerprint=fingerprint.hexdigest(),
        dtype=_dominant_dtype(files),
        architectures=() if adapts else _architectures(folder, config),
        manifest=manifest,
        adapter=read_lora_config(config, str(folder / adapter.CONFIG_NAME)) if adapts else None,
    )


def _with_digests(
    folder: Path, manifest: Manifest, files: list[WeightFile], header_digests: list[str], config_digest: str
) -> list[WeightFile]:
    """Hold the manifest against the folder and give each file the digests that it has for it."""
    found = [
        FoundFile(
            file.name, file.size_bytes, header_digest,
            {tensor.name: (tensor.dtype, tensor.shape) for tensor in file.header.tensors if not is_pad(tensor.name)},
        )
        for file, header_digest in zip(files, header_digests, strict=True)
    ]  # fmt: skip
    check_agreement(manifest, folder, found, _entries(folder), config_digest)
    digested = []
    for file, record in zip(files, manifest.files, strict=True):
        raw = bytes.fromhex("".join(record.digests))
        assert len(raw) == len(record.digests) * DIGEST_BYTES, "the manifest has been checked"
        digested.append(msgspec.structs.replace(file, digests=raw))
    return digested


def _resolve(path: Path) -> Path:
    try:
        folder = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as wrong:
        reason = wrong.strerror if isinstance(wrong, OSError) else wrong  # Else the path would be told twice.
        raise CheckpointMissing(f"{path} is not a folder that can be read: {reason}") from None
    if not folder.is_dir():
        raise CheckpointMissing(f"{path} is not a folder")
    return folder


def _weight_names(folder: Path, manifest: Manifest | None) -> tuple[list[str], dict[str, str]]:
    """Return the weight files to read and, where there is an index, which tensor is in which."""
    if manifest is not None:
        index = folder / "model.safetensors.index.json"
        by_layers = manifest.partition.kind is PartitionKind.LAYERS and index.exists()
        return [file.name for file in manifest.files], _read_index(index)[1] if by_layers else {}
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"], {}
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return _read_index(index)
    present = _entries(folder)
    shards = [match for match in map(_SHARD_OF_SET.fullmatch, present) if match]
    if shards:
        return _whole_set(folder, [match.group() for match in shards], int(shards[0].group(1))), {}
    _refuse_store(folder, present)
    pickles = [found.name for pattern in _PICKLES for found in sorted(folder.glob(pattern))]
    if pickles:
        raise PickleCheckpoint(_how_to_convert(folder, pickles[0]))
    raise CheckpointEmpty(f"{folder} has no model.safetensors and no model.safetensors.index.json")


def _adapter_names(folder: Path) -> list[str]:
    if (folder / adapter.WEIGHTS_NAME).exists():
        return [adapter.WEIGHTS_NAME]
    if (folder / adapter.PICKLED_NAME).exists():
        raise PickleCheckpoint(
            f"{folder} has its weights as pickle ({adapter.PICKLED_NAME}), which can run code and is never loaded. "
            "Load it where you trust it with PEFT, and save it with save_pretrained(..., safe_serialization=True)"
        )
    raise CheckpointEmpty(f"{folder} has an {adapter.CONFIG_NAME} and no {adapter.WEIGHTS_NAME}")


def _entries(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as wrong:
        raise CheckpointMissing(f"{folder} can't be listed: {wrong}") from None


def _whole_set(folder: Path, shards: list[str], count: int) -> list[str]:
    """Without an index the shards' own names tell whether the set is whole."""
    expected = [f"model-{k:05}-of-{count:05}.safetensors" for k in range(1, min(count, MAX_SHARDS) + 1)]
    if shards != expected:
        raise CheckpointTruncated(f"{folder} has {len(shards)} of {count} shards and no index to go by")
    return shards


def _refuse_store(folder: Path, present: list[str]) -> None:
    if STORE_INDEX_NAME in present:
        raise CheckpointEmpty(
            f"{folder} has its weights as ServerlessLLM's sllm-store saves them ({STORE_INDEX_NAME}). "
            + _conversion_of(folder)
        )
    if (folder / "rank_0" / STORE_INDEX_NAME).exists():
        raise CheckpointEmpty(
            f"{folder} has tensors that vLLM has fused and ServerlessLLM's sllm-store has saved (rank_0), which can't "
            "be converted; take the checkpoint that it was made from"
        )


def _how_to_convert(folder: Path, pickle: str) -> str:
    return f"{folder} has its weights as pickle ({pickle}), which can run code and is never loaded. " + _conversion_of(
        folder
    )


def _conversion_of(folder: Path) -> str:
    target = folder.with_name(f"{folder.name}-safetensors")
    command = shlex.join(["sllm-node", "convert", str(folder), str(target)])
    return f"Convert it, then register {target}:\n{command}"


def _read_index(index: Path) -> tuple[list[str], dict[str, str]]:
    parsed = read_json(index, MAX_INDEX_BYTES)
    weight_map = parsed.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointConfigInvalid(f"{index} has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise CheckpointConfigInvalid(f"{index} puts tensor {tensor!r} in a file of an impossible name")
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_SHARDS:
        raise CheckpointConfigInvalid(f"{index} names {len(names)} files and at most {MAX_SHARDS} are allowed")
    return names, weight_map


def _read_weight_file(folder: Path, name: str) -> tuple[WeightFile, bytes]:
    path = folder / name
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise CheckpointTruncated(f"{path} is listed and missing") from None
    except OSError as wrong:
        raise CheckpointInvalid(f"{path} can't be opened: {wrong.strerror}") from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointInvalid(f"{path} is not a regular file")
        # Without this a readahead of up to megabytes follows each header.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        end = header_end(_read_exactly(fd, LENGTH_BYTES, path), found.st_size, str(path))
        prefix = _read_exactly(fd, end, path)
    except OSError as wrong:
        raise CheckpointInvalid(f"{path} can't be read: {wrong.strerror}") from None
    finally:
        os.close(fd)
    header = parse_header(prefix, found.st_size, str(path))
    return WeightFile(name, found.st_size, found.st_mtime_ns, found.st_ino, header, disk=found.st_dev), prefix


def _read_exactly(fd: int, length: int, path: Path) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = os.pread(fd, length - len(parts), len(parts))
        if not part:
            raise CheckpointTruncated(f"{path} has {len(parts)} bytes and its header needs {length}")
        parts += part
    return bytes(parts)


def _check_weight_map(folder: Path, files: list[WeightFile], weight_map: dict[str, str]) -> None:
    place: dict[str, str] = {}
    for file in files:
        for tensor in file.header.tensors:
            if tensor.name in place:
                raise CheckpointHeaderInvalid(
                    f"{folder}: tensor {tensor.name!r} is in both {place[tensor.name]} and {file.name}"
                )
            place[tensor.name] = file.name
    for name, shard in weight_map.items():
        if place.get(name) != shard:
            raise CheckpointHeaderInvalid(f"{folder}: the index puts tensor {name!r} in {shard}, it is not there")


def read_config(folder: Path, name: str = "config.json") -> tuple[dict[str, Any], bytes]:
    path = folder / name
    if not path.exists():
        raise CheckpointConfigInvalid(f"{folder} has no {name}")
    raw = read_bounded(path, MAX_CONFIG_BYTES, CheckpointConfigInvalid)
    return _parse_object(path, raw), raw


def _architectures(folder: Path, config: dict[str, Any]) -> tuple[str, ...]:
    found = config.get("architectures") or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise CheckpointConfigInvalid(f"{folder / 'config.json'}: architectures must be a list of names")
    return tuple(found)


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """Read a JSON object of at most `max_bytes`.

    Raises:
        CheckpointConfigInvalid: it is none, longer, or no file.
    """
    return _parse_object(path, read_bounded(path, max_bytes, CheckpointConfigInvalid))


def _parse_object(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as wrong:
        raise CheckpointConfigInvalid(f"{path} is not JSON: {wrong}") from None
    if not isinstance(parsed, dict):
        raise CheckpointConfigInvalid(f"{path} is not a JSON object")
    return parsed


def _dominant_dtype(files: list[WeightFile]) -> str:
    size_bytes: Counter[str] = Counter()
    for file in files:
        for tensor in file.header.tensors:
            if is_pad(tensor.name):
                continue
            size_bytes[tensor.dtype] += tensor.end - tensor.begin
    if not size_bytes:
        raise CheckpointEmpty("the weight files hold no tensors")
    return max(size_bytes, key=lambda dtype: (size_bytes[dtype], dtype))
