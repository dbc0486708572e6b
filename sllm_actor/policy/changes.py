"""Which nodes have changed since somebody looked last, whoever that is. Pure."""

from __future__ import annotations

from collections import OrderedDict

from sllm_actor.domain import NodeId

# More than a cluster has, since those that have gone are among them.
MOST_NODES = 4096


class Changes:
    """Owns when each node has changed last: by `revision`, which counts all changes. The longest ago are forgotten."""

    def __init__(self, most_nodes: int = MOST_NODES) -> None:
        self.revision = 0
        self._most_nodes = most_nodes
        # The one that has changed last comes last.
        self._at: OrderedDict[NodeId, int] = OrderedDict()
        # Of changes up to this revision not all are known.
        self._forgotten = 0

    def note(self, node: NodeId) -> None:
        """Note that a node has changed."""
        self.revision += 1
        self._at[node] = self.revision
        self._at.move_to_end(node)
        if len(self._at) > self._most_nodes:
            _, self._forgotten = self._at.popitem(last=False)

    def since(self, revision: int) -> list[NodeId] | None:
        """List those that have changed behind this revision; None where that is too long ago to tell."""
        if revision < self._forgotten:
            return None
        found = []
        for node in reversed(self._at):
            if self._at[node] <= revision:
                break
            found.append(node)
        return found
