"""Tensors that are views of device memory which someone else fills: no copy.

`__cuda_array_interface__` (version 3, numba's specification) is what torch takes device memory by, and it knows nothing
of bfloat16 or float8: so memory is handed over as bytes, and torch looks at them as what they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from sllm_actor.errors import InvalidInput


class DeviceMemory(Protocol):
    """Memory on a CUDA device, as the loader's `DeviceBuffer` is."""

    @property
    def address(self) -> int:
        """Its device address."""

    @property
    def size_bytes(self) -> int:
        """How much of it there is."""


class DeviceView:
    """Bytes of device memory for torch, and for all who know the interface. Keeps the memory's owner alive."""

    def __init__(self, memory: DeviceMemory, offset: int, size_bytes: int) -> None:
        if offset < 0 or size_bytes < 0 or offset + size_bytes > memory.size_bytes:
            raise InvalidInput(f"bytes {offset} to {offset + size_bytes} of device memory of {memory.size_bytes}")
        self._memory = memory
        self._offset = offset
        self._size_bytes = size_bytes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        # No stream to wait for: whoever makes a view has waited for its load.
        return {
            "version": 3,
            "shape": (self._size_bytes,),
            "typestr": "|u1",
            "data": (self._memory.address + self._offset, False),
            "strides": None,
            "stream": None,
        }


def tensor_on(memory: DeviceMemory, dtype: torch.dtype, shape: Sequence[int], offset: int) -> torch.Tensor:
    """Return `shape` elements at byte `offset` of device memory as a tensor on its device; a view, not a copy.

    The tensor keeps the Python object of the memory alive, but nobody may close that while the tensor is in use.

    Raises:
        InvalidInput: it would leave the memory, or is not aligned to its elements.
    """
    if offset % dtype.itemsize:
        raise InvalidInput(f"a tensor of {dtype} at byte {offset}, which is no multiple of {dtype.itemsize}")
    view = DeviceView(memory, offset, math.prod(shape) * dtype.itemsize)
    if 0 in shape:
        return torch.empty(tuple(shape), dtype=dtype, device="cuda")  # Nothing has no address.
    return torch.as_tensor(view, device="cuda").view(dtype).view(tuple(shape))
