"""A writer of checkpoints as ServerlessLLM's `sllm-store` saves them, byte for byte, for tests.

Follows its `save_dict`, `TensorWriter` and `AlignedBuffer`: storages in the order of the state dict, each once, padded
to 8 bytes with whatever was in the buffer; a new file where one would become longer than `file_bytes`, theirs being
10 GiB.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from checkpoints import CONFIG

Index = dict[str, list[Any]]


def save_dict(tensors: Mapping[str, torch.Tensor], folder: Path, file_bytes: int = 10 * 2**30) -> Path:
    """Write the files of data and their index."""
    folder.mkdir(exist_ok=True)
    files: list[bytearray] = []
    offset = 0
    offsets: dict[int, int] = {}
    index: dict[str, tuple[object, ...]] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in offsets:
            raw = bytes(storage.tolist())
            if not files or len(files[-1]) + len(raw) > file_bytes:
                files.append(bytearray())
            files[-1] += raw + b"\xa5" * (-len(raw) % 8)
            offsets[storage.data_ptr()] = offset
            offset += len(raw) + -len(raw) % 8
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        index[name] = (offsets[storage.data_ptr()], storage.size(), shape, stride, str(tensor.dtype))
    for k, data in enumerate(files):
        (folder / f"tensor.data_{k}").write_bytes(data)
    (folder / "tensor_index.json").write_text(json.dumps(index))
    return folder


def save_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], **options: int) -> Path:
    """Write a checkpoint of these tensors and a config.json."""
    save_dict(tensors, folder, **options)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def save_store_model(model: Any, folder: Path, file_bytes: int) -> Path:
    """Write what `sllm_store.transformers.save_model` does; nothing reads its lists of modules but itself."""
    save_dict(model.cpu().state_dict(), folder, file_bytes)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    (folder / "no_split_modules.json").write_text("{}")
    (folder / "tied_no_split_modules.json").write_text("[]")
    return folder


def change_index(folder: Path, change: Callable[[Index], object]) -> Path:
    """Write another index into a checkpoint; what `change` returns, unless it returns nothing."""
    path = folder / "tensor_index.json"
    index = json.loads(path.read_text())
    changed = change(index)
    path.write_text(changed if isinstance(changed, str) else json.dumps(index))
    return folder
