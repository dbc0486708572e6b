"""Another node as this one sees it: the calls that wait for it, the calls it has here, the watches, the way to it.

A peer is known by its node id. It has one link at a time, over which calls go both ways; what is unanswered when
the link is lost has failed. A loss is not yet an end: the peer is dialled again, and watchers hear of an end only
when it says goodbye, comes back as another incarnation, or stays away for too long. An incarnation once declared down
stays so.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from sllm_actor.errors import (
    ActorDied,
    LinkFull,
    NodeUnreachable,
    Overloaded,
    SllmError,
)
from sllm_actor.runtime.calls import too_late
from sllm_actor.runtime.hearing import CLOSING, Hearing
from sllm_actor.runtime.incoming import InCall, failure_of
from sllm_actor.runtime.letters import (
    ANSWER,
    ASK,
    STREAM,
    TELL,
    Cancel,
    Watch,
)
from sllm_actor.runtime.link import Link
from sllm_actor.runtime.outgoing import Queued, RemoteStream
from sllm_actor.runtime.redial import Dialling
from sllm_actor.runtime.stats import LinkStats

if TYPE_CHECKING:
    from sllm_actor.runtime.handshake import Hello
    from sllm_actor.runtime.references import ActorRef
    from sllm_actor.runtime.remotes import Remotes

log = logging.getLogger(__name__)


class _Watched(NamedTuple):
    ref: ActorRef
    hear: Callable[[str], None]


class Peer:
    """One other node. Belongs to one event loop."""

    def __init__(self, remotes: Remotes, node: str) -> None:
        self.node = node
        self.endpoint = ""
        self.uid = 0
        self.link: Link | None = None
        self.links_seen = 0
        # Asks by number: until when, where the answer goes, the actor's name, the message's type.
        self.calls: dict[int, tuple[float, asyncio.Future[Any], str, type]] = {}
        self.streams: dict[int, RemoteStream] = {}
        self.incoming: dict[int, InCall] = {}
        self.watches: dict[int, _Watched] = {}
        self.credit_stalls = 0
        self.connections = 0
        self.silences = 0
        self.dialling = Dialling(self, remotes)
        self._remotes = remotes
        self.system = remotes.system
        self.limits = remotes.system.limits
        self.codec = remotes.codec
        self.sendable = remotes.codec.messages
        self.max_waiting_bytes = remotes.system.limits.link_buffer_bytes
        self._queued: list[Queued] = []
        self.last_call = 0
        self._down_timer: asyncio.TimerHandle | None = None
        self.said_goodbye = False
        self.hearing = Hearing(self)

    # What actors here want of it.

    def queue_ask(self, ref: ActorRef, letter: tuple[Any, ...]) -> None:
        """Keep an ask until there is a link."""
        self._queue(letter, ref, letter[1], type(letter[5]))

    def drop(self, number: int, target: str) -> None:
        """Nobody waits for this ask any more: cancel its handler."""
        if self.calls.pop(number, None) is not None:
            self.send(Cancel(number), target)

    def sweep(self, now_s: float) -> float:
        """Fail the asks whose time is over; give the earliest deadline of the others, in seconds."""
        for number in [number for number, call in self.calls.items() if call[0] <= now_s]:
            self._expire(number)
        return min([call[0] for call in self.calls.values()], default=inf)

    def _expire(self, number: int) -> None:
        _, future, target, what = self.calls[number]
        self.drop(number, target)
        if not future.done():
            future.set_exception(too_late(target, what))

    def stream(self, ref: ActorRef, message: object, trace: bytes | None) -> RemoteStream:
        """Open a stream; raises like `ActorRef.stream`."""
        self.codec.check_message(message)
        link = self.way_to(ref.address.uid)
        self.last_call = number = self.last_call + 1
        limits = self.limits
        letter = (STREAM, number, ref.name, trace, message, limits.stream_credit, limits.stream_window_bytes)
        stream = self.streams[number] = RemoteStream(self, number, ref.name)
        if link is None:
            self._queue(letter, ref, number, type(message))
        else:
            link.send(letter)
        return stream

    def tell(self, ref: ActorRef, message: object, trace: bytes | None) -> None:
        """Send a message that nobody answers; raises where it can't be sent."""
        self.codec.check_message(message)
        link = self.way_to(ref.address.uid)
        letter = (TELL, ref.name, trace, message)
        if link is None:
            self._queue(letter, ref, 0, type(message))
        else:
            link.send(letter)

    def watch(self, ref: ActorRef, hear: Callable[[str], None]) -> Callable[[], None]:
        """Watch an actor of this node; see `ActorSystem.watch`."""
        uid = ref.address.uid
        ended = uid and (self._remotes.is_down(self.node, uid) or (self.link is not None and uid != self.uid))
        if ended or self.node == self.system.address.node or self._remotes.closing:
            hear("node_down")
            return _nothing
        if len(self.watches) >= self.limits.max_watches:
            raise Overloaded(f"{len(self.watches)} actors of {self.node} are watched already")
        self.last_call = number = self.last_call + 1
        self.watches[number] = _Watched(ref, hear)
        if self.link is not None:
            self.link.send_control(Watch(number, ref.name), ref.name)
        else:
            self._await_end()
            self.dialling.begin()

        def stop() -> None:
            if self.watches.pop(number, None) is not None and self.link is not None:
                self.link.send_control(Cancel(number), ref.name)

        return stop

    def send(self, letter: msgspec.Struct, lane: str | int) -> None:
        """Send a control letter of a call, if there is a link still."""
        if self.link is not None:
            self.link.send_control(letter, lane)

    def way_to(self, uid: int) -> Link | None:
        """Give the link, or None where the message may wait for one. Raises where it can't be sent."""
        if self.node == self.system.address.node:
            raise ActorDied(f"an earlier incarnation of {self.node} has ended")
        if self.link is not None:
            if uid and uid != self.uid:
                raise ActorDied(f"that incarnation of {self.node} has ended; another has taken its place")
            if self.link.waiting_bytes > self.max_waiting_bytes:
                raise LinkFull(f"{self.node} does not read fast enough", retry_after_s=0.1)
            return self.link
        if uid and self._remotes.is_down(self.node, uid):
            raise NodeUnreachable(f"{self.node} was declared down")
        if self._remotes.closing:
            raise NodeUnreachable("this system is closed")
        if self.dialling.error is not None:
            # A new one: one that is raised again and again would keep every frame that it has been through.
            raise type(self.dialling.error)(self.dialling.error.message)
        if not self.endpoint:
            raise NodeUnreachable(f"{self.node} is not connected and does not listen")
        if len(self._queued) >= self.limits.mailbox_messages:
            raise LinkFull(f"{len(self._queued)} messages wait for {self.node} already", retry_after_s=0.1)
        return None

    def _queue(self, letter: tuple[Any, ...], ref: ActorRef, number: int, what: type) -> None:
        self._queued.append(Queued(letter, ref, number, what))
        self._await_end()
        self.dialling.begin()

    # The way to it.

    def is_down(self, uid: int) -> bool:
        """Tell whether this incarnation was declared down."""
        return self._remotes.is_down(self.node, uid)

    def opened(self, link: Link, hello: Hello) -> None:
        """A link to it is open: what waited goes out, and watches begin anew."""
        if hello.uid != self.uid:
            if self.uid:
                # Another has taken its place, for good: of two that claim one id, the older ends.
                self._remotes.declare_down(self.node, self.uid)
            self._end_incarnation(hello.uid)
            self.uid, self.links_seen = hello.uid, 0
        self.link = self.hearing.link = link
        link.unsent = self._unsent
        self.links_seen += 1
        self.connections += 1
        self.said_goodbye = False
        self.endpoint = hello.endpoint or self.endpoint
        self.dialling.succeeded()
        self._remotes.is_heard(self.node)
        if self._down_timer is not None:
            self._down_timer.cancel()
            self._down_timer = None
        queued, self._queued = self._queued, []
        for entry in queued:
            self._send_queued(link, entry)
        for number, watched in list(self.watches.items()):
            link.send_control(Watch(number, watched.ref.name), watched.ref.name)

    def _send_queued(self, link: Link, entry: Queued) -> None:
        if entry.number and entry.number not in self.calls and entry.number not in self.streams:
            return  # Given up meanwhile.
        uid = entry.ref.address.uid
        if uid and uid != self.uid:
            gone = ActorDied(f"that incarnation of {self.node} has ended; another has taken its place")
            self._fail_queued(entry, gone)
            return
        letter = entry.letter
        if letter[0] == ASK:
            # What is left of its time is less than when it was queued.
            letter = (*letter[:3], self.calls[entry.number][0] - self.system.now_s(), *letter[4:])
        link.send(letter)

    def _fail_queued(self, entry: Queued, error: SllmError) -> None:
        if entry.number:
            self.fail_call(entry.number, error)
        else:
            self.system.dead_letter(entry.ref.name, entry.what.__name__, error)

    def fail_call(self, number: int, error: SllmError) -> bool:
        """Fail an ask or a stream that waits for this peer; false where there is none of that number."""
        call = self.calls.pop(number, None)
        if call is not None:
            if not call[1].done():
                call[1].set_exception(error)
            return True
        stream = self.streams.pop(number, None)
        if stream is not None:
            stream.inflow.finish(error)
            return True
        return False

    def _unsent(self, letter: tuple[Any, ...], error: SllmError) -> None:
        """A letter turned out to be one that can't be sent: whoever waits for its answer is told."""
        kind = letter[0]
        if kind in (ASK, STREAM):
            self.fail_call(letter[1], error)
        elif kind == ANSWER:
            self.send(failure_of(letter[1], error), letter[1])
        elif kind == TELL:
            self.system.dead_letter(letter[1], type(letter[3]).__name__, error)

    def unreachable(self, error: SllmError) -> None:
        """A dial has failed: whatever waited for it fails."""
        queued, self._queued = self._queued, []
        for entry in queued:
            self._fail_queued(entry, error)

    def lost(self, link: Link, error: SllmError) -> None:
        """The link has ended. Unanswered calls fail, calls from there are cancelled, and it is dialled again."""
        if self.link is not link:
            return
        self.link = None
        failed = NodeUnreachable(f"{self.node}: {error}")
        for number in (*self.calls, *self.streams):
            self.fail_call(number, failed)
        if link.heartbeat.gave_up:
            self.silences += 1
            self._remotes.fell_silent(self.node, self.endpoint)
        incoming = list(self.incoming.values())
        self.incoming.clear()
        for theirs in incoming:
            theirs.call_off()
        if self.said_goodbye:
            self.declare_down()
        elif not self._remotes.closing:
            self._await_end()
            if self.endpoint:
                # One that is silent may well accept a connection, and say nothing there either.
                self.dialling.begin(failed if link.heartbeat.gave_up else None)

    def _await_end(self) -> None:
        if self._down_timer is None and self.link is None:
            loop = asyncio.get_running_loop()
            self._down_timer = loop.call_later(self.limits.down_after_s, self.declare_down)

    def declare_down(self) -> None:
        """Give up on the incarnation that was there: its watchers hear so, and it is not talked to again."""
        if self._down_timer is not None:
            self._down_timer.cancel()
            self._down_timer = None
        if self.uid:
            if self.said_goodbye:
                log.info("node %s has left", self.node)
            else:
                log.warning("node %s is declared down", self.node)
            self._remotes.declare_down(self.node, self.uid)
        self.dialling.stop()
        self.unreachable(NodeUnreachable(f"{self.node} could not be reached for {self.limits.down_after_s:g} s"))
        self._end_incarnation(0, waiting=True)

    def _end_incarnation(self, next_uid: int, *, waiting: bool = False) -> None:
        """Tell the watchers of the incarnation that has ended; those of the next one go on."""
        for number, watched in list(self.watches.items()):
            uid = watched.ref.address.uid
            if waiting or (uid != next_uid if uid else self.uid):
                del self.watches[number]
                watched.hear("node_down")

    def close(self) -> None:
        """Say goodbye."""
        self.dialling.stop()
        if self._down_timer is not None:
            self._down_timer.cancel()
            self._down_timer = None
        if self.link is not None:
            self.link.goodbye(CLOSING)
        self.unreachable(NodeUnreachable("this node is closing"))
        self._end_incarnation(0, waiting=True)

    def stats(self) -> LinkStats:
        """Give the counts of the present link."""
        link = self.link
        return LinkStats(
            node=self.node,
            open=link is not None,
            received_bytes=link.received_bytes if link is not None else 0,
            sent_bytes=link.sent_bytes if link is not None else 0,
            waiting_bytes=link.waiting_bytes + link.outgoing.held_bytes if link is not None else 0,
            round_trip_s=link.heartbeat.round_trip_s if link is not None else 0.0,
            waiting_asks=len(self.calls) + len(self.streams),
            running_calls=len(self.incoming),
            credit_stalls=self.credit_stalls,
            late_answers=self.hearing.late_answers,
            connections=self.connections,
            silences=self.silences,
        )


def _nothing() -> None:
    """Stop watching what has ended."""
