"""Weights of eight and of four bits, multiplied where a checkpoint of bitsandbytes has them.

Eight bits are multiplied as they lie, four are unpacked a part of a layer at a time. The layouts are those of
LLM.int8() and QLoRA (Dettmers et al., 2022 and 2023). The tensors of a checkpoint say which layers have them.
Activations are not quantized.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sllm_actor.checkpoint.safetensors_header import Tensor
from sllm_actor.engine import four_bits
from sllm_actor.errors import CheckpointInvalid, UnsupportedArchitecture

# A part's name in a layer here -> what follows the layer's name in a checkpoint, where that is another name. The state
# of four bits has the name of its type behind it.
_STORED = {
    "absmax": "weight.absmax", "quant_map": "weight.quant_map", "quant_state": "weight.quant_state.bitsandbytes__",
    "nested_absmax": "weight.nested_absmax", "nested_quant_map": "weight.nested_quant_map",
}  # fmt: skip
_STATE = f".{_STORED['quant_state']}"
_DTYPES = {"F32": torch.float32, "U8": torch.uint8, "I8": torch.int8}
MAX_STATE_BYTES = 4096
# Unpacked so many bytes at a time, a layer stays in the processor's caches and comes from memory that is mapped
# already: a whole one is mapped and faulted in anew at every step, which takes four times as long (4096 x 4096).
_UNPACKED_BYTES = 8 * 1024 * 1024
_BLOCKS = frozenset(2**power for power in range(5, 13))
# What bitsandbytes' int8 stands for: 127 is the largest of its row.
_LARGEST_INT8 = 127.0
# torch's product of int8 asks for multiples of these, and does not look: it reads whole registers, and ends the process
# or computes nonsense where they are not whole.
_WIDTH, _HEIGHT = 32, 4
WEIGHT_ALIGNMENT_BYTES, ROWS_ALIGNMENT_BYTES = 16, 64
# How rows may lie in an 8-bit weight; those of other numbers are for GPUs of one kind.
_ROW_BY_ROW = 0


def inner_name(stored: str) -> str:
    """Say how a tensor of a checkpoint is called in a model of `place`; others keep their names."""
    for inner, tail in _STORED.items():
        if inner != "quant_state" and stored.endswith(f".{tail}"):
            return stored.removesuffix(tail) + inner
    stem, found, kind = stored.partition(_STATE)
    return f"{stem}.quant_state" if found and kind in four_bits.KINDS else stored


class QuantizedLinear(nn.Module):  # type: ignore[misc]
    """A linear layer that is `[out, in]`, whatever the one that it stands for has. Without storage at first."""

    weight: torch.Tensor

    def __init__(self, layer: nn.Linear | Conv1D, name: str, stored: Mapping[str, Tensor]) -> None:
        super().__init__()
        shape = tuple(layer.weight.shape)
        self.out_features, self.in_features = shape if isinstance(layer, nn.Linear) else (shape[1], shape[0])
        self.bias = layer.bias
        self.layer_name = name
        self.expect(stored)

    @abstractmethod
    def expect(self, stored: Mapping[str, Tensor]) -> None:
        """Make a place for each part; `stored` has them by the names that they have here."""

    @abstractmethod
    def settle(self) -> None:
        """Read the parts that are no weights, once all have their storage."""

    @abstractmethod
    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """`[tokens, in]` of any floating type to `[tokens, out]`, fp32."""

    def multiply_parts(self, rows: torch.Tensor, step: int, unpack: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
        """Multiply with some rows of the weight after others, a number of them that `step` divides.

        `unpack(begin, end)` gives those rows: `[end - begin, in]`, fp32.
        """
        rows = rows.float()
        found = rows.new_empty(rows.shape[0], self.out_features)
        length = max(step, _UNPACKED_BYTES // (4 * self.in_features) // step * step)
        for begin in range(0, self.out_features, length):
            end = min(begin + length, self.out_features)
            found[:, begin:end] = linear(rows, unpack(begin, end))
        return found

    def expect_part(self, part: str, dtype: str, shape: tuple[int, ...], stored: Mapping[str, Tensor]) -> None:
        found = stored.get(part)
        if found is None:
            raise CheckpointInvalid(f"the checkpoint lacks {_STORED.get(part, part)} of {self.layer_name}")
        if found.dtype != dtype or tuple(found.shape) != shape:
            raise CheckpointInvalid(
                f"the tensor {found.name} is {found.dtype} {list(found.shape)}, its layer implies {dtype} {list(shape)}"
            )
        self.register_buffer(part, torch.empty(shape, dtype=_DTYPES[dtype], device="meta"))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Multiply `[..., in]`; the answer has the type of `hidden`."""
        found = self.multiply(hidden.reshape(-1, self.in_features))
        if self.bias is not None:
            found += self.bias
        return found.to(hidden.dtype).view(*hidden.shape[:-1], self.out_features)


class EightBit(QuantizedLinear):
    """A weight of int8 and a scale for each row. Activations are taken in bf16: more than the 8 bits of LLM.int8()."""

    def expect(self, stored: Mapping[str, Tensor]) -> None:
        self.expect_part("weight", "I8", (self.out_features, self.in_features), stored)
        self.expect_part("SCB", "F32", (self.out_features,), stored)
        if "weight_format" in stored:
            self.expect_part("weight_format", "U8", (), stored)

    def settle(self) -> None:
        if "weight_format" in self._buffers and int(self.weight_format) != _ROW_BY_ROW:
            raise UnsupportedArchitecture(f"{self.layer_name}: its 8-bit rows lie as one kind of GPU reads them")
        self._scales = self.SCB / _LARGEST_INT8
        self._ones = torch.ones(self.out_features, dtype=torch.bfloat16)
        self._in_place = not self.in_features % _WIDTH and not self.out_features % _HEIGHT
        if self._in_place:
            self.weight = _aligned(self.weight, WEIGHT_ALIGNMENT_BYTES)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        if not self._in_place:
            return self.multiply_parts(rows, 1, lambda begin, end: self.weight[begin:end].float()) * self._scales
        # The operator would round the scales to bf16, an error that a whole row of a layer shares: so it has ones.
        aligned = _aligned(rows.to(torch.bfloat16), ROWS_ALIGNMENT_BYTES)
        found = torch._weight_int8pack_mm(aligned, self.weight, self._ones)
        return found.float() * self._scales


