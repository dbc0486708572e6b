"""One direction of a connection in memory, as TCP has it: bytes in order, once, cut anywhere, late, and bounded.

What is written waits in the transport's buffer while the window is full; in the window is what two kernels and the
wire hold and the peer has not yet read. One timer carries whatever is due.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections import deque
from math import inf
from typing import TYPE_CHECKING

from sllm_actor.testing.simulated_link import RETRANSMIT_S, Link, Power

if TYPE_CHECKING:
    from sllm_actor.testing.simulated_transport import SimulatedTransport
    from sllm_actor.testing.trace import TraceRecorder
    from sllm_actor.testing.virtual_loop import VirtualLoop

WINDOW_BYTES = 256 * 1024
# On a link of some bandwidth a large write arrives piece by piece.
SEGMENT_BYTES = 64 * 1024
# How often a read takes all that is there, and how often a single byte.
WHOLE = 0.7
ONE_BYTE = 0.05
# A slow reader reads what it may in this time at once.
READ_QUANTUM_S = 0.01
# Slow readers of one host take turns by chance, this far apart.
TURN_S = 0.000_001
Data = bytes | bytearray | memoryview


class Segment:
    """Writes that arrive together; none at all stand for the end of the stream."""

    __slots__ = ("arrival_s", "sent_s", "writes")

    def __init__(self, sent_s: float, arrival_s: float, writes: list[bytes]) -> None:
        self.sent_s = sent_s
        self.arrival_s = arrival_s
        self.writes = writes


class Pipe:
    """One direction of a connection, from the end that writes to the end that reads."""

    __slots__ = (
        "_dice",
        "_last_arrival_s",
        "_loop",
        "_offset_s",
        "_refilling",
        "_reset_owed",
        "_resetting",
        "_segments",
        "_timer",
        "_torn",
        "_trace",
        "_unacknowledged_bytes",
        "_window_bytes",
        "back",
        "broken",
        "in_hand_bytes",
        "link",
        "mute",
        "sink",
        "source",
        "unsent",
    )
    back: Pipe
    sink: SimulatedTransport
    source: SimulatedTransport

    def __init__(
        self, loop: VirtualLoop, dice: random.Random, trace: TraceRecorder, link: Link, *, torn: bool = True
    ) -> None:
        self._loop = loop
        self._dice = dice
        self._trace = trace
        # A reader takes what is there in pieces of any size.
        self._torn = torn
        self.link = link
        # The transport's buffer.
        self.unsent = bytearray()
        self._segments: deque[Segment] = deque()
        self._window_bytes = 0
        # Read, but the writer has not been told: the way back is blocked.
        self._unacknowledged_bytes = 0
        # Being given to the reader in this very moment.
        self.in_hand_bytes = 0
        self._last_arrival_s = 0.0
        # Each connection takes its own way, so that they overtake each other.
        self._offset_s = link.jitter_s * dice.random()
        self._timer: asyncio.TimerHandle | None = None
        self._refilling = False
        self._resetting = False
        self._reset_owed = False
        # What is written vanishes: this way is no more.
        self.broken = False
        # Nobody answers for an end that is gone.
        self.mute = False

    # The end that writes.

    def send(self, data: Data) -> None:
        """Take bytes from the writer: into the window while there is room, else into the buffer."""
        if self.broken:
            return
        room = WINDOW_BYTES - self._window_bytes
        if self.unsent or self.source.host.frozen:
            self.unsent += data
        elif len(data) <= room:
            self._dispatch(data)
        else:
            view = memoryview(data)
            if room > 0:
                self._dispatch(view[:room])
            self.unsent += view[max(room, 0) :]

    def _dispatch(self, data: Data) -> None:
        self._window_bytes += len(data)
        now_s = self._loop.now_s
        link = self.link
        if link.bandwidth_bytes_per_s == inf:
            if self._segments and self._segments[-1].sent_s == now_s:
                self._segments[-1].writes.append(bytes(data))
            else:
                self._put(now_s, now_s, [bytes(data)])
            return
        for start in range(0, len(data), SEGMENT_BYTES):
            piece = bytes(data[start : start + SEGMENT_BYTES])
            link.free_s = max(link.free_s, now_s) + len(piece) / link.bandwidth_bytes_per_s
            # Later writes of this moment come after it, so nothing is added to it.
            self._put(-inf, link.free_s, [piece])

    def _put(self, sent_s: float, gone_s: float, writes: list[bytes]) -> None:
        arrival_s = gone_s + self._offset_s + self.link.delay_s(self._dice)
        self._last_arrival_s = max(arrival_s, self._last_arrival_s)
        self._segments.append(Segment(sent_s, self._last_arrival_s, writes))
        if self._timer is None:
            self._timer = self._loop.call_at(self._last_arrival_s, self._run, context=self.sink.context)

    def send_end(self) -> None:
        """Tell the reader, after all bytes, that no more will come."""
        if not self.broken:
            self._put(-inf, self._loop.now_s, [])

    def send_reset(self) -> None:
        """Tell the reader that the connection is no more; a partition may swallow that."""
        if not self._resetting:
            self._resetting = True
            at_s = max(self._loop.now_s + self.link.delay_s(self._dice), self._last_arrival_s)
            self._loop.call_at(at_s, self._reset_arrives, context=self.sink.context)

    def _reset_arrives(self) -> None:
        self._resetting = False
        if self.link.blocked:
            self._reset_owed = True
        else:
            self.sink.lose(reset_by_peer())

    def refill(self) -> None:
        """Move bytes from the buffer into the window."""
        self._refilling = False
        source = self.source
        if source.over or source.host.frozen:
            return
        size = min(WINDOW_BYTES - self._window_bytes, len(self.unsent))
        if size > 0:
            moved = bytes(self.unsent[:size])
            del self.unsent[:size]
            self._dispatch(moved)
        source.drained()

    def break_off(self) -> None:
        """Lose what is on its way, and all that will be written."""
        self.broken = True
        self._segments.clear()
        self.unsent.clear()
        self._disarm()

    # The end that reads.

    def poke(self) -> None:
        """Look again whether something can be read: what stood in the way may have gone."""
        if self._segments and self._timer is None:
            self._arm(max(self._segments[0].arrival_s, self._loop.now_s))

    def not_before(self, moment_s: float) -> None:
        """Let nothing arrive before a moment."""
        self._last_arrival_s = max(self._last_arrival_s, moment_s)

    def has_unread(self) -> bool:
        """Tell whether bytes have arrived that the reader has not taken."""
        segments = self._segments
        return self.in_hand_bytes > 0 or bool(segments and segments[0].writes and self._is_due(segments[0]))

    def unblock(self) -> None:
        """Go on after a partition: what it held back is sent once more."""
        link = self.link
        again_s = self._loop.now_s + link.delay_s(self._dice) + RETRANSMIT_S * self._dice.random()
        for segment in self._segments:
            if segment.arrival_s > link.blocked_since_s:
                segment.arrival_s = max(segment.arrival_s, again_s)
                self._last_arrival_s = max(self._last_arrival_s, again_s)
        if self._reset_owed:
            self._reset_owed = False
            self.send_reset()

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, at_s: float) -> None:
        self._timer = self._loop.call_at(at_s, self._run, context=self.sink.context)

    def _is_due(self, segment: Segment) -> bool:
        return segment.arrival_s <= self._loop.now_s and segment.arrival_s <= self.link.blocked_since_s

    def _run(self) -> None:
        self._timer = None
        sink = self.sink
        if sink.over:
            self._arrive_at_nobody()
            return
        host = sink.host
        if not sink.can_read:
            return
        if host.read_free_s > self._loop.now_s:
            self._arm_next()
            return
        writes: list[bytes] = []
        segments, until_s = self._segments, min(self._loop.now_s, self.link.blocked_since_s)
        while segments and segments[0].arrival_s <= until_s and segments[0].writes:
            writes += segments.popleft().writes
        if writes:
            self._give(writes[0] if len(writes) == 1 else b"".join(writes))
        elif segments and segments[0].arrival_s <= until_s:
            segments.popleft()
            sink.hear_end()
        if segments and sink.can_read:
            self._disarm()
            self._arm_next()

    def _arm_next(self) -> None:
        first_s = self._segments[0].arrival_s
        if first_s <= self.link.blocked_since_s:
            turn_s = self.sink.host.read_free_s
            if turn_s > self._loop.now_s:
                turn_s += TURN_S * self._dice.random()
            self._arm(max(first_s, turn_s, self._loop.now_s))

    def _give(self, data: bytes) -> None:
        """Let the reader take bytes, in pieces of any size, as long as it wants to."""
        sink, protocol = self.sink, self.sink.protocol
        host = sink.host
        rate = host.read_bytes_per_s
        if rate == inf and not self._torn and self._gives_whole(data):
            return
        limit = len(data) if rate == inf else min(len(data), max(1, int(rate * READ_QUANTUM_S)))
        taken = 0
        with memoryview(data) as view:
            while taken < limit and sink.can_read:
                buffer = memoryview(protocol.get_buffer(-1))
                size = min(self._piece(limit - taken), len(buffer))
                assert size > 0, "get_buffer() gave an empty buffer"
                buffer[:size] = view[taken : taken + size]
                taken += size
                self.in_hand_bytes = len(data) - taken
                protocol.buffer_updated(size)
            self.in_hand_bytes = 0
            self._trace.read(host.name, sink.number, view[:taken])
            if taken < len(data) and not sink.over:
                self._segments.appendleft(Segment(-inf, self._loop.now_s, [bytes(view[taken:])]))
        if rate < inf:
            host.read_free_s = self._loop.now_s + taken / rate
        self._acknowledge(taken)

    def _gives_whole(self, data: bytes) -> bool:
        """Let the reader take all of it at once; false where it has no room for that."""
        sink, size = self.sink, len(data)
        buffer = memoryview(sink.protocol.get_buffer(-1))
        if len(buffer) < size:
            return False
        buffer[:size] = data
        sink.protocol.buffer_updated(size)
        self._trace.read(sink.host.name, sink.number, memoryview(data))
        self._acknowledge(size)
        return True

    def _piece(self, size: int) -> int:
        if not self._torn:
            return size
        chance = self._dice.random()
        if chance < WHOLE or size == 1:
            return size
        if chance < WHOLE + ONE_BYTE:
            return 1
        return self._dice.randrange(1, size)

    def _acknowledge(self, size: int) -> None:
        if self.back.link.blocked:
            self._unacknowledged_bytes += size
            return
        self._window_bytes -= size
        # The writer needs to hear of it only where it waits.
        if self.unsent and not self._refilling:
            self._refilling = True
            delay_s = self.back.link.delay_s(self._dice)
            self._loop.call_later(delay_s, self.refill, context=self.source.context)

    def acknowledge_again(self) -> None:
        """Tell the writer what it could not be told while the way back was blocked."""
        size, self._unacknowledged_bytes = self._unacknowledged_bytes, 0
        if size:
            self._acknowledge(size)

    def _arrive_at_nobody(self) -> None:
        """The reader is gone: its machine answers bytes with a reset, if it answers at all."""
        if self.mute or self.sink.host.power is Power.DARK:
            return
        meant_for_someone = False
        while self._segments and self._is_due(self._segments[0]):
            meant_for_someone |= bool(self._segments.popleft().writes)
        if meant_for_someone:
            self.back.send_reset()
        if self._segments:
            self._arm_next()


def reset_by_peer() -> ConnectionResetError:
    """Make the error that a reset connection ends with."""
    return ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
