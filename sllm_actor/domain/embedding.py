"""How a model makes one vector of a text, and for whom it is made."""

from __future__ import annotations

import enum

import msgspec


class Pooling(enum.StrEnum):
    """What is made of the hidden states of a text's tokens; the names are those of sentence-transformers."""

    CLS = "cls"
    MEAN = "mean"
    MEAN_SQRT_LEN = "mean_sqrt_len"
    MAX = "max"
    LAST = "lasttoken"


class Embedding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model embeds texts of at most `max_tokens`.

    `dimensions` is the length of its vectors. One that is `matryoshka` was trained so that their beginnings are
    vectors, too: of the lengths in `matryoshka_dimensions`, or of any where that is empty.
    """

    pooling: Pooling
    normalize: bool
    dimensions: int
    max_tokens: int
    lower_case: bool = False
    matryoshka: bool = False
    matryoshka_dimensions: tuple[int, ...] = ()
