"""Two ends of one connection without a socket, and the frames that go between them, honest or not."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from sllm_actor.runtime.handshake import Hello
from sllm_actor.runtime.letters import Goodbye, LetterCodec
from sllm_actor.runtime.limits import Limits
from sllm_actor.runtime.values import Blob, FreeForm
from sllm_actor.runtime.wire import FIRST_SCRATCH_BYTES, SCRATCH_BYTES, Role, State, Wire

SECRET = bytes(range(32))
# Small, so that a test reaches every bound with little data.
LIMITS = Limits(max_blob_bytes=1024 * 1024)
MAX_FRAME_BYTES = LIMITS.max_frame_bytes
ALL_AT_ONCE = 2**62


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", forbid_unknown_fields=True):
    """Base of the messages of the tests' table."""


class Note(Message, frozen=True, tag="note"):
    text: str
    number: int = 0


class Parcel(Message, frozen=True, tag="parcel"):
    blob: Blob
    more: tuple[Blob, ...] = ()


class Loose(Message, frozen=True, tag="loose"):
    anything: FreeForm


class Pointer(Message, frozen=True, tag="pointer"):
    ref: Ref


class Ref(NamedTuple):
    """Stands for the runtime's reference to an actor."""

    node: str
    endpoint: str
    uid: int
    name: str


TABLE: tuple[type, ...] = (Note, Parcel, Loose, Pointer)


def read_reference(raw: Any) -> Ref:
    if type(raw) is not list or [type(field) for field in raw] != [str, str, int, str]:
        raise ValueError("a reference is written as node, endpoint, uid and name")
    return Ref(*raw)


def codec(table: Iterable[type] = TABLE) -> LetterCodec:
    # A tuple is written as an array before any hook is asked, as the runtime's own references are by theirs.
    return LetterCodec(table, tuple, read_reference, Ref)


def encoded(letter: object, transfer: int = 0) -> bytes:
    """Write a letter; the one place of the tests that knows how that is called."""
    return bytes(codec().encode(letter, transfer).data)


def hello(node: str = "dialer", **changes: Any) -> Hello:
    said: dict[str, Any] = {
        "version_min": 1,
        "version_max": 1,
        "node": node,
        "uid": 7,
        "nonce": (node.encode() * 32)[:32],
        "endpoint": "",
        "secured": True,
        "links": 0,
        "max_frame_bytes": LIMITS.max_frame_bytes,
        "max_blob_bytes": LIMITS.max_blob_bytes,
    }
    return Hello(**(said | changes))


def dialer(said: Hello | None = None, *, secret: bytes = SECRET, limits: Limits = LIMITS, expected: str = "") -> Wire:
    ours = said or hello("dialer", secured=bool(secret))
    return Wire(Role.DIALER, ours, codec(), limits, secret, expected_node=expected)


def acceptor(said: Hello | None = None, *, secret: bytes = SECRET, limits: Limits = LIMITS) -> Wire:
    return Wire(Role.ACCEPTOR, said or hello("acceptor", secured=bool(secret)), codec(), limits, secret)


def feed(wire: Wire, data: bytes, pieces: Iterable[int] = ()) -> list[Any]:
    """Let bytes arrive as a transport brings them: into `buffer()`, in these pieces, the rest as large as may be."""
    events: list[Any] = []
    position = 0
    for piece in itertools.chain(pieces, itertools.repeat(ALL_AT_ONCE)):
        if position == len(data):
            return events
        room = wire.buffer()
        assert len(room) > 0
        count = min(len(room), piece, len(data) - position)
        room[:count] = data[position : position + count]
        position += count
        del room
        events += wire.received(count)
    raise AssertionError("unreachable")


class Opening(NamedTuple):
    """A handshake as it went: what each side sent, step by step."""

    dialer: Wire
    acceptor: Wire
    first: bytes
    answer: bytes
    proof: bytes
    welcome: bytes


def opening(dialling: Wire | None = None, accepting: Wire | None = None) -> Opening:
    """Shake hands to the end."""
    dialling, accepting = dialling or dialer(), accepting or acceptor()
    feed(accepting, first := dialling.take_output())
    feed(dialling, answer := accepting.take_output())
    feed(accepting, proof := dialling.take_output())
    accepting.admit()
    feed(dialling, welcome := accepting.take_output())
    assert dialling.state is State.OPEN
    assert accepting.state is State.OPEN
    return Opening(dialling, accepting, first, answer, proof, welcome)


def opened(limits: Limits = LIMITS) -> Wire:
    """Give an acceptor whose connection is open."""
    return opening(dialer(limits=limits), acceptor(limits=limits)).acceptor


# Frames, written by hand: they may say what our own encoder never would.


def frame(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def letters_frame(*raws: bytes) -> bytes:
    return frame(struct.pack(">BH", 0xDC, len(raws)) + b"".join(raws))


def letters(*sent: object) -> bytes:
    return letters_frame(*map(encoded, sent))


def begin(transfer: int, sizes: Sequence[int], total: int | None = None) -> bytes:
    body = msgspec.msgpack.encode((transfer, list(sizes), sum(sizes) if total is None else total))
    return frame(body)


def chunk(transfer: int, data: bytes) -> bytes:
    return frame(struct.pack(">BBIBI", 0x92, 0xCE, transfer, 0xC6, len(data)) + data)


def abort(transfer: int) -> bytes:
    return frame(msgspec.msgpack.encode((transfer,)))


def step(**fields: Any) -> bytes:
    """Write one frame of a handshake."""
    return frame(msgspec.msgpack.encode(fields))


def held_bytes(wire: Wire) -> int:
    """Count what a wire keeps: its scratch buffer, and the blobs that have come or are announced.

    The smaller buffer of one that has carried little counts as the usual one.
    """
    incoming = wire._incoming
    blobs = sum(len(buffer) for arriving in incoming._transfers.values() for buffer in arriving.buffers)
    assert incoming._held_bytes == blobs
    assert incoming.running == sum(not arriving.complete for arriving in incoming._transfers.values())
    scratch = len(wire._scratch)
    return (SCRATCH_BYTES if scratch == FIRST_SCRATCH_BYTES else scratch) + blobs


def between_frames(wire: Wire) -> bool:
    """Tell whether everything that came has been taken, by saying goodbye and hearing of it at once."""
    said = Goodbye(reason="test")
    return feed(wire, letters(said)) == [said]
