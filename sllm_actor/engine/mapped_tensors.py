"""Tensors of torch where the files of a checkpoint are mapped. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sllm_actor.checkpoint.safetensors_header import Tensor, parse_header
from sllm_actor.messages.engine import PooledFile

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
# What our own engine serves nothing of, and others do.
VIEWED_DTYPES = DTYPES | {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip


class MappedTensors:
    """Tensors where their file is mapped; copies only what lies unaligned.

    The file is handed to torch once for each dtype, and a tensor is a stride over that: of a model with thousands of
    tensors the hand-over of each would be the largest part of its start.
    """

    def __init__(self, data: memoryview) -> None:
        self._data = data
        # By the name of a dtype: torch's, the bytes of one element, and the whole file as such elements.
        self._flat: dict[str, tuple[torch.dtype, int, torch.Tensor]] = {}
        # A model has few shapes.
        self._strides: dict[tuple[int, ...], list[int]] = {}

    def view(self, tensor: Tensor) -> torch.Tensor:
        """Look at a tensor's bytes; all views of one file share its memory."""
        dtype, itemsize, flat = self._flat.get(tensor.dtype) or self._hand_over(tensor.dtype)
        shape, begin = tensor.shape, tensor.begin
        if begin == tensor.end:
            return torch.empty(shape, dtype=dtype)
        if begin % itemsize:
            return torch.frombuffer(bytearray(self._data[begin : tensor.end]), dtype=dtype).view(shape)
        strides = self._strides.get(shape)
        if strides is None:
            strides = self._strides[shape] = _strides(shape)
        return torch.as_strided(flat, shape, strides, begin // itemsize)

    def _hand_over(self, name: str) -> tuple[torch.dtype, int, torch.Tensor]:
        dtype = VIEWED_DTYPES[name]
        flat = torch.frombuffer(self._data, dtype=dtype, count=len(self._data) // dtype.itemsize)
        self._flat[name] = dtype, dtype.itemsize, flat
        return self._flat[name]


def _strides(shape: tuple[int, ...]) -> list[int]:
    strides = [1] * len(shape)
    for k in range(len(shape) - 1, 0, -1):
        strides[k - 1] = strides[k] * shape[k]
    return strides


def tensors_of(
    files: Sequence[PooledFile], mapped: Mapping[str, memoryview]
) -> tuple[list[Tensor], dict[str, MappedTensors]]:
    """Read the headers of mapped files: their tensors, and for each name where it lies."""
    owner: dict[str, MappedTensors] = {}
    tensors: list[Tensor] = []
    for file in files:
        data = mapped[file.name]
        header = parse_header(data, file.size_bytes, name=file.name)
        tensors += header.tensors
        owner |= dict.fromkeys((tensor.name for tensor in header.tensors), MappedTensors(data))
    return tensors, owner
