"""Builders and readers of converted checkpoints for tests; they owe the comparison to the Rust library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from checkpoints import CONFIG, entry, framed, write_config

rust: Any = safetensors
Described = tuple[str, list[int], bytes]


def stored(folder: Path) -> dict[str, Described]:
    """Every tensor of a folder's files as the Rust library reads it, by name: dtype, shape, bytes; no pads."""
    found: dict[str, Described] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, info in rust.deserialize(path.read_bytes()):
            if not name.startswith("__pad_"):
                assert name not in found
                found[name] = (info["dtype"], list(info["shape"]), bytes(info["data"]))
    return found


def write_tensors(path: Path, tensors: Mapping[str, Described]) -> None:
    """Write a stock safetensors file of these tensors, in this order, without any alignment."""
    header: dict[str, Any] = {}
    data = bytearray()
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = entry(dtype, shape, len(data), len(data) + len(raw))
        data += raw
    path.write_bytes(framed(json.dumps(header, ensure_ascii=False).encode(), bytes(data)))


def stock_folder(folder: Path, *files: Mapping[str, Described], config: Mapping[str, Any] = CONFIG) -> Path:
    """Make a stock folder: one file, or several with their index."""
    folder.mkdir(parents=True)
    write_config(folder, config)
    if len(files) == 1:
        write_tensors(folder / "model.safetensors", files[0])
        return folder
    weight_map: dict[str, str] = {}
    for k, tensors in enumerate(files, start=1):
        name = f"model-{k:05}-of-{len(files):05}.safetensors"
        write_tensors(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def leftovers(folder: Path) -> list[str]:
    """Hidden entries that a conversion may have left beside its target."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