def _aligned(rows: torch.Tensor, to_bytes: int) -> torch.Tensor:
    rows = rows.contiguous()
    return rows.clone() if rows.data_ptr() % to_bytes else rows


class FourBit(QuantizedLinear):
    """A weight of two numbers a byte and a scale for each block of them; the scales may be of 8 bits themselves."""

    def expect(self, stored: Mapping[str, Tensor]) -> None:
        self._count = self.out_features * self.in_features
        state, scales = stored.get("quant_state"), stored.get("absmax")
        if state is None or scales is None or not scales.shape:
            raise CheckpointInvalid(f"the checkpoint lacks the state or the scales of {self.layer_name}")
        if len(state.shape) != 1 or not 0 < state.shape[0] <= MAX_STATE_BYTES:
            raise CheckpointInvalid(f"the tensor {state.name} is {list(state.shape)}, no text of a bounded length")
        self._kind = state.name.rpartition("__")[2]
        blocks = scales.shape[0]
        self._block = next((size for size in sorted(_BLOCKS) if -(-self._count // size) == blocks), 0)
        if not self._block:
            raise CheckpointInvalid(f"the tensor {scales.name} has {blocks} scales for {self._count} numbers")
        self._nested = scales.dtype == "U8"
        self.expect_part("weight", "U8", (-(-self._count // 2), 1), stored)
        self.expect_part("absmax", "U8" if self._nested else "F32", (blocks,), stored)
        self.expect_part("quant_map", "F32", (16,), stored)
        self.expect_part("quant_state", "U8", tuple(state.shape), stored)
        if self._nested:
            self.expect_part("nested_absmax", "F32", (-(-blocks // four_bits.NESTED_BLOCK),), stored)
            self.expect_part("nested_quant_map", "F32", (256,), stored)

    def settle(self) -> None:
        state = four_bits.read_state(bytes(self.quant_state.tolist()), self.layer_name)
        wanted = (self._kind, (self.out_features, self.in_features))
        found = (state.quant_type, state.shape)
        blocks = -(-self._count // state.blocksize)
        nested = state.nested_blocksize == four_bits.NESTED_BLOCK if self._nested else state.nested_blocksize is None
        if found != wanted or state.blocksize not in _BLOCKS or blocks != self.absmax.shape[0] or not nested:
            raise CheckpointInvalid(f"the quantization state of {self.layer_name} is of another layer: {state}")
        if not torch.allclose(self.quant_map, four_bits.numbers(self._kind), atol=1e-6):
            raise UnsupportedArchitecture(f"the numbers of {self.layer_name} are not those of {self._kind}")
        self._block = state.blocksize
        self._offset = state.nested_offset or 0.0

    def _scales(self) -> torch.Tensor:
        if not self._nested:
            scales: torch.Tensor = self.absmax
            return scales
        return four_bits.unpack_scales(self.absmax, self.nested_absmax, self.nested_quant_map) + self._offset

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        scales, width, block = self._scales(), self.in_features, self._block

        def unpack(begin: int, end: int) -> torch.Tensor:
            packed = self.weight[begin * width // 2 : -(-end * width // 2)]
            some = scales[begin * width // block : -(-end * width // block)]
            return four_bits.unpack(packed, some, block, self._kind, (end - begin, width))

        # A part begins where a block of numbers does.
        return self.multiply_parts(rows, block // math.gcd(block, width), unpack)


def place(
    model: PreTrainedModel, bits: int, stored: Mapping[str, Tensor], names: Callable[[str], Iterator[str]]
) -> None:
    """Put a layer for quantized weights wherever `stored` has one; `names` says what a stored name may be called here.

    Raises:
        CheckpointInvalid: a part is missing or has another shape than its layer implies, or no layer is quantized.
        UnsupportedArchitecture: what is quantized is no linear layer.
    """
    layers: dict[str, Any] = dict(model.named_modules())
    parts: dict[str, dict[str, Tensor]] = {}
    for known, tensor in stored.items():
        stem, _, part = inner_name(known).rpartition(".")
        parts.setdefault(stem, {})[part] = tensor
    mark, chosen = ("quant_state", FourBit) if bits == 4 else ("SCB", EightBit)
    quantized = [stem for stem, of_layer in parts.items() if mark in of_layer]
    if not quantized:
        raise CheckpointInvalid(f"config.json names weights of {bits} bits, and no tensor of the checkpoint is one")
    for stem in quantized:
        name = next((name for name in names(stem) if name in layers), stem)
        layer = layers.get(name)
        if isinstance(layer, nn.Linear | Conv1D):
            model.set_submodule(name, chosen(layer, name, parts[stem]))
        elif not isinstance(layer, QuantizedLinear):
            raise UnsupportedArchitecture(f"{stem} is quantized, and is no linear layer of {type(model).__name__}")


def settle(model: PreTrainedModel) -> None:
    """Make the quantized layers of a model ready, once its weights are in place.

    Raises:
        CheckpointInvalid, UnsupportedArchitecture: what a checkpoint says of a layer is not so.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.settle()
