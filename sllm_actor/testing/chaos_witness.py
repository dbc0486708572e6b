"""What is promised to actors, checked against what happened: everything a chaos scenario does is told to one witness.

It sits beside the systems, not in them: actors of all nodes tell it what they sent, handled, took and heard. What
contradicts a promise becomes a line in `problems`; that is all it does.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sllm_actor.errors import (
    ActorDied,
    DeadlineExceeded,
    HandlerFailed,
    HandshakeRefused,
    LinkFull,
    MailboxFull,
    NodeUnreachable,
    NoSuchActor,
    Overloaded,
    SllmError,
)
from sllm_actor.runtime.clock import Clock
from sllm_actor.runtime.references import NodeAddress
from sllm_actor.testing.trace import Detail, TraceRecorder

if TYPE_CHECKING:
    from sllm_actor.runtime import ActorRef, ActorSystem

# What a fault may do to a call. A protocol violation is none of it: nobody lies here.
EXPECTED = (
    ActorDied, DeadlineExceeded, HandlerFailed, HandshakeRefused, NodeUnreachable, NoSuchActor, Overloaded,
)  # fmt: skip
NOT_RUN = (NoSuchActor, MailboxFull, LinkFull)
# Why a link may be lost. A reason that is none of these is a violation that an end found.
LOSSES = re.compile(
    r"was lost|silent for too long|connected anew|said goodbye|was closed|closing|is closed|can't be reached"
    r"|declared down|could not be reached|not connected|did not answer|given up|is connected already|has gone"
    r"|did not finish the handshake"
)
MAX_PROBLEMS = 100
PlannedEnd = tuple[int, str]


class PlannedCrash(Exception):
    """A bug that an actor has on purpose."""


class Sent:
    """One message of a sequence. `connection` is the one that was open when it was sent, 0 for none."""

    __slots__ = ("connection", "error", "is_tell", "seq", "succeeded")

    def __init__(self, seq: int, connection: int, is_tell: bool) -> None:
        self.seq = seq
        self.connection = connection
        self.is_tell = is_tell
        self.succeeded = False
        self.error: SllmError | None = None


class Flow:
    """A stream: how many items its handler has made, and its reader taken."""

    __slots__ = ("made", "taken")

    def __init__(self) -> None:
        self.made = 0
        self.taken = 0


class Witness:
    """Sees everything. Incarnations of nodes are known by their uid."""

    def __init__(self, clock: Clock, trace: TraceRecorder, *, slack_s: float, stream_credit: int) -> None:
        self.problems: list[str] = []
        self.counts: dict[str, int] = {}
        self.systems: dict[int, ActorSystem] = {}
        # Incarnations that were killed, or have begun to close.
        self.gone: dict[int, None] = {}
        self.holding: dict[int, int] = {}
        self.may_be_down: Callable[[int, int], bool] = lambda _watcher, _watched: False
        self._clock = clock
        self._trace = trace
        self._slack_s = slack_s
        self._credit = stream_credit
        self._sent: dict[tuple[int, str], list[Sent]] = {}
        self._handled: dict[tuple[int, int], list[int]] = {}
        self._flows: list[Flow] = []
        self._ended: dict[PlannedEnd, None] = {}
        # Watcher's uid, watched uid and name: how often it was watched, and how often heard of.
        self._watches: dict[tuple[int, int, str], list[int]] = {}

    def problem(self, text: str) -> None:
        """Note a broken promise."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(f"{self._clock.monotonic_s():.6f} {text}")

    def saw(self, what: str, *details: Detail) -> None:
        """Count and trace an event."""
        self.counts[what] = self.counts.get(what, 0) + 1
        self._trace.record("witness", what, *details)

    def name(self, uid: int) -> str:
        """Name an incarnation for people."""
        system = self.systems.get(uid)
        return f"{system.address.node}#{list(self.systems).index(uid)}" if system is not None else f"uid {uid}"

    # Messages in sequence.

    def sends(self, uid: int, node: str, *, is_tell: bool) -> Sent:
        """Give the next message of an incarnation to a node its number."""
        sent = self._sent.setdefault((uid, node), [])
        # What `stats` says, without the cost of all the rest.
        peer = self.systems[uid]._remotes.peer(NodeAddress(node, "", 0))
        sent.append(Sent(len(sent) + 1, peer.connections if peer.link is not None else 0, is_tell))
        return sent[-1]

    def handled(self, sender: int, receiver: int, seq: int) -> None:
        """Note that a message reached its handler: it must be the latest of its sequence."""
        if receiver in self.gone:
            return
        self.saw("handled", sender, receiver, seq)
        seen = self._handled.setdefault((sender, receiver), [])
        if seen and seq <= seen[-1]:
            what = "twice" if seq in seen else f"after {seen[-1]}"
            self.problem(f"{self.name(receiver)} handles message {seq} of {self.name(sender)} {what}")
        seen.append(seq)

    def answered(self, sent: Sent, token: int, answer: object, began_s: float, timeout_s: float) -> None:
        """Note the answer to an ask: `answer` is the token that came back."""
        if sent.succeeded or sent.error is not None:
            self.problem(f"ask {sent.seq} is answered twice")
        sent.succeeded = True
        self.saw("answered", sent.seq)
        if answer != token:
            self.problem(f"ask {sent.seq} with token {token} is answered by {answer!r}")
        self.in_time(f"ask {sent.seq}", began_s, timeout_s)

    def failed(self, sent: Sent, error: SllmError, began_s: float, timeout_s: float) -> None:
        """Note that an ask failed."""
        sent.error = error
        self.expected(f"ask {sent.seq}", error)
        self.in_time(f"ask {sent.seq}", began_s, timeout_s)

    def expected(self, what: str, error: SllmError) -> None:
        """Check that a call failed in a way that faults explain."""
        self.saw(error.code)
        lost = type(error) is NodeUnreachable and not LOSSES.search(error.message)
        if not isinstance(error, EXPECTED) or lost:
            self.problem(f"{what} failed with {error!r}")

    def in_time(self, what: str, began_s: float, timeout_s: float) -> None:
        """Check that a call took no longer than it was given."""
        took_s = self._clock.monotonic_s() - began_s
        if took_s > timeout_s + self._slack_s:
            self.problem(f"{what} took {took_s:.4f} s and had {timeout_s:.4f} s")

    # Streams.

    def open_flow(self) -> int:
        """Give a new stream its number."""
        self._flows.append(Flow())
        return len(self._flows) - 1

    def made(self, number: int) -> None:
        """Note an item that a handler made: it may be ahead of its reader by the credit and what both have in hand."""
        flow = self._flows[number]
        flow.made += 1
        if flow.made - flow.taken > self._credit + 2:
            self.problem(f"stream {number} is {flow.made - flow.taken} items ahead of its reader")

    def took(self, number: int, item: int) -> None:
        """Note an item that a reader took."""
        flow = self._flows[number]
        if item != flow.taken:
            self.problem(f"stream {number} gives item {item} where {flow.taken} was due")
        flow.taken += 1

    def ended_stream(self, number: int, upto: int) -> None:
        """Note a stream that came to its good end."""
        self.saw("streamed", number)
        if self._flows[number].taken != upto:
            self.problem(f"stream {number} ended after {self._flows[number].taken} of {upto} items")

    # Watches.

    def watches(self, watcher: int, ref: ActorRef) -> bool:
        """Note a watch that is about to begin; false where there is one already."""
        watch = self._watches.setdefault((watcher, ref.address.uid, ref.name), [0, 0])
        if watch[0] > watch[1]:
            return False
        watch[0] += 1
        self.saw("watched", watcher, ref.address.uid, ref.name)
        return True

    def actor_ended(self, uid: int, name: str) -> None:
        """Note the real end of an actor."""
        self._ended[uid, name] = None

    def hears(self, watcher: int, ref: ActorRef, reason: str) -> None:
        """Note that a watcher heard of an end: once for each watch, and only of a real one or a long silence."""
        if watcher in self.gone:
            return
        uid = ref.address.uid
        self.saw(f"heard_{reason}", watcher, uid, ref.name)
        watch = self._watches.get((watcher, uid, ref.name), [0, 0])
        watch[1] += 1
        if watch[1] > watch[0]:
            self.problem(f"{self.name(watcher)} hears {watch[1]} times of {ref.name} at {self.name(uid)}, {reason}")
        if (uid, ref.name) in self._ended or uid in self.gone:
            return
        if reason != "node_down" or not self.may_be_down(watcher, uid):
            self.problem(f"{self.name(watcher)} hears that {ref.name} at {self.name(uid)} ended: {reason}; it did not")

    # At the end.

    def review(self) -> None:
        """Check what can only be said once everything is over."""
        for (sender, receiver), seen in self._handled.items():
            sent = self._sent.get((sender, self.systems[receiver].address.node), [])
            self._review_gaps(sender, receiver, seen, sent)
        for (sender, node), sent in self._sent.items():
            self._review_outcomes(sender, node, sent)
        for (watcher, uid, name), (times, heard) in self._watches.items():
            ended = uid in self.gone or (uid, name) in self._ended
            if ended and watcher not in self.gone and heard < times:
                self.problem(f"{self.name(watcher)} never hears that {name} at {self.name(uid)} has ended")

    def _review_gaps(self, sender: int, receiver: int, seen: Sequence[int], sent: Sequence[Sent]) -> None:
        """What was told before another message of the same connection has come, too, unless it is a dead letter."""
        lost, last = [], 0
        for seq in seen:
            connection = sent[seq - 1].connection
            skipped = sent[last : seq - 1] if connection else ()
            lost += [one.seq for one in skipped if one.is_tell and one.connection == connection]
            last = seq
        excused = self.systems[sender].dead_letters + self.systems[receiver].dead_letters
        if len(lost) > excused:
            self.problem(
                f"{self.name(receiver)} lacks {lost[:10]} of {self.name(sender)}, of a connection that stood, "
                f"and {excused} dead letters do not explain it"
            )

    def _review_outcomes(self, sender: int, node: str, sent: Sequence[Sent]) -> None:
        handled = {
            seq
            for (by, receiver), seen in self._handled.items()
            if by == sender and self.systems[receiver].address.node == node
            for seq in seen
        }
        for one in sent:
            if one.is_tell or sender in self.gone:
                continue
            what = f"ask {one.seq} of {self.name(sender)} to {node}"
            if one.succeeded and one.seq not in handled and not self._has_been_gone(node):
                self.problem(f"{what} is answered, and was never handled")
            if isinstance(one.error, NOT_RUN) and one.seq in handled:
                self.problem(f"{what} was handled, and failed with {one.error!r}")
            if not one.succeeded and one.error is None:
                self.problem(f"{what} is neither answered nor failed")

    def _has_been_gone(self, node: str) -> bool:
        return any(self.systems[uid].address.node == node for uid in self.gone)


class ErrorLog(logging.Handler):
    """Makes a problem of every error that is logged, unless an actor failed as planned."""

    def __init__(self, witness: Witness) -> None:
        super().__init__(logging.ERROR)
        self._witness = witness

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, PlannedCrash):
            self._witness.problem(f"logged: {record.getMessage()} {error!r}")
