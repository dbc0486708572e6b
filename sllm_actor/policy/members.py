"""Who has come and gone between two views of the cluster. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sllm_actor.domain.member import Member
from sllm_actor.domain.names import NodeId


@dataclass(frozen=True, slots=True)
class Joined:
    """A node has become a member, in an epoch of its own."""

    member: Member
    epoch: int


@dataclass(frozen=True, slots=True)
class Left:
    """A node is no member any more; what it owned in that epoch is nobody's."""

    node: NodeId
    epoch: int


View = Mapping[NodeId, Joined]


def differences(before: View, after: View) -> list[Joined | Left]:
    """List what has changed: who has left, then who has joined. One that came back has left and joined."""
    left = [Left(node, seen.epoch) for node, seen in before.items() if _epoch(after, node) != seen.epoch]
    joined = [seen for node, seen in after.items() if _epoch(before, node) != seen.epoch]
    return [*sorted(left, key=lambda change: change.node), *sorted(joined, key=lambda seen: seen.member.node)]


def _epoch(view: View, node: NodeId) -> int | None:
    seen = view.get(node)
    return None if seen is None else seen.epoch
