"""Lay tensors out in a file so that a loader can use them where they lie.

Pure: descriptions in, a header and an order out; knows no file and no tensor library. The grammar of what
comes out, and why no order needs fewer pads, is in docs/checkpoint_format.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from sllm_actor.checkpoint.safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES
from sllm_actor.errors import CheckpointInvalid

DATA_ALIGNMENT_BYTES = 4096
TENSOR_ALIGNMENT_BYTES = 64
_PAD_NAME = re.compile(r"__pad_[0-9]+__")


class Described(msgspec.Struct, frozen=True):
    """A tensor as it is to be stored: what a header says of it, and how many bytes it has."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


class FileLayout(msgspec.Struct, frozen=True):
    """A file to be written: `header` comes first, then each of `tensors`, without a gap; pads are zeros."""

    header: bytes
    tensors: tuple[Described, ...]
    size_bytes: int


def is_pad(name: str) -> bool:
    """Tell whether a tensor of this name only keeps others aligned."""
    return _PAD_NAME.fullmatch(name) is not None


def lay_out(
    tensors: Iterable[Described], metadata: Mapping[str, str] | None = None, *, first_pad: int = 0
) -> FileLayout:
    """Order tensors and pad between them so that each begins on a multiple of 64 bytes, the first on one of 4,096.

    Pads are numbered from `first_pad`: their names are unique over all files of a checkpoint.

    Raises:
        CheckpointInvalid: there are more tensors than a header can name.
    """
    placed = _with_pads(tensors, first_pad)
    header = _header(placed, metadata or {})
    return FileLayout(header, tuple(placed), len(header) + sum(tensor.size_bytes for tensor in placed))


def pad_count(layout: FileLayout) -> int:
    """Count the pads of a file."""
    return sum(is_pad(tensor.name) for tensor in layout.tensors)


def _with_pads(tensors: Iterable[Described], first_pad: int) -> list[Described]:
    whole: list[Described] = []
    broken: list[Described] = []
    for tensor in tensors:
        (broken if tensor.size_bytes % TENSOR_ALIGNMENT_BYTES else whole).append(tensor)
    placed = whole
    for k, tensor in enumerate(broken):
        placed.append(tensor)
        if k < len(broken) - 1:
            size_bytes = -tensor.size_bytes % TENSOR_ALIGNMENT_BYTES
            placed.append(Described(f"__pad_{first_pad + k}__", "U8", (size_bytes,), size_bytes))
    return placed


def _header(placed: Sequence[Described], metadata: Mapping[str, str]) -> bytes:
    described: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for tensor in placed:
        end = at + tensor.size_bytes
        described[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (at, end)}
        at = end
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    total = -(-(LENGTH_BYTES + len(text)) // DATA_ALIGNMENT_BYTES) * DATA_ALIGNMENT_BYTES
    if total - LENGTH_BYTES > MAX_HEADER_BYTES:
        raise CheckpointInvalid(f"{len(placed)} tensors need a header of {total} bytes, more than any may have")
    length = total - LENGTH_BYTES
    return length.to_bytes(LENGTH_BYTES, "little") + text.ljust(length)
