"""Our own XXH3 against the reference implementation, in every width of its loop that this machine offers."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from typing import Any

import pytest
import xxhash
from checkpoints import noise
from compiled import shared_library
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_actor.loader import native
from sllm_actor.units import KIB, MIB

BLOCK = KIB
LONGEST = 2 * MIB
Digest = Callable[[int, int], bytes]
"""Digest of so many bytes at an address."""


def as_function(function: Any, *first: int) -> Digest:
    function.argtypes = (*[ctypes.c_int] * len(first), ctypes.c_void_p, ctypes.c_uint64, ctypes.c_char_p)
    function.restype = None

    def digest(address: int, length: int) -> bytes:
        out = ctypes.create_string_buffer(16)
        function(*first, address, length, out)
        return out.raw

    return digest


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Digest]:
    made = shared_library(tmp_path_factory.mktemp("xxh3"), "xxh3", "src/xxh3.cc", "tests/xxh3_exports.cc")
    library = ctypes.CDLL(str(made))
    found = {"chosen": as_function(library.xxh3_digest)}
    for width, name in enumerate(("portable", "avx2", "avx512")):
        if library.xxh3_offers(width):
            found[name] = as_function(library.xxh3_digest_by, width)
    return found


class Bytes:
    """Noise at addresses of the test's choice."""

    def __init__(self) -> None:
        self.raw = noise(LONGEST + 64, seed=7)
        self._held = (ctypes.c_char * (len(self.raw) + 64)).from_buffer_copy(self.raw + bytes(64))
        self._begin = -(-ctypes.addressof(self._held) // 64) * 64
        ctypes.memmove(self._begin, self.raw, len(self.raw))

    def check(self, digests: dict[str, Digest], length: int, unaligned: int = 0) -> None:
        expected = xxhash.xxh3_128_digest(self.raw[unaligned : unaligned + length])
        for name, digest in digests.items():
            assert digest(self._begin + unaligned, length) == expected, (name, length, unaligned)


@pytest.fixture(scope="module")
def there() -> Bytes:
    return Bytes()


def test_every_machine_offers_the_portable_loop_and_chooses_one(digests: dict[str, Digest]) -> None:
    assert {"chosen", "portable"} <= set(digests)


def test_every_short_length_has_the_digest_of_the_reference(digests: dict[str, Digest], there: Bytes) -> None:
    for length in range(2049):
        there.check(digests, length, unaligned=length % 64)


def test_lengths_around_the_border_of_a_block_have_the_digest_of_the_reference(
    digests: dict[str, Digest], there: Bytes
) -> None:
    for blocks in (1, 2, 3, 4, 7, 15, 16, 17, 63, 64, 65, 1023, 1024):
        for length in range(blocks * BLOCK - 66, blocks * BLOCK + 67):
            there.check(digests, length)


def test_every_address_has_the_digest_of_the_reference(digests: dict[str, Digest], there: Bytes) -> None:
    for unaligned in range(64):
        for length in (1, 3, 8, 16, 100, 200, 241, 1025, 5000):
            there.check(digests, length, unaligned)


def test_long_inputs_have_the_digest_of_the_reference(digests: dict[str, Digest], there: Bytes) -> None:
    chance = random.Random(11)
    for length in (MIB, LONGEST, *(chance.randrange(2049, LONGEST) for _ in range(40))):
        there.check(digests, length, chance.randrange(64))


@settings(deadline=None, max_examples=500)
@given(st.binary(max_size=8192), st.integers(0, 63))
def test_any_bytes_have_the_digest_of_the_reference(digests: dict[str, Digest], data: bytes, unaligned: int) -> None:
    held = ctypes.create_string_buffer(bytes(unaligned) + data, unaligned + len(data) + 1)
    expected = xxhash.xxh3_128_digest(data)
    for name, digest in digests.items():
        assert digest(ctypes.addressof(held) + unaligned, len(data)) == expected, name


def test_one_bit_anywhere_changes_the_digest(digests: dict[str, Digest]) -> None:
    data = bytearray(noise(3000, seed=3))
    held = (ctypes.c_char * len(data)).from_buffer(data)
    for digest in digests.values():
        before = digest(ctypes.addressof(held), len(data))
        for at in range(0, len(data), 37):
            data[at] ^= 1
            assert digest(ctypes.addressof(held), len(data)) != before
            data[at] ^= 1
        assert digest(ctypes.addressof(held), len(data)) == before


def test_the_native_library_digests_with_it(there: Bytes) -> None:
    library = ctypes.CDLL(str(native.LIBRARY))
    exported = {"library": as_function(library.sllm_digest)}
    for length in (0, 1, 16, 240, 4096, MIB):
        there.check(exported, length)
