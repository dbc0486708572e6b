"""Builders of checkpoint folders for tests, written byte by byte: they owe nothing to what is tested."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Entry = dict[str, Any]

CONFIG = {"model_type": "opt", "architectures": ["OPTForCausalLM"], "vocab_size": 16}


def entry(dtype: str, shape: Sequence[int], begin: int, end: int) -> Entry:
    """One tensor as a safetensors header describes it."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def framed(header: bytes, data: bytes = b"") -> bytes:
    """A whole safetensors file out of the text of its header and its data."""
    return len(header).to_bytes(8, "little") + header + data


def noise(size_bytes: int, seed: int) -> bytes:
    """Bytes that no two seeds share."""
    return random.Random(seed).randbytes(size_bytes)


def weight_bytes(size_bytes: int, seed: int = 0, name: str = "weight") -> bytes:
    """A valid safetensors file of exactly `size_bytes` (200 at least): one tensor of noise."""
    header_length = 128
    data = noise(size_bytes - 8 - header_length, seed)
    header = json.dumps({name: entry("U8", [len(data)], 0, len(data))}).encode().ljust(header_length)
    assert len(header) == header_length, "the tensor's name is too long"
    return framed(header, data)


def write_config(folder: Path, config: Mapping[str, Any] = CONFIG) -> None:
    """Give `folder` a config.json."""
    (folder / "config.json").write_text(json.dumps(config))


def folder_of(folder: Path, *sizes_bytes: int, seed: int = 0) -> Path:
    """Make `folder` a checkpoint: one file of one size, or a shard of each size with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder)
    if len(sizes_bytes) == 1:
        (folder / "model.safetensors").write_bytes(weight_bytes(sizes_bytes[0], seed))
        return folder
    weight_map = {}
    for k, size_bytes in enumerate(sizes_bytes, start=1):
        name = f"model-{k:05}-of-{len(sizes_bytes):05}.safetensors"
        weight_map[f"weight.{k}"] = name
        (folder / name).write_bytes(weight_bytes(size_bytes, seed + k, f"weight.{k}"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def drop_page_cache(folder: Path) -> None:
    """Let the next read of every file in `folder` go to the device."""
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
