"""What a client asks of one generation, and how it can end."""

from __future__ import annotations

import enum

import msgspec


class FinishReason(enum.StrEnum):
    """Why a generation ended by itself; errors and cancels are not finishes."""

    STOP = "stop"
    LENGTH = "length"


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are drawn.

    `temperature` 0 means greedy. The random number for a position depends on `seed` and that position
    alone, so no sampler state exists that a migration would have to move.
    """

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    ignore_eos: bool = False
