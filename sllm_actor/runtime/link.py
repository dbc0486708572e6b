"""One connection to one peer on an event loop: moves a `Wire`'s bytes, gathers small frames, interleaves large ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, cast

import msgspec
from msgspec import Raw

from sllm_actor.errors import (
    FrameTooLong,
    HandshakeRefused,
    LinkFull,
    NodeUnreachable,
    ProtocolViolation,
    SllmError,
)
from sllm_actor.runtime.calls import wake
from sllm_actor.runtime.clock import Clock
from sllm_actor.runtime.handshake import Hello
from sllm_actor.runtime.heartbeat import Heartbeat
from sllm_actor.runtime.letters import WRITE_ERRORS, Goodbye, Item, LetterCodec, Tell, lane_of
from sllm_actor.runtime.limits import Limits
from sllm_actor.runtime.link_owner import LinkOwner
from sllm_actor.runtime.network import tune
from sllm_actor.runtime.security import certified_names
from sllm_actor.runtime.transfers import Outgoing
from sllm_actor.runtime.wire import (
    LETTERS,
    LETTERS_HEADER,
    MAX_BATCH_BYTES,
    Introduced,
    Opened,
    State,
    Wire,
    frames_of,
)

# More letters in one write than this, and the two processes would work in turns instead of side by side.
GATHERED_LETTERS = 32
CHUNKS_PER_TURN = 4
FRAME_OVERHEAD_BYTES = 3
# What a letter that waits takes beside its bytes.
LETTER_COST_BYTES = 64
SELDOM_ANSWERED = (Item, Tell)  # Whoever hears one seldom writes back at once.


class Link(asyncio.BufferedProtocol):
    """Sends and receives letters over one connection. Belongs to one event loop."""

    def __init__(self, wire: Wire, owner: LinkOwner, codec: LetterCodec, clock: Clock, limits: Limits) -> None:
        self.received_bytes = 0
        self.sent_bytes = 0
        # What waits for the peer to read, blobs apart.
        self.waiting_bytes = 0
        self.outgoing = Outgoing()
        self._write_frames: Callable[[Iterable[bytes | memoryview]], None] = self._write_each
        self._hindered = False
        # Whose letters these are, once it is open; and what else its owner knows it by.
        self.hear: Callable[[Sequence[Any]], None] = _ignore
        self.unsent: Callable[[Any, SllmError], None] = _ignore
        self.dialled: Callable[[SllmError | None], None] | None = None
        self.check_value = codec.check_value
        self.sendable = codec.values
        self.is_open = False
        self._wire = wire
        self._owner = owner
        self._codec = codec
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        # Gathered in this turn, to be encoded together; and encoded already, because something hinders them.
        self._letters: list[Any] = []
        self._small: list[bytes] = []
        self._write_letters = codec.write
        self._blobs = codec.blobs
        self._waiters: list[asyncio.Future[None]] = []
        self._flush_due = False
        self._paused = False
        self._error: SllmError | None = None
        self._ended = False
        self._max_letter_bytes = 0
        self._max_blob_bytes = 0
        self.heartbeat = Heartbeat(self, clock, limits)
        # The handshake has an end, whoever is silent.
        self._patience = self._loop.call_later(limits.handshake_timeout_s, self._give_up)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # Nothing waits in the transport: what can't be written now stays here, where small frames may pass large ones.
        self._transport.set_write_buffer_limits(high=1, low=0)
        if self._error is not None:
            self._transport.abort()
            return
        tune(self._transport)
        # asyncio's own `writelines` does not pause from Python 3.12 on; uvloop's does, and saves half of the calls.
        if type(transport).__module__.startswith("uvloop"):
            self._write_frames = self._transport.writelines
        tls = self._transport.get_extra_info("ssl_object")
        if tls is not None:
            self._wire.certified = certified_names(tls)
        self._write(self._wire.take_output())

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._wire.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        self.received_bytes += nbytes
        if self._error is not None:
            return
        try:
            came = self._wire.received(nbytes)
            if not self.is_open:
                self._shake(came)
            elif came:
                self.hear(came)
            if self._wire.violation is not None:
                raise self._wire.violation
        except ProtocolViolation as violation:
            self._write(self._wire.take_output())
            self.close(violation)
            return
        if came and self.is_open and type(came[-1]) not in SELDOM_ANSWERED:
            # Whatever the letters woke runs first, so that its answers are gathered into the same write.
            self._flush_later()

    def pause_writing(self) -> None:
        self._paused = self._hindered = True
        # Those of this turn go where later ones will, so that none is overtaken.
        while self._letters:
            self._send_one(self._letters.pop(0))

    def resume_writing(self) -> None:
        self._paused, self._hindered = False, bool(self.outgoing)
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._ended:
            return
        self._ended = True
        self.is_open = False
        self._patience.cancel()
        self._wake_waiters()
        self.heartbeat.stop()
        reason = f": {exc}" if exc is not None else ""
        error = self._error or NodeUnreachable(f"the connection to {self.peer_name} was lost{reason}")
        self._owner.closed(self, error)

    @property
    def peer_name(self) -> str:
        """The peer's node id, or a word for one that has not said it."""
        return self._wire.peer.node if self._wire.peer else "an unknown peer"

    def _shake(self, events: Sequence[Any]) -> None:
        self._write(self._wire.take_output())
        for index, event in enumerate(events):
            if isinstance(event, Introduced):
                self._owner.introduced(self, event.hello)
            elif isinstance(event, Opened):
                self._open(event.hello)
                if events[index + 1 :]:
                    self.hear(events[index + 1 :])
                return
        self._write(self._wire.take_output())

    def admit(self) -> None:
        """Welcome the introduced peer."""
        self._wire.admit()
        self._write(self._wire.take_output())
        assert self._wire.peer is not None
        self._open(self._wire.peer)

    def refuse(self, error: HandshakeRefused) -> None:
        """Send the introduced peer away; the link closes."""
        self._wire.refuse(error)
        self._write(self._wire.take_output())
        self.close(error)

    def _open(self, hello: Hello) -> None:
        self._patience.cancel()
        self.is_open = True
        self._max_letter_bytes = min(hello.max_frame_bytes, self._limits.max_frame_bytes) - FRAME_OVERHEAD_BYTES
        self._max_blob_bytes = self.outgoing.max_running_bytes = hello.max_blob_bytes
        self.heartbeat.start()
        self._owner.opened(self, hello)

    def _give_up(self) -> None:
        within = f"within {self._limits.handshake_timeout_s:g} s"
        self.close(NodeUnreachable(f"{self.peer_name} did not finish the handshake {within}"))

    def send(self, letter: tuple[Any, ...]) -> None:
        """Write an ask, a tell, an answer or an item at the end of this turn, or as soon as the peer reads.

        One that can't be written goes to `unsent` with the reason.
        """
        if self._hindered:
            self._send_one(letter)
            return
        letters = self._letters
        letters.append(letter)
        if len(letters) >= GATHERED_LETTERS:
            self._flush_letters()
        elif not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def send_control(self, letter: msgspec.Struct, lane: Hashable) -> None:
        """Write any other letter, in order with those of a lane: an actor's name, or a call's number."""
        data = self._codec.write(letter)
        if not self._hindered:
            self.send(Raw(data))  # type: ignore[arg-type]
        elif not self.outgoing or not self.outgoing.hold(lane, data):
            self._put(data)

    def send_item(self, letter: tuple[Any, ...]) -> int:
        """Send like `send`, but encode at once and give the size in bytes, with that of its blobs.

        Raises:
            FrameInvalid: it can't be written.
            FrameTooLong: it is larger than the peer takes.
            LinkFull: it has blobs, and too many bytes of those wait already.
        """
        if self._hindered:
            return self._send_now(letter)
        try:
            data = self._codec.write(letter)
        except WRITE_ERRORS as error:
            raise self._codec.unwritable(error) from error
        size = len(data)
        if self._blobs or size > self._max_letter_bytes:
            self._blobs.clear()
            self._flush_letters()
            return self._send_now(letter)
        self.send(Raw(data))  # type: ignore[arg-type]
        return size

    def _send_one(self, letter: Any) -> None:
        try:
            self._send_now(letter)
        except SllmError as error:
            self.unsent(letter, error)

    def _send_now(self, letter: Any) -> int:
        """Encode a letter by itself: one that is large, has blobs, or comes while the peer does not read."""
        if isinstance(letter, Raw):
            # Encoded when it was sent; one of an open lane, or it would have been held already.
            self._put(bytes(letter))
            return 0
        lane = lane_of(letter)
        written = self._codec.encode(letter)
        size = len(written.data)
        if size > self._max_letter_bytes:
            raise FrameTooLong(f"a message of {size} bytes; {self.peer_name} takes {self._max_letter_bytes}")
        if written.blobs:
            return self._send_with_blobs(letter, lane)
        if self.outgoing:
            if size + self.outgoing.held_letter_bytes > self._limits.link_buffer_bytes:
                raise LinkFull(f"too much waits behind a transfer to {self.peer_name}", retry_after_s=0.1)
            if self.outgoing.hold(lane, written.data):
                return size
        self._put(written.data)
        return size

    def _put(self, data: bytes) -> None:
        if self._error is not None:
            return
        self.waiting_bytes += len(data) + LETTER_COST_BYTES
        if self.waiting_bytes > self._limits.link_unread_bytes:
            self.close(NodeUnreachable(f"{self.peer_name} does not read what it asks for"))
            return
        self._small.append(data)
        self._flush_later()

    async def room(self) -> None:
        """Wait until what has piled up is written, or the link is lost."""
        while self.waiting_bytes > self._limits.link_buffer_bytes and self.is_open:
            waiter = self._loop.create_future()
            self._waiters.append(waiter)
            await waiter

    def _send_with_blobs(self, letter: object, lane: Hashable) -> int:
        written = self._codec.encode(letter, transfer := self.outgoing.number())
        blob_bytes = sum(map(len, written.blobs))
        if len(written.data) > self._max_letter_bytes or blob_bytes > self._max_blob_bytes:
            takes = f"{self.peer_name} takes {self._max_letter_bytes} and {self._max_blob_bytes}"
            raise FrameTooLong(f"a message of {len(written.data)} bytes with blobs of {blob_bytes}; {takes}")
        held = self.outgoing.held_bytes
        if held and held + blob_bytes > self._limits.link_blob_bytes:
            raise LinkFull(f"{held} bytes wait for {self.peer_name} already", retry_after_s=0.1)
        self._hindered = True
        self.outgoing.send(lane, written.data, transfer, written.blobs)
        self._flush_later()
        return len(written.data) + blob_bytes

    def _flush_later(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        if self._paused or self._transport is None or self._ended:
            return
        if self._small:
            self._flush_small()
        if self._letters and not self._paused:
            self._flush_letters()
        if self.outgoing.lanes and not self._paused:
            self._flush_chunks()

    def _flush_letters(self) -> None:
        """Encode and write what was gathered, as one frame; letter by letter where that can't be."""
        if self._small:
            self._flush_small()
            if not self._letters:
                return
        letters, self._letters = self._letters, []
        try:
            data = self._write_letters(letters)
        except WRITE_ERRORS:
            data = b""
        count = len(letters)
        # MessagePack writes the number of up to 15 elements in one byte; here it always has two.
        skipped = 1 if count < 16 else 3
        size = len(data) - skipped + 3
        if self._blobs or not data or size > MAX_BATCH_BYTES:
            self._blobs.clear()
            for letter in letters:
                self._send_one(letter)
            return
        self._write(LETTERS_HEADER.pack(size, LETTERS, count) + data[skipped:])

    def _flush_small(self) -> None:
        """Write letters that were encoded one by one, in frames that keep to the bounds of a batch."""
        waiting, self._small = self._small, []
        self.waiting_bytes = 0
        self._wake_waiters()
        self._write(frames_of(waiting))

    def _write_each(self, frames: Iterable[bytes | memoryview]) -> None:
        assert self._transport is not None
        for frame in frames:
            self._transport.write(frame)

    def _wake_waiters(self) -> None:
        while self._waiters:
            wake(self._waiters.pop(0))

    def _flush_chunks(self) -> None:
        assert self._transport is not None
        for _ in range(CHUNKS_PER_TURN):
            frames = self.outgoing.next_frames(self._small)
            if frames:
                self.sent_bytes += sum(map(len, frames))
                self._write_frames(frames)
            if self._small and not self._paused:
                self._flush_small()
            self._hindered = self._paused or bool(self.outgoing)
            if self._paused or not self.outgoing:
                return
        self._flush_due = True
        self._loop.call_soon(self._flush)

    def _write(self, data: bytes) -> None:
        if data and self._transport is not None and not self._ended:
            self.sent_bytes += len(data)
            self._transport.write(data)

    def goodbye(self, reason: str) -> None:
        """Say why, and close once everything is written."""
        if self.is_open:
            self.send_control(Goodbye(reason=reason), None)
            self._flush()
        self.close(NodeUnreachable(f"the connection to {self.peer_name} was closed: {reason}"))

    def close(self, error: SllmError) -> None:
        """Close the connection; `closed` follows with this error."""
        if self._error is None:
            self._error = error
        self._patience.cancel()
        self.is_open, self._wire.state = False, State.CLOSED
        if self._transport is None:
            # It never was a connection, so none will be lost.
            self.connection_lost(None)
        elif self._paused:
            # A peer that does not read would keep a polite close waiting for ever.
            self._transport.abort()
        else:
            self._transport.close()

    def abort(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()


def _ignore(*_: Any) -> None:
    """Stand in until the link is open."""
