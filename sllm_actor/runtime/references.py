"""Where messages to one actor go, here or on another node: one type, which can itself be sent in a message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from functools import lru_cache
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

from sllm_actor.errors import ActorDied, ConfigInvalid, SllmError
from sllm_actor.runtime.actor import PLAIN
from sllm_actor.runtime.calls import CURRENT, Backlog, LocalStream, current_trace, too_late
from sllm_actor.runtime.handshake import MAX_NAME_LENGTH
from sllm_actor.runtime.letters import ASK
from sllm_actor.runtime.network import Endpoint
from sllm_actor.runtime.supervision import Ended

if TYPE_CHECKING:
    from sllm_actor.runtime.cell import Cell
    from sllm_actor.runtime.outgoing import RemoteStream
    from sllm_actor.runtime.peer import Peer
    from sllm_actor.runtime.system import ActorSystem


# Addresses that need not be read anew: each request names its worker's.
KNOWN_ADDRESSES = 4096


class NodeAddress(NamedTuple):
    """A node: its id, where it listens, and which incarnation of it; uid 0 means whichever is there.

    Written `ID@ENDPOINT`, such as `worker-1@tcp://10.0.0.7:8401`. A node that does not listen has no endpoint.
    """

    node: str
    endpoint: str
    uid: int

    @classmethod
    @lru_cache(maxsize=KNOWN_ADDRESSES)
    def parse(cls, text: str) -> NodeAddress:
        """Read `ID@ENDPOINT`.

        Raises:
            ConfigInvalid: it is no address.
        """
        node, separator, endpoint = text.partition("@")
        if not separator or not 0 < len(node) <= MAX_NAME_LENGTH:
            raise ConfigInvalid(f"{text[:200]!r} is no node's address; write ID@ENDPOINT", param="address")
        Endpoint.parse(endpoint)
        return cls(node, endpoint, 0)

    def __str__(self) -> str:
        return f"{self.node}@{self.endpoint}"


class ActorRef:
    """Where messages to one actor go. Survives the actor; sending to one that has gone fails with a typed error."""

    __slots__ = ("_cell", "_deadlines", "_now_s", "_peer", "_system", "address", "name")

    def __init__(self, system: ActorSystem, name: str, address: NodeAddress, peer: Peer | None) -> None:
        self._system = system
        self._peer = peer
        # At hand for every ask.
        self._now_s = system.now_s
        self._deadlines = system.deadlines
        self._cell: Cell | None = None
        self.name = name
        self.address = address

    def __repr__(self) -> str:
        return f"ActorRef({self.name!r}, {self.address.node!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActorRef) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[str, str, int]:
        return (self.name, self.address.node, self.address.uid)

    @property
    def peer(self) -> Peer | None:
        """The actor's node as this one sees it, None for an actor of this system."""
        return self._peer

    @property
    def is_local(self) -> bool:
        """Tell whether the actor is one of this system's."""
        return self._peer is None

    def tell(self, message: object) -> None:
        """Send and forget. A message that can't be delivered is a dead letter: counted and logged."""
        try:
            if self._peer is None:
                self._local_cell().put(message, None, inf, current_trace(), False)
            else:
                self._peer.tell(self, message, current_trace())
        except SllmError as error:
            self._system.dead_letter(self.name, type(message).__name__, error)

    def _local_cell(self) -> Cell:
        cell = self._cell
        if cell is None or cell.closed:
            cell = self._cell = self._system.cell(self.name)
            if cell.closed:
                raise ActorDied(f"{self.name} has stopped")
        return cell

    async def ask(self, message: object, *, timeout_s: float) -> Any:
        """Send and wait for the answer. Cancelling this cancels the handler, on whichever node it runs.

        Asked by a handler, it has no more time than that handler's own caller.

        Raises:
            DeadlineExceeded: no answer within `timeout_s`.
            NoSuchActor, MailboxFull, LinkFull: it was not delivered and has not run.
            ActorDied, NodeUnreachable: the actor or its node ended; it may have run.
            HandlerFailed: a bug of the handler.
            SllmError: whatever typed error the handler raised.
        """
        current = CURRENT.get()
        deadline_s, trace = current[3], current[4]
        now_s = self._now_s()
        # Turned round, so that what is not a number is no time at all.
        if not now_s + timeout_s >= deadline_s:
            deadline_s = now_s + timeout_s
        if not deadline_s > now_s:
            raise too_late(self.name, type(message))
        if deadline_s < self._deadlines.next_s:
            self._deadlines.note(deadline_s)
        peer = self._peer
        if peer is not None:
            # Written out here, not in a method of the peer: each call of one costs every remote ask a twentieth.
            if type(message) not in peer.sendable:
                peer.codec.check_message(message)
            name, uid, link = self.name, self.address.uid, peer.link
            if link is None or (uid and uid != peer.uid) or link.waiting_bytes > peer.max_waiting_bytes:
                link = peer.way_to(uid)
            peer.last_call = number = peer.last_call + 1
            letter = (ASK, number, name, deadline_s - now_s, trace, message)
            future = self._system.create_future()
            peer.calls[number] = (deadline_s, future, name, type(message))
            if link is not None:
                link.send(letter)
            else:
                peer.queue_ask(self, letter)
            try:
                return await future
            except asyncio.CancelledError:
                peer.drop(number, name)
                raise
        cell = self._cell
        if cell is None or cell.closed:
            cell = self._local_cell()
        future = self._system.create_future()
        handler, waiter, queue = cell.handlers.get(type(message)), cell.waiter, cell.queue
        if waiter is None or handler is None or not handler[PLAIN] or len(queue) >= cell.bound:
            cell.put(message, future, deadline_s, trace, False)
        else:
            # What `put` does for an actor that has nothing else to do, without the call.
            queue.append((message, future, handler, deadline_s, trace))
            if not waiter.done():
                waiter.set_result(None)
        try:
            return await future
        except asyncio.CancelledError:
            cell.cancel_call(future)
            raise

    async def stream(self, message: object, backlog: Backlog | None = None) -> AsyncGenerator[Any, None]:
        """Send and iterate over the items of the answer; a bounded number of them run ahead, which `backlog` shows.

        Close it (`contextlib.aclosing`) to cancel the handler. Raises like `ask`, but has no deadline.
        """
        trace = current_trace()
        call: LocalStream | RemoteStream
        if self._peer is None:
            cell = self._local_cell()
            call = LocalStream(self._system.limits.stream_credit, cell)
            cell.put(message, call, inf, trace, True)
        else:
            call = self._peer.stream(self, message, trace)
        inflow = call.inflow
        items = inflow.items
        if backlog is not None:
            backlog.is_of(inflow)
        try:
            while items or await inflow.arrived(self._system.create_future):
                yield call.take()
        finally:
            call.drop()

    async def ended(self) -> Ended:
        """Wait for the actor's or its node's end. One that is not there has ended."""
        future = asyncio.get_running_loop().create_future()

        def hear(reason: str) -> None:
            if not future.done():
                future.set_result(reason)

        stop = self._system.watch(self, hear)
        try:
            return Ended(self, await future)
        finally:
            stop()
