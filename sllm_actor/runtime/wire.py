"""One connection between two nodes as a state machine: bytes in, letters out. No socket, no clock, no loop in here.

    dialer                                 acceptor
      │ preface, Hello ────────────────────▶ │
      │ ◀──────────────────── preface, Hello │      or Refused, and the end
      │ Proof ─────────────────────────────▶ │
      │                                      │      its owner admits the peer, or refuses it
      │ ◀────────────────── Proof, Welcome   │
      │ ◀───────── letters, chunks ────────▶ │

A frame is a 4-byte big-endian length and a MessagePack body. Once open, the first byte of a body tells what it is: an
array16 holds letters; arrays of one, two and three are transfers of blobs (abort, chunk, begin). The length is checked
before anything of the body is kept, and chunks are received into the buffer that the message will have.
Source of the idea: h11 (a protocol without I/O, its rules one table).
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from sllm_actor.errors import FrameInvalid, FrameTooLong, HandshakeRefused, ProtocolViolation, from_code
from sllm_actor.runtime import handshake
from sllm_actor.runtime.handshake import PREFACE, Hello, Proof, Refused, Welcome
from sllm_actor.runtime.letters import LetterCodec, Misread, read_misread
from sllm_actor.runtime.limits import Limits
from sllm_actor.runtime.transfers import ABORT, BEGIN, CHUNK, CHUNK_HEADER, Incoming

LENGTH = struct.Struct(">I")
LETTERS_HEADER = struct.Struct(">IBH")
LETTERS = 0xDC
SCRATCH_BYTES = 64 * 1024
# What a connection has before a read has filled it: most carry little, and a gateway has one to each node.
FIRST_SCRATCH_BYTES = 4 * 1024
# Beside a transfer only headers should come through the scratch buffer; what it holds of a chunk is copied once more.
SCRATCH_IN_TRANSFER_BYTES = 4 * 1024
# A frame of several letters stays small, so that tiny letters can't unfold into much memory; one alone may be larger.
MAX_BATCH_BYTES = 64 * 1024
MAX_BATCH_LETTERS = 1024


class Role(enum.Enum):
    """Who dialled."""

    DIALER = "dialer"
    ACCEPTOR = "acceptor"


class State(enum.Enum):
    """How far a connection is. What may come next is in `_STEPS`."""

    PREFACE = "waits for the preface"
    HELLO = "waits for the hello"
    PROOF = "waits for the proof"
    ADMISSION = "waits for its owner to admit the peer"
    WELCOME = "waits to be welcomed"
    OPEN = "open"
    CLOSED = "closed"


class Introduced(NamedTuple):
    """The acceptor's peer has proved who it is; `admit` or `refuse` must follow."""

    hello: Hello


class Opened(NamedTuple):
    """Letters may be sent."""

    hello: Hello


