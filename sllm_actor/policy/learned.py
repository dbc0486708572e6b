"""What is kept of what was learned of a node's starts, and its bytes. Pure.

It is a help and no more: what can't be read, or is another version's, is learned anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from sllm_actor.policy.line_fit import Line

# A node's newest checkpoints that are kept; each takes up to 400 bytes.
KEPT_CHECKPOINTS = 64


class LearnedStarts(NamedTuple):
    """The last starts of a checkpoint from a tier, for each level of load: the seconds beside queue and bytes."""

    tier: str
    fingerprint: str
    levels: tuple[tuple[float, ...], ...]


class LearnedNode(msgspec.Struct, frozen=True, kw_only=True):
    """All that is kept of one node."""

    version: Literal[1] = 1
    leave_s: float | None
    lines: Annotated[dict[str, Line], Meta(max_length=16)]
    starts: Annotated[tuple[LearnedStarts, ...], Meta(max_length=KEPT_CHECKPOINTS)]


def packed(kept: LearnedNode) -> bytes:
    """Write it."""
    return msgspec.msgpack.encode(kept)


def unpacked(raw: bytes) -> LearnedNode | None:
    """Read it; None where it can't be used."""
    try:
        kept = msgspec.msgpack.decode(raw, type=LearnedNode)
    except (msgspec.MsgspecError, RecursionError):
        return None
    sound = all(line.points > 0 and line.weight > 0 for line in kept.lines.values())
    return kept if sound and all(map(math.isfinite, _numbers(kept))) else None


def _numbers(kept: LearnedNode) -> Iterator[float]:
    yield kept.leave_s or 0.0
    for line in kept.lines.values():
        yield from line
    for starts in kept.starts:
        for level in starts.levels:
            yield from level
