"""The safetensors library, written in Rust, as the oracle of our header parser; and in what we are stricter."""

from __future__ import annotations

import functools
import json
import os
from typing import Any

import safetensors
from checkpoints import framed

from sllm_actor.checkpoint.safetensors_header import LENGTH_BYTES, parse_header
from sllm_actor.errors import CheckpointInvalid

rust: Any = safetensors

Contents = tuple[dict[str, tuple[str, list[int], bytes]], dict[str, str]]
"""Tensors by name, each with its bytes; and the metadata."""

_FIELDS = ("dtype", "shape", "data_offsets")
# As the parser's docstring says. That a refusal for one of these is just is seen by mending the header.
STRICTER = (
    "is given twice",
    "does not begin with {",
    "unknown field",
    "Expected `object`, got `array`",
    "Expected `str`, got `object`",
)


@functools.cache
def _file() -> int:
    return os.memfd_create("header-oracle")


def by_rust(raw: bytes) -> Contents | None:
    """What the library finds in a whole file, or None where it refuses it."""
    try:
        found = rust.deserialize(raw)
    except rust.SafetensorError:
        return None
    # It tells the metadata only of a file that has a name.
    os.ftruncate(_file(), 0)
    os.pwrite(_file(), raw, 0)
    with rust.safe_open(f"/proc/self/fd/{_file()}", framework="np") as opened:
        metadata = opened.metadata() or {}
    return {name: (info["dtype"], list(info["shape"]), bytes(info["data"])) for name, info in found}, metadata


def by_us(raw: bytes) -> tuple[Contents | None, str]:
    """What our parser finds in a whole file, or None and the reason why it refuses it."""
    try:
        header = parse_header(raw, len(raw))
    except CheckpointInvalid as refused:
        return None, refused.message
    tensors = {t.name: (t.dtype, list(t.shape), raw[t.begin : t.end]) for t in header.tensors}
    assert len(tensors) == len(header.tensors)
    return (tensors, header.metadata), ""


def differ(raw: bytes) -> str:
    """Say in what the two differ over a file; nothing where they agree, or where we are stricter as we say we are."""
    expected, (found, reason) = by_rust(raw), by_us(raw)
    if found == expected:
        return ""
    if found is None and expected is not None and any(known in reason for known in STRICTER):
        mended = _mended(raw)
        again, reason_again = by_us(mended)
        if again == expected:
            return ""
        return f"refused for what it is not: {reason}; mended to {mended!r}: {again} {reason_again}, Rust {expected}"
    return f"{raw!r}: ours {found} {reason}, Rust {expected}"


def _mended(raw: bytes) -> bytes:
    """Write anew, without what we are stricter in, a file that the library accepts."""
    end = LENGTH_BYTES + int.from_bytes(raw[:LENGTH_BYTES], "little")
    described = json.loads(raw[LENGTH_BYTES:end])
    for name, info in described.items():
        if name == "__metadata__":
            continue
        kept = dict(zip(_FIELDS, info, strict=True)) if isinstance(info, list) else {key: info[key] for key in _FIELDS}
        if isinstance(kept["dtype"], dict):
            (kept["dtype"],) = kept["dtype"]
        described[name] = kept
    return framed(json.dumps(described).encode(), raw[end:])
