"""Which of a model's instances answers a request. Pure.

The one with the fewest requests of this gateway, except that prompts with one beginning go to one instance as long as
that is not much busier: it has their keys and values already. Source of the idea: the cache-aware routers of SGLang.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import xxhash

# How many requests more than the least busy one the instance of a prompt's beginning may have.
SLACK = 2
# Bytes of a prompt's beginning, four a token: system prompts are longer, questions differ before.
PREFIX_BYTES = 256


class Candidate(NamedTuple):
    """An instance, and how many requests it answers for this gateway."""

    instance_id: str
    outstanding: int


def choose(candidates: Sequence[Candidate], prompt: bytes) -> str:
    """Choose an instance; the same prompt and loads give the same one, in whatever order they come."""
    if len(candidates) == 1:
        return candidates[0].instance_id
    least = min(candidate.outstanding for candidate in candidates)
    near = [candidate for candidate in candidates if candidate.outstanding <= least + SLACK]
    prefix = prompt[:PREFIX_BYTES]
    # The highest of the digests (rendezvous hashing): who comes or goes changes nobody else's place.
    return max(
        near, key=lambda one: (xxhash.xxh3_64_digest(one.instance_id.encode() + prefix), one.instance_id)
    ).instance_id
