"""This node's place in the cluster, as its own actors know it."""

from __future__ import annotations

from collections.abc import Callable

from sllm_actor.domain import NodeId
from sllm_actor.errors import Draining, Fenced, LeaseLost
from sllm_actor.messages.instances import InstanceStarted


class Place:
    """Who this node is, in which epoch, and since which leader's epoch nobody earlier is heard.

    Alone, a node has epoch 0 for ever. `published` and `withdrawn` are told of each instance that takes requests, and
    takes none any more.
    """

    def __init__(
        self,
        node: NodeId,
        *,
        address: str = "",
        epoch: Callable[[], int | None] = lambda: 0,
        published: Callable[[InstanceStarted], None] = lambda _: None,
        withdrawn: Callable[[InstanceStarted], None] = lambda _: None,
    ) -> None:
        self.node = node
        self.address = address
        self.published = published
        self.withdrawn = withdrawn
        # Set by the operator: nothing is started here.
        self.cordoned = False
        # Tells how many threads of the machine run or wait for a core, where somebody looks.
        self.core_threads: Callable[[], float] | None = None
        self._epoch = epoch
        self._leader_epoch = 0
        epoch_now = epoch()
        # Instances of different nodes, and of different lives of one, have different names.
        self.tag = f"{node}-{epoch_now}-" if epoch_now else ""

    @property
    def alone(self) -> bool:
        """Whether there are no other nodes."""
        return not self.address

    @property
    def threads(self) -> float:
        """How many threads run or wait for a core; 0 where nobody looks."""
        return self.core_threads() if self.core_threads is not None else 0.0

    @property
    def epoch(self) -> int | None:
        """The epoch in which this node is a member now; None where it is none."""
        return self._epoch()

    def check(self, leader_epoch: int) -> None:
        """Accept what a leader has decided.

        Raises:
            LeaseLost: this node is no member, and must not begin anything.
            Fenced: a later leader has been heard.
            Draining: nothing is to be started here.
        """
        if self.epoch is None:
            raise LeaseLost(f"{self.node} is no member of the cluster just now")
        if leader_epoch < self._leader_epoch:
            raise Fenced(f"the leader of epoch {leader_epoch} has a successor")
        self._leader_epoch = leader_epoch
        if self.cordoned:
            raise Draining(f"{self.node} is cordoned", retry_after_s=1.0)
