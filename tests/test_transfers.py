"""Transfers: what one end cuts into chunks the other puts together, in any interleaving; and liars are refused."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule
from test_wire import KIB, MIB, few, little_memory
from wire_pairs import (
    LIMITS,
    Message,
    Parcel,
    abort,
    begin,
    between_frames,
    chunk,
    codec,
    encoded,
    feed,
    frame,
    held_bytes,
    letters,
    letters_frame,
    opened,
)

from sllm_actor.errors import FrameInvalid, FrameTooLong, ProtocolViolation, SllmError
from sllm_actor.runtime.letters import Beat, Misread, Tell
from sllm_actor.runtime.limits import Limits
from sllm_actor.runtime.transfers import CHUNK_BYTES, MAX_BLOBS_PER_TRANSFER, Outgoing
from sllm_actor.runtime.values import Blob
from sllm_actor.runtime.wire import SCRATCH_BYTES, State

FEW_TRANSFERS = Limits(max_blob_bytes=300_000, max_transfers=4)
sizes_of_blobs = st.lists(
    st.integers(0, 300) | st.sampled_from([0, 4096, SCRATCH_BYTES, 80_000]), min_size=1, max_size=4
)


def refer(transfer: int, count: int) -> bytes:
    """Write a letter that claims the blobs of a transfer."""
    first, *more = [Blob(b"")] * count
    return encoded(Tell("actor", None, Parcel(blob=first, more=tuple(more))), transfer)


def content(size: int, salt: int) -> bytes:
    return random.Random(salt).randbytes(size)


def blobs_of(letter: Tell[Parcel]) -> list[bytes]:
    return [bytes(blob.data) for blob in (letter.body.blob, *letter.body.more)]


# A model of all that an honest peer may do, in any order.


class Conversation(RuleBasedStateMachine):
    """Begins, feeds, aborts and claims transfers, with letters and cuts in between, and knows what must come of it."""

    running = Bundle("running")

    @initialize()
    def open(self) -> None:
        self.wire = opened(FEW_TRANSFERS)
        self.blobs: dict[int, list[bytes]] = {}
        self.sent: dict[int, int] = {}
        self.number = 0
        self.dice = random.Random(5)

    def say(self, data: bytes) -> list[object]:
        pieces = [self.dice.choice((1, 4, 15, 16, 1000, 70_000)) for _ in range(20)]
        return feed(self.wire, data, pieces)

    def has_room(self) -> bool:
        return len(self.blobs) < FEW_TRANSFERS.max_transfers

    @precondition(has_room)
    @rule(target=running, sizes=sizes_of_blobs)
    def announce(self, sizes: list[int]) -> int:
        held = sum(len(blob) for blobs in self.blobs.values() for blob in blobs)
        if held + sum(sizes) > FEW_TRANSFERS.max_blob_bytes:
            sizes = [0]
        self.number += 1
        self.blobs[self.number] = [content(size, self.number * 10 + index) for index, size in enumerate(sizes)]
        self.sent[self.number] = 0
        assert self.say(begin(self.number, sizes)) == []
        return self.number

    def left(self, transfer: int) -> bytes:
        """Give what is still to be sent of the present blob."""
        sent = self.sent[transfer]
        for blob in self.blobs[transfer]:
            if sent < len(blob):
                return blob[sent:]
            sent -= len(blob)
        return b""

    @rule(transfer=running, share=st.floats(0, 1))
    def bring(self, transfer: int, share: float) -> None:
        left = self.left(transfer)
        if left:
            piece = left[: max(1, int(len(left) * share))]
            assert self.say(chunk(transfer, piece) + letters(Beat(transfer))) == [Beat(transfer)]
            self.sent[transfer] += len(piece)

    @rule(transfer=consumes(running))
    def claim(self, transfer: int) -> None:
        data = b""
        while left := self.left(transfer):
            data += chunk(transfer, left)
            self.sent[transfer] += len(left)
        expected = self.blobs.pop(transfer)
        (letter,) = self.say(data + letters_frame(refer(transfer, len(expected))))
        assert isinstance(letter, Tell)
        assert blobs_of(letter) == expected

    @rule(transfer=running)
    def claim_too_early(self, transfer: int) -> None:
        # A letter that can't be read may have been for any transfer that has come whole: those are let go.
        if all(map(self.left, self.blobs)):
            (letter,) = self.say(letters_frame(refer(transfer, 1)))
            assert isinstance(letter, Misread)

    @rule(transfer=consumes(running))
    def give_up(self, transfer: int) -> None:
        del self.blobs[transfer]
        assert self.say(abort(transfer)) == []

    @invariant()
    def nothing_else_is_kept(self) -> None:
        if hasattr(self, "wire"):
            blobs = sum(len(blob) for blobs in self.blobs.values() for blob in blobs)
            assert held_bytes(self.wire) == SCRATCH_BYTES + blobs


TestConversation = Conversation.TestCase
TestConversation.settings = few


# Both ends.


def sent_by(outgoing: Outgoing) -> list[bytes]:
    """Give everything that an outgoing end says, frame by frame."""
    frames: list[bytes] = []
    while outgoing:
        small: list[bytes] = []
        frames.append(b"".join(bytes(part) for part in outgoing.next_frames(small)))
        frames += [letters_frame(letter) for letter in small]
    return frames


@few
@given(st.lists(st.tuples(st.integers(0, 3), sizes_of_blobs | st.none()), max_size=12), st.lists(st.integers(1, 9000)))
def test_lanes_keep_their_order_and_blobs_their_bytes(
    plan: list[tuple[int, list[int] | None]], cuts: list[int]
) -> None:
    outgoing, wire = Outgoing(), opened()
    at_once: list[bytes] = []
    expected: dict[str, list[object]] = {}
    for order, (lane, sizes) in enumerate(plan):
        name = f"lane {lane}"
        if sizes is None:
            letter = encoded(Tell(name, b"%d" % order, Marked()))
            expected.setdefault(name, []).append((b"%d" % order, []))
            if not outgoing.hold(lane, letter):
                at_once.append(letters_frame(letter))
        else:
            blobs = [Blob(content(size, order * 10 + index)) for index, size in enumerate(sizes)]
            transfer = outgoing.number()
            parcel = Parcel(blob=blobs[0], more=tuple(blobs[1:]))
            outgoing.send(lane, encoded(Tell(name, b"%d" % order, parcel), transfer), transfer, blobs)
            expected.setdefault(name, []).append((b"%d" % order, [bytes(blob.data) for blob in blobs]))
    heard: dict[str, list[object]] = {}
    for letter in feed(wire, b"".join(at_once + sent_by(outgoing)), cuts):
        body = letter.body
        heard.setdefault(letter.target, []).append((letter.trace, blobs_of(letter) if isinstance(body, Parcel) else []))
    assert heard == expected
    assert outgoing.held_bytes == 0
    assert held_bytes(wire) == SCRATCH_BYTES


class Marked(Message, frozen=True, tag="loose"):
    """Written like a `Loose` with nothing in it."""

    anything: bytes = b"\xc0"


def test_a_small_letter_of_another_lane_overtakes_a_transfer() -> None:
    outgoing = Outgoing()
    outgoing.send("a", b"after", outgoing.number(), [Blob(bytes(3 * CHUNK_BYTES))])
    assert not outgoing.hold("b", b"at once")
    assert outgoing.hold("a", b"behind")
    frames = sent_by(outgoing)
    assert frames[-2:] == [letters_frame(b"after"), letters_frame(b"behind")]


def test_transfers_of_different_lanes_take_turns() -> None:
    outgoing = Outgoing()
    for lane in ("a", "b"):
        outgoing.send(lane, b"", outgoing.number(), [Blob(bytes(2 * CHUNK_BYTES + 1))])
    chunks = [frame for frame in sent_by(outgoing) if frame[4:5] == b"\x92"]
    assert [frame[9] for frame in chunks] == [1, 2, 1, 2, 1, 2]
    assert {len(frame) for frame in chunks} == {CHUNK_BYTES + 15, 16}


def test_two_transfers_of_one_lane_come_one_after_the_other() -> None:
    outgoing = Outgoing()
    for _ in range(2):
        outgoing.send("a", b"", outgoing.number(), [Blob(b"x")])
    assert [frame[4:6] for frame in sent_by(outgoing) if frame[4:5] == b"\x93"] == [b"\x93\x01", b"\x93\x02"]


def test_a_number_of_a_transfer_fits_its_32_bits_for_ever() -> None:
    outgoing = Outgoing()
    outgoing._next_transfer = 2**32 - 2
    assert [outgoing.number() for _ in range(3)] == [2**32 - 1, 0, 1]


@pytest.mark.parametrize("transfers", [65, 200])
def test_as_many_messages_with_blobs_as_a_caller_likes_are_taken_by_a_peer_of_the_default_limits(
    transfers: int,
) -> None:
    outgoing, wire = Outgoing(), opened(Limits())
    for lane in range(transfers):
        number = outgoing.number()
        outgoing.send(lane, refer(number, 1), number, [Blob(b"x" * 10)])
    assert len(feed(wire, b"".join(sent_by(outgoing)))) == transfers


def test_the_bytes_of_a_chunk_are_received_into_the_blob_itself() -> None:
    wire = opened()
    feed(wire, begin(1, [100_000]) + chunk(1, bytes(100_000))[:15])
    room = wire.buffer()
    assert len(room) == 100_000
    room[:] = b"y" * 100_000
    wire.received(100_000)
    (letter,) = feed(wire, letters_frame(refer(1, 1)))
    assert blobs_of(letter) == [b"y" * 100_000]
    assert type(letter.body.blob.data) is bytearray


# Liars.


@pytest.mark.parametrize(
    ("data", "error"),
    [
        pytest.param(chunk(1, b"x"), FrameInvalid, id="a chunk without a begin"),
        pytest.param(begin(1, [1]) + chunk(2, b"x"), FrameInvalid, id="a chunk of another transfer"),
        pytest.param(begin(1, [1]) + chunk(1, b"xy"), FrameInvalid, id="a chunk beyond its blob"),
        pytest.param(begin(1, [1, 1]) + chunk(1, b"xy"), FrameInvalid, id="a chunk over two blobs"),
        pytest.param(begin(1, [1]) + chunk(1, b"x") + chunk(1, b"x"), FrameInvalid, id="a chunk when all have come"),
        pytest.param(begin(1, [0]) + chunk(1, b"x"), FrameInvalid, id="a chunk of an empty transfer"),
        pytest.param(begin(1, [1]) + chunk(1, b""), FrameInvalid, id="an empty chunk"),
        pytest.param(begin(1, [1]) + abort(1) + chunk(1, b"x"), FrameInvalid, id="a chunk after an abort"),
        pytest.param(begin(1, [1]) + begin(1, [1]), FrameInvalid, id="a begin twice"),
        pytest.param(begin(1, []), FrameTooLong, id="no blobs"),
        pytest.param(begin(1, [0] * (MAX_BLOBS_PER_TRANSFER + 1)), FrameTooLong, id="65 blobs"),
        pytest.param(begin(1, [-1, 2]), FrameInvalid, id="a negative size"),
        pytest.param(begin(1, [-1]), FrameInvalid, id="a negative size and total"),
        pytest.param(begin(1, [1], 2), FrameInvalid, id="a total that lies"),
        pytest.param(begin(1, [2**64 - 1]), FrameTooLong, id="the largest size"),
        pytest.param(begin(1, [2**63, 2**63], 0), FrameInvalid, id="sizes that overflow"),
        pytest.param(begin(1, [LIMITS.max_blob_bytes + 1]), FrameTooLong, id="beyond the bound"),
        pytest.param(begin(1, [LIMITS.max_blob_bytes]) + begin(2, [1]), FrameTooLong, id="beyond the bound together"),
        pytest.param(begin(-1, [1]), FrameInvalid, id="a negative number"),
        pytest.param(begin(2**32, [1]), FrameInvalid, id="a number of 33 bits"),
        pytest.param(frame(b"\x93\x01\x91\xa11\x01"), FrameInvalid, id="a size that is a string"),
        pytest.param(frame(b"\x93\xa11\x91\x01\x01"), FrameInvalid, id="a number that is a string"),
        pytest.param(frame(b"\x93\x01\x91\x01"), FrameInvalid, id="a begin that is cut"),
        pytest.param(frame(b"\x93\x01\x91\x01\x01\x01"), FrameInvalid, id="a begin with more"),
        pytest.param(frame(b"\x93\x01\xdd\xff\xff\xff\xff\x01"), FrameInvalid, id="four billion sizes"),
        pytest.param(frame(b"\x93" + b"\x91" * 100_000), FrameTooLong, id="a begin nested deep"),
        pytest.param(abort(1), FrameInvalid, id="an abort of nothing"),
        pytest.param(begin(1, [1]) + abort(1) + abort(1), FrameInvalid, id="an abort twice"),
        pytest.param(frame(b"\x91"), FrameInvalid, id="an abort that is cut"),
        pytest.param(frame(b"\x91\xc0"), FrameInvalid, id="an abort of None"),
        pytest.param(b"".join(begin(n, [1]) for n in range(1000)), FrameTooLong, id="1,000 transfers"),
        pytest.param(begin(1, [9]) + frame(b"\x92\x01\xc4\x01x") + bytes(9), FrameInvalid, id="a chunk in short form"),
        pytest.param(begin(1, [9]) + frame(b"\x92") + bytes(10), FrameInvalid, id="a chunk without anything"),
        pytest.param(
            begin(1, [9]) + b"\x00\x00\x00\x0c\x92\xce\x00\x00\x00\x01\xc6\x00\x00\x00\x02xy", FrameInvalid,
            id="a chunk that is longer than its frame",
        ),
        pytest.param(
            begin(1, [9]) + b"\x00\x00\x00\x0d\x92\xce\x00\x00\x00\x01\xc6\x00\x00\x00\x01xy", FrameInvalid,
            id="a chunk that is shorter than its frame",
        ),
    ],
)  # fmt: skip
def test_a_transfer_that_lies_is_refused_and_costs_little(data: bytes, error: type[SllmError]) -> None:
    wire = opened()
    with little_memory(LIMITS.max_blob_bytes + 4 * len(data) + 256 * KIB), pytest.raises(error) as raised:
        feed(wire, data)
    assert isinstance(raised.value, ProtocolViolation)
    assert wire.state is State.CLOSED


def test_transfers_as_many_and_as_large_as_may_be_are_taken() -> None:
    wire = opened()
    each = LIMITS.max_blob_bytes // LIMITS.max_transfers
    for transfer in range(LIMITS.max_transfers):
        feed(wire, begin(transfer, [each]))
    assert held_bytes(wire) == SCRATCH_BYTES + LIMITS.max_blob_bytes
    for transfer in range(LIMITS.max_transfers):
        feed(wire, abort(transfer))
    assert held_bytes(wire) == SCRATCH_BYTES
    feed(wire, begin(2**32 - 1, [0] * MAX_BLOBS_PER_TRANSFER))
    (letter,) = feed(wire, letters_frame(refer(2**32 - 1, MAX_BLOBS_PER_TRANSFER)))
    assert blobs_of(letter) == [b""] * MAX_BLOBS_PER_TRANSFER


def test_what_a_begin_announces_beyond_the_bound_is_not_allocated() -> None:
    with little_memory(MIB), pytest.raises(FrameTooLong):
        feed(opened(Limits()), begin(1, [2**40]))


@pytest.mark.parametrize("reference", [(1, -1), (1, 1), (2, 0), (-1, 0), (2**64 - 1, 0), (1, 2**63)])
def test_a_blob_that_is_not_there_costs_its_letter_alone(reference: Sequence[int]) -> None:
    wire = opened()
    body = {"kind": "parcel", "blob": list(reference)}
    (letter,) = feed(wire, begin(1, [0]) + letters_frame(codec().write((3, "actor", None, body))))
    assert isinstance(letter, Misread)
    assert between_frames(wire)


def test_a_blob_of_a_transfer_that_has_not_come_whole_costs_its_letter_alone() -> None:
    wire = opened()
    data = begin(1, [2, 1]) + chunk(1, b"ab") + letters_frame(refer(1, 1), encoded(Beat(1)))
    misread, beat = feed(wire, data)
    assert isinstance(misread, Misread)
    assert beat == Beat(1)
    (letter,) = feed(wire, chunk(1, b"c") + letters_frame(refer(1, 2)))
    assert blobs_of(letter) == [b"ab", b"c"]


def test_a_transfer_is_claimed_by_one_frame_of_letters_and_then_gone() -> None:
    wire = opened()
    feed(wire, begin(1, [1, 1]) + chunk(1, b"a") + chunk(1, b"b"))
    (letter,) = feed(wire, letters_frame(refer(1, 1)))
    assert blobs_of(letter) == [b"a"]
    assert held_bytes(wire) == SCRATCH_BYTES
    (misread,) = feed(wire, letters_frame(refer(1, 2)))
    assert isinstance(misread, Misread)
    feed(wire, begin(1, [1]) + chunk(1, b"c"))
    (letter,) = feed(wire, letters_frame(refer(1, 1)))
    assert blobs_of(letter) == [b"c"]


def test_two_references_to_one_blob_give_the_same_bytes() -> None:
    wire = opened()
    body = {"kind": "parcel", "blob": [1, 0], "more": [[1, 0]]}
    (letter,) = feed(wire, begin(1, [1]) + chunk(1, b"a") + letters_frame(codec().write((3, "actor", None, body))))
    assert blobs_of(letter) == [b"a", b"a"]
    assert held_bytes(wire) == SCRATCH_BYTES


def test_blobs_that_nothing_refers_to_stay_within_the_bounds() -> None:
    wire = opened(FEW_TRANSFERS)
    for transfer in range(FEW_TRANSFERS.max_transfers):
        feed(wire, begin(transfer, [10]) + chunk(transfer, bytes(10)))
    assert held_bytes(wire) == SCRATCH_BYTES + 40
    with pytest.raises(FrameTooLong):
        feed(wire, begin(99, [1]))


def test_a_message_with_blobs_that_can_not_be_read_gives_its_blobs_back() -> None:
    wire = opened(FEW_TRANSFERS)
    for transfer in range(3 * FEW_TRANSFERS.max_transfers):
        body = {"kind": "of a later version", "blob": [transfer, 0]}
        feed(wire, begin(transfer, [1]) + chunk(transfer, b"x"))
        (misread,) = feed(wire, letters_frame(codec().write((3, "actor", None, body))))
        assert isinstance(misread, Misread)
    assert between_frames(wire)
