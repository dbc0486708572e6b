"""Numbers of four bits and their scales, unpacked by bitsandbytes where it is installed.

Knows nothing of models. Imports the library in a way that compiles, fetches and touches nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import msgspec
import torch

from sllm_actor.errors import CheckpointInvalid

LIBRARY = "bitsandbytes"
KINDS = frozenset({"nf4", "fp4"})
# How many scales share one of their own, where they are bytes.
NESTED_BLOCK = 256
Size = Annotated[int, msgspec.Meta(gt=0, lt=2**31)]


class State(msgspec.Struct, frozen=True):
    """What bitsandbytes writes beside a weight; the type that it once had is of no use here."""

    quant_type: Literal["nf4", "fp4"]
    blocksize: Size
    shape: tuple[Size, Size]
    nested_blocksize: Size | None = None
    nested_offset: float | None = None


def read_state(text: bytes, layer: str) -> State:
    """Read the JSON of a layer's state.

    Raises:
        CheckpointInvalid: it is none, or says what no state does.
    """
    try:
        return msgspec.json.decode(text, type=State)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointInvalid(f"the quantization state of {layer} can't be read: {error}") from None


def load() -> bool:
    """Import the library, if it is installed, and tell whether it can be used.

    Called before the first fork, for all that come of it: later it only tells.
    """
    if LIBRARY not in sys.modules:
        if importlib.util.find_spec(LIBRARY) is None:
            return False
        logging.getLogger(LIBRARY).setLevel(logging.ERROR)
        with _nothing_else():
            importlib.import_module(LIBRARY)
    return all(hasattr(torch.ops.bitsandbytes, name) for name in ("dequantize_4bit", "dequantize_blockwise"))


@contextmanager
def _nothing_else() -> Iterator[None]:
    """Keep from the import what it would do beside: prepare compilers, open GPUs, fetch kernels from the Hub.

    It would wrap functions in `torch.compile`, which takes 3 s and 110 MB, and compiles in the middle of an answer. It
    would ask the CUDA driver for its devices, and a process that did so can't fork others that use them.
    """
    compiler, asked, kernels = torch.compile, torch.cuda.is_available, sys.modules.get("kernels")
    try:
        torch.compile, torch.cuda.is_available = _as_it_is, lambda: False
        sys.modules["kernels"] = None  # type: ignore[assignment]  # An import of it fails as if it were not there.
        yield
    finally:
        torch.compile, torch.cuda.is_available = compiler, asked
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels


def _as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    return function if function is not None else _as_it_is


def numbers(kind: str) -> torch.Tensor:
    """Give the sixteen numbers that four bits stand for. `[16]`, fp32."""
    found: torch.Tensor = importlib.import_module(f"{LIBRARY}.functional").get_4bit_type(kind, device="cpu")
    return found


def unpack(packed: torch.Tensor, scales: torch.Tensor, block: int, kind: str, shape: tuple[int, int]) -> torch.Tensor:
    """Unpack rows of a weight: two numbers a byte, a scale for `block` of them. `shape`, fp32."""
    # Where a processor has AVX-512 the library takes each row for one that begins with a block of its own.
    laid_out = shape if shape[1] % block == 0 else (shape[0] * shape[1],)
    found: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(packed, scales, block, kind, laid_out, torch.float32)
    return found.view(shape)


def unpack_scales(scales: torch.Tensor, nested: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Unpack scales that are bytes, each a place in `values`, with a scale of their own for 256. fp32."""
    found: torch.Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
        scales, nested, values, NESTED_BLOCK, torch.float32
    )
    return found
