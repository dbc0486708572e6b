"""Read the index of a checkpoint that ServerlessLLM's `sllm-store` has saved, believing nothing.

Pure: text and the size of the data in, places of tensors out. The data is a row of files, `tensor.data_0` and on, whose
bytes are counted as if they were one. The format is written down in docs/integrations/serverlessllm.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple, NoReturn

import msgspec

from sllm_actor.checkpoint.layout import is_pad
from sllm_actor.errors import CheckpointHeaderInvalid, CheckpointTruncated

MAX_TENSORS = 1_000_000
# One tensor that is not contiguous is put in order in memory.
MAX_STRIDED_BYTES = 4 * 2**30
MAX_STRIDED_ROWS = 2**24
_MAX_COUNT = 2**53

DTYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2", "torch.float8_e4m3fnuz": "F8_E4M3FNUZ",
    "torch.float8_e5m2fnuz": "F8_E5M2FNUZ", "torch.float8_e8m0fnu": "F8_E8M0", "torch.complex64": "C64",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8",
    "torch.uint64": "U64", "torch.uint32": "U32", "torch.uint16": "U16", "torch.uint8": "U8", "torch.bool": "BOOL",
}  # fmt: skip
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1, "C64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

_Count = Annotated[int, msgspec.Meta(ge=0, le=_MAX_COUNT)]
_Counts = Annotated[tuple[_Count, ...], msgspec.Meta(max_length=64)]
# Offset and size of the storage in bytes, then shape and strides in elements, and the dtype's name.
_Row = tuple[_Count, _Count, _Counts, _Counts, str]


class StoredTensor(NamedTuple):
    """A tensor and the storage that it shows; `strides` count elements, and are empty where it is contiguous."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    begin: int
    stored_bytes: int

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return ITEM_BYTES[self.dtype]

    @property
    def steps(self) -> list[tuple[int, int]]:
        """Length and stride of each dimension that has more than one element; one at least."""
        dimensions = zip(self.shape, self.strides, strict=True)
        return [(length, stride) for length, stride in dimensions if length > 1] or [(1, 0)]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor laid out contiguously."""
        return math.prod(self.shape) * self.item_bytes


def parse_index(raw: bytes, data_bytes: int, name: str) -> tuple[list[StoredTensor], dict[str, str]]:
    """Return the tensors to store, in the order of their bytes, and other names for the same ones.

    Raises:
        CheckpointTruncated: the data ends before a tensor does.
        CheckpointHeaderInvalid: anything else is wrong with it.
    """
    tensors = [_tensor(key, row, name) for key, row in _rows(raw, name).items()]
    if len(tensors) > MAX_TENSORS:
        _refuse(name, f"it has {len(tensors)} tensors and at most {MAX_TENSORS} are allowed")
    tensors.sort(key=lambda tensor: tensor.begin)
    _check_places(tensors, data_bytes, name)
    return _without_aliases(tensors)


def _rows(raw: bytes, name: str) -> dict[str, _Row]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            _refuse(name, "a key is given twice")
        return found

    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
        json.dumps(parsed, ensure_ascii=False).encode("utf-8")  # Half of a surrogate pair is no text.
        return msgspec.convert(parsed, dict[str, _Row])
    except UnicodeError:
        _refuse(name, "it is not UTF-8")
    except RecursionError:
        _refuse(name, "it is nested too deeply")
    except msgspec.ValidationError as wrong:
        _refuse(name, str(wrong))
    except ValueError as wrong:
        _refuse(name, f"it is not JSON: {wrong}")


def _tensor(key: str, row: _Row, name: str) -> StoredTensor:
    begin, stored_bytes, shape, strides, torch_dtype = row
    dtype = DTYPES.get(torch_dtype)
    if dtype is None:
        _refuse(name, f"tensor {key!r} has the unknown dtype {torch_dtype!r}")
    if is_pad(key):
        _refuse(name, f"tensor {key!r} has a name that only pads may have")
    if len(shape) != len(strides):
        _refuse(name, f"tensor {key!r} has {len(shape)} dimensions and {len(strides)} strides")
    strides = () if strides == _contiguous(shape, strides) else strides
    tensor = StoredTensor(key, dtype, shape, strides, begin, stored_bytes)
    if tensor.size_bytes > _MAX_COUNT:
        _refuse(name, f"tensor {key!r} has an impossible shape")
    if strides and max(stored_bytes, tensor.size_bytes) > MAX_STRIDED_BYTES:
        _refuse(name, f"tensor {key!r} is not contiguous and larger than {MAX_STRIDED_BYTES} bytes")
    if strides and math.prod(length for length, _ in tensor.steps[:-1]) > MAX_STRIDED_ROWS:
        _refuse(name, f"tensor {key!r} is not contiguous and has more than {MAX_STRIDED_ROWS} rows")
    _check_reach(tensor, row[3], name)
    return tensor


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Give the strides that a contiguous tensor has; those of a dimension of one element may be any."""
    if 0 in shape:
        return strides
    expected: list[int] = []
    step = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        expected.append(stride if length == 1 else step)
        step *= length
    return tuple(reversed(expected))


def _check_reach(tensor: StoredTensor, strides: tuple[int, ...], name: str) -> None:
    """Refuse a tensor that is not all of its storage: the format does not say where in it a view begins."""
    if 0 in tensor.shape:
        return
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, strides, strict=True))
    reach_bytes = (last + 1) * tensor.item_bytes
    if reach_bytes > tensor.stored_bytes:
        _refuse(name, f"tensor {tensor.name!r} needs {reach_bytes} bytes and has {tensor.stored_bytes}")
    if reach_bytes < tensor.stored_bytes:
        _refuse(
            name,
            f"tensor {tensor.name!r} shows {reach_bytes} of the {tensor.stored_bytes} bytes of its storage, and the "
            "format does not say which",
        )


def _check_places(tensors: Iterable[StoredTensor], data_bytes: int, name: str) -> None:
    """Storages may be shared as a whole; what overlaps otherwise is refused."""
    begin, end = 0, 0
    for tensor in tensors:
        if tensor.begin + tensor.stored_bytes > data_bytes:
            raise CheckpointTruncated(
                f"{name}: tensor {tensor.name!r} ends at byte {tensor.begin + tensor.stored_bytes} and the data at "
                f"{data_bytes}"
            )
        if not tensor.stored_bytes or (tensor.begin, tensor.begin + tensor.stored_bytes) == (begin, end):
            continue
        if tensor.begin < end:
            _refuse(name, f"tensor {tensor.name!r} overlaps another")
        begin, end = tensor.begin, tensor.begin + tensor.stored_bytes


def _without_aliases(tensors: Iterable[StoredTensor]) -> tuple[list[StoredTensor], dict[str, str]]:
    kept: list[StoredTensor] = []
    aliases: dict[str, str] = {}
    by_view: dict[tuple[object, ...], str] = {}
    for tensor in tensors:
        stored = by_view.setdefault(tensor[1:], tensor.name) if tensor.size_bytes else tensor.name
        if stored != tensor.name:
            aliases[tensor.name] = stored
        else:
            kept.append(tensor)
    return kept, aliases


def _refuse(name: str, what: str) -> NoReturn:
    raise CheckpointHeaderInvalid(f"{name} is no index of a checkpoint that can be converted: {what}")
