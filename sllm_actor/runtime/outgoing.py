"""Calls that wait for another node."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from sllm_actor.runtime.calls import Inflow
from sllm_actor.runtime.letters import Cancel, Credit

if TYPE_CHECKING:
    from sllm_actor.runtime.peer import Peer
    from sllm_actor.runtime.references import ActorRef


class RemoteStream:
    """A stream that comes from another node."""

    __slots__ = ("_credited", "arrived", "inflow", "marks", "number", "peer", "taken", "target")

    def __init__(self, peer: Peer, number: int, target: str) -> None:
        self.peer = peer
        self.number = number
        self.target = target
        self.inflow = Inflow()
        # How many items have come, and been taken; and after which of them, when taken, that is to be told.
        self.arrived = 0
        self.taken = 0
        self.marks: deque[int] = deque()
        self._credited = 0

    def take(self) -> Any:
        """Give the next item; tell the sender where it wants to know."""
        item = self.inflow.items.popleft()
        self.taken += 1
        if self.marks:
            self._tell_credit()
        return item

    def mark(self) -> None:
        """The sender wants to know when everything up to here has been taken."""
        self.marks.append(self.arrived)
        self._tell_credit()

    def _tell_credit(self) -> None:
        while self.marks and self.marks[0] <= self.taken:
            mark = self.marks.popleft()
            if not self.inflow.finished:
                self.peer.send(Credit(self.number, mark - self._credited), self.target)
            self._credited = mark

    def drop(self) -> None:
        """The reader has gone."""
        if self.peer.streams.pop(self.number, None) is not None:
            self.peer.send(Cancel(self.number), self.target)


class Queued(NamedTuple):
    """A letter that waits for the first link; `number` is its call's, 0 for a tell."""

    letter: tuple[Any, ...]
    ref: ActorRef
    number: int
    what: type
