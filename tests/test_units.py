"""Bytes, seconds, token ids and errors, as people and wires write them."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_actor import errors
from sllm_actor.domain.tokens import pack_uint32, unpack_uint32
from sllm_actor.errors import BY_CODE, FrameInvalid, SllmError, from_code
from sllm_actor.units import (
    GIB,
    KIB,
    MIB,
    TIB,
    format_bytes,
    format_rate,
    format_seconds,
    parse_bytes,
    parse_duration_s,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0), ("1048576", MIB), ("7b", 7), ("4k", 4 * KIB), ("4GiB", 4 * GIB), ("4 gib", 4 * GIB),
        ("1.5GiB", GIB * 3 // 2),
        ("500MB", 500_000_000), ("2kB", 2000), (" 1T ", TIB), ("3TB", 3 * 10**12), ("999999999999999", 999999999999999),
    ],
)  # fmt: skip
def test_a_size_is_read_with_and_without_its_unit(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 30), ("250ms", 0.25), ("5m", 300), ("5 min", 300), ("1.5h", 5400), ("2D", 172800), ("0s", 0)],
)
def test_a_duration_is_read_with_and_without_its_unit(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    ["", " ", "GiB", "-1", "+1", "1e9", "1.2.3", "1..2", ".5", "5.", "4 G i B", "4GiBs", "nan", "inf", "0x10", "1_000",
     "4\n\n\x00", "٣", "1000000000000000", "1,5"],
)  # fmt: skip
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a quantity"):
        parse_bytes(text)
    with pytest.raises(ValueError, match="not a quantity"):
        parse_duration_s(text)


def test_a_size_is_no_duration_and_the_other_way_round() -> None:
    with pytest.raises(ValueError, match="such as 5m"):
        parse_duration_s("4GiB")
    with pytest.raises(ValueError, match="such as 4GiB"):
        parse_bytes("4h")


@given(st.integers(0, 10**15 - 1))
def test_every_number_of_bytes_is_read_exactly(size_bytes: int) -> None:
    assert parse_bytes(str(size_bytes)) == size_bytes


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_a_refusal(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_bytes(text) >= 0


def test_sizes_durations_and_rates_are_written_for_people() -> None:
    assert [format_bytes(size) for size in (0, 999, 2500, 2.6e9, 4e12)] == [
        "0 B",
        "999 B",
        "2.5 kB",
        "2.6 GB",
        "4.0 TB",
    ]
    written = [format_seconds(duration) for duration in (0.00005, 0.0123, 0.183, 2.413, 270)]
    assert written == ["50 µs", "12.3 ms", "183 ms", "2.41 s", "4.5 min"]
    assert format_rate(5e9, 2) == "2.50 GB/s"
    assert format_rate(5e9, 0) == "-"


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_token_ids_come_back_as_they_were_packed(numbers: list[int]) -> None:
    packed = pack_uint32(numbers)
    assert len(packed) == 4 * len(numbers)
    assert list(unpack_uint32(packed)) == numbers


def test_token_ids_are_little_endian_and_nothing_else_is_packed() -> None:
    assert pack_uint32([1, 2**32 - 1]) == b"\x01\0\0\0\xff\xff\xff\xff"
    for number in (-1, 2**32):
        with pytest.raises(OverflowError):
            pack_uint32([number])
    with pytest.raises(FrameInvalid, match="5 bytes"):
        unpack_uint32(b"12345")


def _classes(root: type[SllmError]) -> list[type[SllmError]]:
    return [root, *(found for child in root.__subclasses__() for found in _classes(child))]


def test_every_error_has_a_code_of_its_own_and_stands_in_the_tree_that_the_module_draws() -> None:
    classes = _classes(SllmError)
    assert len({kind.code for kind in classes}) == len(classes) == len(BY_CODE)
    for kind in classes:
        assert f" {kind.__name__}" in (errors.__doc__ or ""), f"{kind.__name__} is not drawn"


def test_an_error_crosses_a_process_border_by_its_code() -> None:
    for kind in _classes(SllmError):
        again = from_code(kind.code, "text", "param")
        assert (type(again), again.message, again.param, str(again)) == (kind, "text", "param", "text")
    assert type(from_code("of a later version", "text")) is SllmError


def test_infinite_and_tiny_durations_are_written_too() -> None:
    assert format_seconds(0.0) == "0 µs"
    assert format_seconds(math.inf) == "inf min"
