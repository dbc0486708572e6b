"""All that is worked out of a node's report, and of what is granted and marked there."""

from __future__ import annotations

from typing import Any

from sllm_actor.policy.node_view import NodeView


def parts(node: NodeView) -> dict[str, Any]:
    """Give it by its name."""
    names = [name for name in dir(NodeView) if not name.startswith("_") and not callable(getattr(NodeView, name))]
    return {name: getattr(node, name) for name in names}
