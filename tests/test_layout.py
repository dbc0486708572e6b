"""The layout of a file: alignment, order, and no pad too many."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_actor.checkpoint.layout import DATA_ALIGNMENT_BYTES, Described, FileLayout, is_pad, lay_out, pad_count
from sllm_actor.checkpoint.safetensors_header import DTYPE_BITS, parse_header
from sllm_actor.errors import CheckpointInvalid

rust: Any = safetensors
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).filter(
    lambda name: name != "__metadata__" and not is_pad(name)
)


def described(name: str, size_bytes: int) -> Described:
    return Described(name, "U8", (size_bytes,), size_bytes)


def file_of(layout: FileLayout) -> bytes:
    return layout.header + bytes(layout.size_bytes - len(layout.header))


TENSORS = st.lists(
    st.builds(described, NAMES, st.one_of(st.integers(0, 300), st.sampled_from([0, 64, 128, 4096]))),
    max_size=30,
    unique_by=lambda tensor: tensor.name,
)


@settings(max_examples=400, deadline=None)
@given(TENSORS, st.integers(0, 9))
def test_every_tensor_begins_on_64_bytes_and_the_first_on_4096(tensors: list[Described], first_pad: int) -> None:
    layout = lay_out(tensors, {"format": "pt"}, first_pad=first_pad)
    header = parse_header(layout.header, layout.size_bytes)
    assert header.data_begin == len(layout.header) and header.data_begin % DATA_ALIGNMENT_BYTES == 0
    stored = [tensor for tensor in header.tensors if not is_pad(tensor.name)]
    assert all(tensor.begin % 64 == 0 for tensor in stored)
    assert {tensor.name: tensor.end - tensor.begin for tensor in stored} == {t.name: t.size_bytes for t in tensors}
    pads = [tensor for tensor in layout.tensors if is_pad(tensor.name)]
    assert [pad.name for pad in pads] == [f"__pad_{first_pad + k}__" for k in range(len(pads))]
    assert all(0 < pad.size_bytes < 64 and pad.dtype == "U8" for pad in pads)
    assert not layout.tensors or not is_pad(layout.tensors[-1].name)


@settings(max_examples=300, deadline=None)
@given(TENSORS)
def test_tensors_of_whole_64_bytes_come_first_and_both_groups_keep_their_order(tensors: list[Described]) -> None:
    stored = [tensor for tensor in lay_out(tensors).tensors if not is_pad(tensor.name)]
    whole = [tensor for tensor in tensors if tensor.size_bytes % 64 == 0]
    assert stored == whole + [tensor for tensor in tensors if tensor.size_bytes % 64]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 200), max_size=6))
def test_no_order_needs_fewer_pads(sizes_bytes: list[int]) -> None:
    def pads_of(order: tuple[int, ...]) -> int:
        return sum(size % 64 != 0 for size in order[:-1])

    fewest = min(map(pads_of, itertools.permutations(sizes_bytes)))
    assert pad_count(lay_out(described(f"t{k}", size) for k, size in enumerate(sizes_bytes))) == fewest


@settings(max_examples=200, deadline=None)
@given(TENSORS)
def test_the_rust_library_reads_what_is_laid_out(tensors: list[Described]) -> None:
    layout = lay_out(tensors, {"format": "pt"})
    found = {name: (info["dtype"], info["shape"]) for name, info in rust.deserialize(file_of(layout))}
    assert found == {tensor.name: (tensor.dtype, list(tensor.shape)) for tensor in layout.tensors}


def test_the_same_tensors_give_the_same_header_whatever_the_order_of_the_metadata() -> None:
    tensors = [described("a", 3), described("b", 64)]
    assert lay_out(tensors, {"x": "1", "a": "2"}).header == lay_out(tensors, {"a": "2", "x": "1"}).header


def test_more_tensors_than_a_header_can_name_are_refused() -> None:
    with pytest.raises(CheckpointInvalid, match="more than any may have"):
        lay_out(described(f"{k:01000}", 0) for k in range(100_000))


@pytest.mark.parametrize(
    ("name", "expected"), [("__pad_0__", True), ("__pad_12__", True), ("__pad_x__", False), ("pad", False)]
)
def test_pads_are_told_by_their_names(name: str, expected: bool) -> None:
    assert is_pad(name) is expected


def test_every_dtype_can_be_laid_out() -> None:
    tensors = [Described(dtype, dtype, (8,), DTYPE_BITS[dtype]) for dtype in sorted(DTYPE_BITS)]
    layout = lay_out(tensors)
    assert len(parse_header(layout.header, layout.size_bytes).tensors) == len(DTYPE_BITS) + pad_count(layout)
