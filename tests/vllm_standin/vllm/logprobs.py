"""What is told of one token at one position."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Logprob:
    """Its logarithm of a probability and its place among all, from 1 on."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None
