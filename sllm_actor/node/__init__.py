"""The composition root: a node made of all the rooms below."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sllm_actor.node.node import Node

__all__ = ["Node"]


def __getattr__(name: str) -> Any:
    # Lazily, because the fork server imports its module from here, and needs nothing of the node.
    if name == "Node":
        from sllm_actor.node.node import Node

        return Node
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
