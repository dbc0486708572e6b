"""What a peer says, letter by letter: answers to calls made here, and calls to be answered here.

Whatever breaks a rule raises `ProtocolViolation`, and its link is closed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from math import inf
from typing import TYPE_CHECKING, Any

from sllm_actor.errors import (
    FrameInvalid,
    LinkFull,
    NodeUnreachable,
    Overloaded,
    ProtocolViolation,
    SllmError,
    from_code,
)
from sllm_actor.runtime import letters as wire_letters
from sllm_actor.runtime.incoming import InCall, InStream, InWatch, failure_of
from sllm_actor.runtime.letters import (
    Answer,
    Ask,
    Beat,
    Cancel,
    Credit,
    Echo,
    Failure,
    Goodbye,
    Item,
    Mark,
    Misread,
    OpenStream,
    Tell,
    Watch,
)

if TYPE_CHECKING:
    from sllm_actor.runtime.peer import Peer

log = logging.getLogger(__name__)

# Reasons of a goodbye that is for good: the speaker ends, or has declared the listener's incarnation down.
CLOSING = "closing"
DECLARED_DOWN = "declared_down"


class Hearing:
    """Takes the letters of one peer."""

    def __init__(self, peer: Peer) -> None:
        self.late_answers = 0
        self._misread = 0
        # Over which the letters come; there is one from `opened` on.
        self.link: Any = None
        self._peer = peer
        self._system = peer.system
        self._cells = peer.system.cells
        self._calls = peer.calls
        self._incoming = peer.incoming
        self._now_s = peer.system.now_s
        self._max_calls = peer.limits.max_calls_per_link
        self._stream_credit = peer.limits.stream_credit
        self._hear: dict[type, Callable[[Any], None]] = {
            Answer: self._hear_answer,
            Item: self._hear_late_item,
            Mark: self._hear_mark,
            Failure: self._hear_failure,
            OpenStream: self._hear_stream,
            Tell: self._hear_tell,
            Cancel: self._hear_cancel,
            Credit: self._hear_credit,
            Watch: self._hear_watch,
            Beat: self._hear_beat,
            Echo: self._hear_echo,
            Goodbye: self._hear_goodbye,
            Misread: self._hear_misread,
        }

    def hear(self, letters: Sequence[Any]) -> None:
        """Take letters that came over the link, in order.

        Raises:
            ProtocolViolation: one breaks a rule.
        """
        # Asks, answers and items are written out here: a method for each would cost as much as what it does.
        calls, incoming, cells, link, peer = self._calls, self._incoming, self._cells, self.link, self._peer
        heard_s, deadlines, streams = self._now_s(), self._system.deadlines, peer.streams
        for letter in letters:
            kind = type(letter)
            if kind is Answer:
                waiting = calls.pop(letter.call, None)
                if waiting is not None:
                    future = waiting[1]
                    if not future.done():
                        future.set_result(letter.value)
                    continue
            elif kind is Ask:
                number = letter.call
                cell = cells.get(letter.target)
                if cell is None or number in incoming or len(incoming) >= self._max_calls or link.waiting_bytes:
                    self._hear_hindered_ask(letter, heard_s)
                    continue
                call = incoming[number] = InCall(peer, link, number, cell)
                deadline_s = heard_s + letter.ttl_s
                if deadline_s < deadlines.next_s:
                    deadlines.note(deadline_s)
                try:
                    cell.put(letter.body, call, deadline_s, letter.trace, False)
                except SllmError as error:
                    call.set_exception(error)
                continue
            elif kind is Item:
                stream = streams.get(letter.call)
                if stream is not None:
                    stream.arrived += 1
                    if stream.arrived - stream.taken > self._stream_credit:
                        raise ProtocolViolation(f"{peer.node} sends more items than it has credit for")
                    stream.inflow.push(letter.value)
                    continue
            self._hear[kind](letter)

    def _hear_answer(self, letter: Answer[Any]) -> None:
        """End a stream or a watch; that of an ask is taken above."""
        number = letter.call
        if number in self._peer.streams:
            self._peer.streams.pop(number).inflow.finish(None)
        elif number in self._peer.watches:
            self._peer.watches.pop(number).hear(str(letter.value))
        else:
            self._late(number)

    def _hear_late_item(self, letter: Item[Any]) -> None:
        self._late(letter.call)

    def _hear_mark(self, letter: Mark) -> None:
        stream = self._peer.streams.get(letter.call)
        if stream is None:
            self._late(letter.call)
        elif len(stream.marks) >= self._peer.limits.stream_credit:
            raise ProtocolViolation(f"{self._peer.node} marks more than it sends")
        else:
            stream.mark()

    def _hear_failure(self, letter: Failure) -> None:
        error = from_code(letter.code, letter.text, letter.param, letter.retry_after_s)
        if self._peer.fail_call(letter.call, error):
            return
        if letter.call in self._peer.watches:
            self._peer.watches.pop(letter.call).hear("no_such_actor")
        else:
            self._late(letter.call)

    def _late(self, number: int) -> None:
        """Drop an answer that nobody waits for any more; one to a call that was never made is a violation."""
        if not 0 < number <= self._peer.last_call:
            raise ProtocolViolation(f"{self._peer.node} answers call {number}, which was never made")
        self.late_answers += 1

    def _hear_hindered_ask(self, letter: Ask[Any], heard_s: float) -> None:
        """Take an ask that may have to be refused: for nobody, one too many, or whose answer would not be read."""
        call = self._new_call(letter.call, InCall(self._peer, self.link, letter.call, None))
        try:
            if call is not None:
                call.cell = self._system.cell(letter.target)
                if self.link.waiting_bytes > self._peer.max_waiting_bytes:
                    raise LinkFull(f"{self._peer.node} does not read its answers", retry_after_s=0.1)
                self._system.deadlines.note(heard_s + letter.ttl_s)
                call.cell.put(letter.body, call, heard_s + letter.ttl_s, letter.trace, False)
        except SllmError as error:
            assert call is not None
            call.set_exception(error)

    def _hear_stream(self, letter: OpenStream[Any]) -> None:
        if letter.credit < 1 or letter.window_bytes < 1:
            raise ProtocolViolation(f"{self._peer.node} opens a stream without credit")
        stream = InStream(self._peer, self.link, letter.call, None, letter.credit, letter.window_bytes)
        call = self._new_call(letter.call, stream)
        try:
            if call is not None:
                call.cell = self._system.cell(letter.target)
                call.cell.put(letter.body, call, inf, letter.trace, True)
        except SllmError as error:
            stream.set_exception(error)

    def _new_call(self, number: int, call: InCall) -> InCall | None:
        """Note a call from there; one too many is refused."""
        if number in self._incoming:
            raise ProtocolViolation(f"{self._peer.node} makes call {number} twice")
        if len(self._incoming) >= self._max_calls:
            error = Overloaded(f"{self._max_calls} calls from {self._peer.node} run already", retry_after_s=1.0)
            self._peer.send(failure_of(number, error), number)
            return None
        self._incoming[number] = call
        return call

    def _hear_tell(self, letter: Tell[Any]) -> None:
        try:
            self._system.cell(letter.target).put(letter.body, None, inf, letter.trace, False)
        except SllmError as error:
            self._system.dead_letter(letter.target, type(letter.body).__name__, error)

    def _hear_cancel(self, letter: Cancel) -> None:
        call = self._peer.incoming.pop(letter.call, None)
        if call is not None:
            call.call_off()

    def _hear_credit(self, letter: Credit) -> None:
        call = self._peer.incoming.get(letter.call)
        if isinstance(call, InStream):
            call.credited(letter.items)

    def _hear_watch(self, letter: Watch) -> None:
        watch = InWatch(self._peer, self.link, letter.call, None)
        if self._new_call(letter.call, watch) is not None:
            watch.stop_watching = self._system.watch(self._system.ref(letter.target), watch.set_result)

    def _hear_beat(self, letter: Beat) -> None:
        assert self._peer.link is not None
        self._peer.link.heartbeat.hear_beat(letter)

    def _hear_echo(self, letter: Echo) -> None:
        assert self._peer.link is not None
        self._peer.link.heartbeat.hear_echo(letter)

    def _hear_goodbye(self, letter: Goodbye) -> None:
        self._peer.said_goodbye = letter.reason in (CLOSING, DECLARED_DOWN)
        if self._peer.link is not None:
            self._peer.link.close(NodeUnreachable(f"{self._peer.node} said goodbye: {letter.reason[:100]}"))

    def _hear_misread(self, letter: Misread) -> None:
        self._misread += 1
        if self._misread & (self._misread - 1) == 0:
            log.warning("letter %d of %s can't be read: %.200s", self._misread, self._peer.node, letter.error)
        if letter.kind in wire_letters.ASK_KINDS:
            self._peer.send(failure_of(letter.call, letter.error), letter.call)
        elif letter.kind == wire_letters.TELL:
            self._system.dead_letter(f"an actor here, from {self._peer.node}", "a message", letter.error)
        else:
            error = FrameInvalid(f"the answer to call {letter.call} can't be read: {letter.error}")
            if self._peer.fail_call(letter.call, error):
                self._peer.send(Cancel(letter.call), letter.call)
            else:
                self._late(letter.call)