class Wire:
    """One connection's state. Its owner moves the bytes, by `buffer` and `received`, and by `take_output`.

    `certified` holds the node ids that the peer's TLS certificate is for, None without TLS.
    """

    def __init__(
        self,
        role: Role,
        hello: Hello,
        codec: LetterCodec,
        limits: Limits,
        secret: bytes,
        *,
        expected_node: str = "",
    ) -> None:
        self.state = State.PREFACE
        self.peer: Hello | None = None
        # Why it is closed, where letters came before; `received` raises it where none did.
        self.violation: ProtocolViolation | None = None
        self.certified: frozenset[str] | None = None
        assert limits.max_frame_bytes >= handshake.MIN_FRAME_BYTES, "a chunk must fit"
        self._role = role
        self._hello = hello
        self._secret = secret
        self._expected_node = expected_node
        self._max_body_bytes = limits.max_frame_bytes
        self._incoming = Incoming(limits)
        self._decode_letters: Callable[[Any], list[Any]] = codec.decoder(self._incoming.take).decode
        self._usual_bytes = FIRST_SCRATCH_BYTES
        self._scratch = bytearray(FIRST_SCRATCH_BYTES)
        self._view = memoryview(self._scratch)
        self._filled = 0
        self._output: list[bytes] = []
        self._our_hello = msgspec.msgpack.encode(hello)
        self._their_hello = b""
        if role is Role.DIALER:
            self._output.append(PREFACE + _frame(self._our_hello))

    # The bytes that go out while shaking hands.

    def take_output(self) -> bytes:
        """Give what is to be sent now, and forget it."""
        output, self._output = b"".join(self._output), []
        return output

    def _say(self, step: handshake.Step) -> None:
        self._output.append(_frame(msgspec.msgpack.encode(step)))

    # The bytes that come in.

    def buffer(self) -> memoryview:
        """Give the place where the next bytes go: `[1 or more]` bytes, valid until `received` is called."""
        rest = self._incoming.rest
        if rest is not None:
            return rest
        if self._incoming.running:
            return self._view[self._filled : self._filled + SCRATCH_IN_TRANSFER_BYTES]
        return self._view[self._filled :] if self._filled else self._view

    def received(self, count: int) -> Sequence[Any]:
        """Take note that `count` bytes were written into `buffer()`; give the letters and events that they complete.

        Raises:
            ProtocolViolation: the peer broke the protocol or is refused. Send what `take_output` gives, then close.
        """
        incoming = self._incoming
        if incoming.rest is not None:
            incoming.advance(count)
            return ()
        if self.state is not State.OPEN:
            return self._received_handshake(count)
        letters: list[Any] = []
        try:
            self._received_frames(0, self._filled + count, letters)
        except ProtocolViolation as violation:
            # What came before it was said well, and is heard first.
            self.state = State.CLOSED
            self.violation = violation
            if not letters:
                raise
        return letters

    def _received_frames(self, position: int, end: int, letters: list[Any]) -> None:
        scratch, incoming = self._scratch, self._incoming
        while end - position >= 5:
            (length,) = LENGTH.unpack_from(scratch, position)
            kind = scratch[position + 4]
            if length > self._max_body_bytes or length == 0:
                raise FrameTooLong(f"a frame of {length} bytes exceeds the bound of {self._max_body_bytes}")
            if kind == CHUNK:
                if end - position < CHUNK_HEADER.size:
                    break
                position += incoming.chunk(self._view[position:end], length)
                continue
            stop = position + 4 + length
            if stop > end:
                break
            body = self._view[position + 4 : stop]
            if kind == LETTERS:
                letters += self._letters(body)
            elif kind in (BEGIN, ABORT):
                incoming.control(body)
            else:
                raise FrameInvalid(f"a frame that begins with {kind:#x} is neither letters nor a transfer")
            position = stop
        if end == FIRST_SCRATCH_BYTES:
            self._usual_bytes = SCRATCH_BYTES
        if position == end and len(scratch) == self._usual_bytes:
            self._filled = 0
        else:
            self._keep(position, end)

    def _keep(self, position: int, end: int) -> None:
        """Move what is left of a frame to the front, into a larger buffer if it needs one."""
        left = self._filled = end - position
        needed = 0
        if left >= 4 and self.state is not State.PREFACE:
            (length,) = LENGTH.unpack_from(self._scratch, position)
            if length > max(self._max_body_bytes, handshake.MAX_HANDSHAKE_FRAME_BYTES):
                raise FrameTooLong(f"a frame of {length} bytes exceeds the bound of {self._max_body_bytes}")
            # What follows the header of a chunk does not come here.
            needed = 4 + length if left > 4 and self._scratch[position + 4] != CHUNK else 0
        if needed > FIRST_SCRATCH_BYTES:
            self._usual_bytes = SCRATCH_BYTES
        size = max(self._usual_bytes, needed)
        if size != len(self._scratch):
            rest = self._view[position:end]
            self._scratch = bytearray(size)
            self._view = memoryview(self._scratch)
            self._view[:left] = rest
        elif left and position:
            self._scratch[:left] = self._scratch[position:end]

    def _letters(self, body: memoryview) -> list[Any]:
        length = len(body)
        if length < 3:
            raise FrameInvalid("a frame of letters that ends before their number")
        count = body[1] << 8 | body[2]
        if count > 1 and (length > MAX_BATCH_BYTES or count > MAX_BATCH_LETTERS):
            raise FrameTooLong(f"a frame of {count} letters and {length} bytes; several may have {MAX_BATCH_BYTES}")
        try:
            letters = self._decode_letters(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            letters = self._letters_one_by_one(body)
        if self._incoming.claimed:
            self._incoming.forget_claimed()
        return letters

    def _letters_one_by_one(self, body: memoryview) -> list[Any]:
        """Find the letter that can't be read. Where its sender can be told of it, the others stand."""
        letters: list[Any] = []
        for raw in read_misread(body):
            try:
                letters += self._decode_letters(b"\xdc\x00\x01" + bytes(raw))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                letters.append(Misread.of(raw, error))
                self._incoming.forget_complete()
        return letters

    # The handshake.

    def _received_handshake(self, count: int) -> list[Any]:
        events: list[Any] = []
        end, position = self._filled + count, 0
        try:
            while self.state is not State.OPEN:
                used = self._step(position, end, events)
                if not used:
                    self._keep(position, end)
                    return events
                position += used
            # Letters may follow the welcome in the same bytes.
            self._received_frames(position, end, events)
        except ProtocolViolation as violation:
            self._fail(violation)
            self.violation = violation
            if not any(isinstance(event, Opened) for event in events):
                raise
        return events

    def _step(self, position: int, end: int, events: list[Any]) -> int:
        """Read one piece of the handshake; give its size, 0 where it has not come whole."""
        left = end - position
        if self.state is State.PREFACE:
            begun = bytes(self._view[position : position + min(left, len(PREFACE))])
            if not PREFACE.startswith(begun):
                raise FrameInvalid("the peer does not speak this protocol")
            if left < len(PREFACE):
                return 0
            self.state = State.HELLO
            return len(PREFACE)
        if left < 4:
            return 0
        length: int = LENGTH.unpack_from(self._scratch, position)[0]
        if length > handshake.MAX_HANDSHAKE_FRAME_BYTES:
            raise FrameTooLong(f"a handshake frame of {length} bytes exceeds {handshake.MAX_HANDSHAKE_FRAME_BYTES}")
        if left < 4 + length:
            return 0
        body = bytes(self._view[position + 4 : position + 4 + length])
        step = handshake.read_step(body)
        if isinstance(step, Refused):
            self.state = State.CLOSED
            error = from_code(step.code[:100], f"refused by the peer: {step.text[:500]}")
            raise error if isinstance(error, HandshakeRefused) else HandshakeRefused(error.message)
        act = _STEPS.get((self._role, self.state, type(step)))
        if act is None:
            raise FrameInvalid(f"a {type(step).__name__} came to a {self._role.value} that {self.state.value}")
        act(self, step, body, events)
        return 4 + length

    def _hear_hello(self, hello: Hello, body: bytes, events: list[Any]) -> None:
        self._their_hello = body
        if self._role is Role.ACCEPTOR:
            # Said even to a peer that is refused below, so that it can tell which versions would do.
            self._output.append(PREFACE + _frame(self._our_hello))
        handshake.check_hello(
            hello, expected_node=self._expected_node, secured=bool(self._secret), certified=self.certified
        )
        self.peer = hello
        if self._role is Role.DIALER:
            self._say(Proof(mac=self._mac(Role.DIALER)))
        self.state = State.PROOF

    def _hear_proof(self, proof: Proof, body: bytes, events: list[Any]) -> None:
        assert self.peer is not None
        other = Role.DIALER if self._role is Role.ACCEPTOR else Role.ACCEPTOR
        handshake.check_mac(proof.mac, self._mac(other))
        if self._role is Role.DIALER:
            self.state = State.WELCOME
        else:
            self.state = State.ADMISSION
            events.append(Introduced(self.peer))

    def _hear_welcome(self, welcome: Welcome, body: bytes, events: list[Any]) -> None:
        assert self.peer is not None
        self.state = State.OPEN
        events.append(Opened(self.peer))

    def _mac(self, role: Role) -> bytes:
        ours, theirs = self._our_hello, self._their_hello
        hellos = (ours, theirs) if self._role is Role.DIALER else (theirs, ours)
        return handshake.mac_of(self._secret, role.value.encode(), *hellos)

    def admit(self) -> None:
        """Welcome the introduced peer: the connection is open."""
        assert self.state is State.ADMISSION
        self._say(Proof(mac=self._mac(Role.ACCEPTOR)))
        self._say(Welcome())
        self.state = State.OPEN

    def refuse(self, error: HandshakeRefused) -> None:
        """Send the introduced peer away."""
        assert self.state is State.ADMISSION
        self._fail(error)

    def _fail(self, error: ProtocolViolation) -> None:
        if self._role is Role.ACCEPTOR and self._their_hello and self.state is not State.CLOSED:
            self._say(Refused(code=error.code, text=error.message[:500]))
        self.state = State.CLOSED


def frames_of(letters: Sequence[bytes]) -> bytes:
    """Put encoded letters into frames that keep to the bounds of a batch; one that is larger has a frame of its own."""
    frames: list[bytes] = []
    begin = size = 0
    for index, letter in enumerate(letters):
        if index > begin and (size + len(letter) > MAX_BATCH_BYTES - 3 or index - begin == MAX_BATCH_LETTERS):
            frames += (LETTERS_HEADER.pack(size + 3, LETTERS, index - begin), *letters[begin:index])
            begin, size = index, 0
        size += len(letter)
    frames += (LETTERS_HEADER.pack(size + 3, LETTERS, len(letters) - begin), *letters[begin:])
    return b"".join(frames)


def _frame(body: bytes) -> bytes:
    return LENGTH.pack(len(body)) + body


_STEPS: dict[tuple[Role, State, type], Callable[[Wire, Any, bytes, list[Any]], None]] = {
    (Role.ACCEPTOR, State.HELLO, Hello): Wire._hear_hello,
    (Role.ACCEPTOR, State.PROOF, Proof): Wire._hear_proof,
    (Role.DIALER, State.HELLO, Hello): Wire._hear_hello,
    (Role.DIALER, State.PROOF, Proof): Wire._hear_proof,
    (Role.DIALER, State.WELCOME, Welcome): Wire._hear_welcome,
}
