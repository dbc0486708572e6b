"""Read the header of a safetensors file, believing nothing.

Pure: bytes in, description out; knows no file system and no tensor library. Refuses whatever the Rust
library refuses, and five things that it lets pass: a key given twice, a header that does not begin with `{`,
a tensor described by anything but an object, a field of a tensor other than the three, and a dtype written as an
object of one key. `scripts/fuzz_header` holds it to that.
Format: https://github.com/huggingface/safetensors, as of its release 0.8.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn

import msgspec

from sllm_actor.errors import CheckpointHeaderInvalid, CheckpointTruncated

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
_MAX_COUNT = 2**64 - 1

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


class Tensor(msgspec.Struct, frozen=True, gc=False):
    """One tensor of a file; `begin` and `end` count bytes from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(msgspec.Struct, frozen=True):
    """What a header says; tensors in the order of their bytes."""

    tensors: tuple[Tensor, ...]
    metadata: dict[str, str]
    data_begin: int


class _Info(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def header_end(prefix: bytes | memoryview, file_size_bytes: int, name: str) -> int:
    """Return how many bytes of the file its header takes, from its first 8 bytes.

    Raises:
        CheckpointTruncated: the file ends before its header does.
        CheckpointHeaderInvalid: the header claims to be longer than any may be.
    """
    if file_size_bytes < LENGTH_BYTES:
        raise CheckpointTruncated(f"{name} has {file_size_bytes} bytes and needs at least {LENGTH_BYTES}")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        _refuse(name, f"it claims {length} bytes and at most {MAX_HEADER_BYTES} are allowed")
    end = LENGTH_BYTES + length
    if end > file_size_bytes:
        raise CheckpointTruncated(f"{name} has {file_size_bytes} bytes and its header alone needs {end}")
    return end


def parse_header(prefix: bytes | memoryview, file_size_bytes: int, name: str = "file") -> Header:
    """Parse a header, given at least the bytes that `header_end` asks for; `name` is for messages.

    Raises:
        CheckpointTruncated: the file ends before its tensors do.
        CheckpointHeaderInvalid: anything else is wrong with it.
    """
    data_begin = header_end(prefix, file_size_bytes, name)
    assert len(prefix) >= data_begin, "the caller reads the whole header"
    entries = _parse_json(bytes(prefix[LENGTH_BYTES:data_begin]), name)
    metadata = _metadata(entries.pop("__metadata__", None), name)
    try:
        infos = msgspec.convert(entries, dict[str, _Info])
    except msgspec.ValidationError as wrong:
        _refuse(name, str(wrong))
    tensors = _lay_out(infos, data_begin, name)
    data_end = tensors[-1].end if tensors else data_begin
    if data_end > file_size_bytes:
        raise CheckpointTruncated(f"{name} has {file_size_bytes} bytes and its tensors need {data_end}")
    if data_end < file_size_bytes:
        _refuse(name, f"its tensors end at byte {data_end} and the file at {file_size_bytes}")
    return Header(tensors=tensors, metadata=metadata, data_begin=data_begin)


def _parse_json(raw: bytes, name: str) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        _refuse(name, "it does not begin with {")
    plain = _parse_plain(raw)
    if plain is not None:
        return plain

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            _refuse(name, f"key {twice!r} is given twice")
        return found

    try:
        # The Rust library reads -0 as a float. Looking at every integer is slow, so only where one may be.
        parsed = json.loads(
            raw.decode("utf-8"), object_pairs_hook=unique, parse_int=_parse_int if b"-0" in raw else None
        )
        if b"\\u" in raw:
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")  # Half of a surrogate pair is no text.
    except UnicodeError:
        _refuse(name, "it is not UTF-8")
    except RecursionError:
        _refuse(name, "it is nested too deeply")
    except ValueError as wrong:
        _refuse(name, f"it is not JSON: {wrong}")
    assert isinstance(parsed, dict), "JSON that begins with { is an object"
    return parsed


def _parse_plain(raw: bytes) -> dict[str, Any] | None:
    """Read JSON that is written in the plainest way, as every library writes it, several times faster.

    What can be encoded again to the very same bytes has no key twice, no odd number and no half of a surrogate
    pair in it. Anything else is left to the slower way, which also knows the reasons.
    """
    text = raw.rstrip(b" ")
    try:
        parsed = msgspec.json.decode(text)
        return parsed if msgspec.json.encode(parsed) == text else None
    except (msgspec.MsgspecError, UnicodeError, RecursionError, ValueError):
        return None


def _parse_int(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)


def _metadata(found: Any, name: str) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        _refuse(name, "__metadata__ must map text to text")
    return found


def _lay_out(infos: dict[str, _Info], data_begin: int, name: str) -> tuple[Tensor, ...]:
    """Order tensors by their bytes, which must follow each other without a hole or an overlap."""
    tensors = []
    expected = 0
    for tensor, info in sorted(infos.items(), key=lambda item: item[1].data_offsets):
        begin, end = info.data_offsets
        if begin != expected:
            kind = "overlaps another" if begin < expected else "leaves a hole before it"
            _refuse(name, f"tensor {tensor!r} at bytes {begin} to {end} {kind}")
        size = _size_bytes(info, tensor, name)
        if end - begin != size:
            _refuse(name, f"tensor {tensor!r} spans {end - begin} bytes, its shape and dtype need {size}")
        tensors.append(Tensor(tensor, info.dtype, tuple(info.shape), data_begin + begin, data_begin + end))
        expected = end
    return tuple(tensors)


def _size_bytes(info: _Info, tensor: str, name: str) -> int:
    bits = DTYPE_BITS.get(info.dtype)
    if bits is None:
        _refuse(name, f"tensor {tensor!r} has the unknown dtype {info.dtype!r}")
    count = 1
    for length in info.shape:
        count *= length
        if not 0 <= length <= _MAX_COUNT or count > _MAX_COUNT:
            _refuse(name, f"tensor {tensor!r} has an impossible shape")
    if count * bits > _MAX_COUNT or count * bits % 8:
        _refuse(name, f"tensor {tensor!r} is not a whole number of bytes, or too many")
    return count * bits // 8


def _refuse(name: str, what: str) -> NoReturn:
    raise CheckpointHeaderInvalid(f"{name} has an invalid safetensors header: {what}")
