"""Serverless inference for large language models: many models registered, few loaded, fast cold starts.

`from sllm_actor import Config, Node` embeds a node; `sllm_actor.runtime` is the actor library alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sllm_actor.config import Config
    from sllm_actor.node import Node

__all__ = ["Config", "Node"]


def __getattr__(name: str) -> Any:
    # Lazily, so that a child process or the actor library does not import the whole node.
    if name == "Config":
        from sllm_actor.config import Config

        return Config
    if name == "Node":
        from sllm_actor.node import Node

        return Node
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
