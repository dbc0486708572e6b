"""One connection's state machine, without a socket: any split of its bytes, the handshake, and whoever breaks it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_pairs import (
    LIMITS,
    SECRET,
    Note,
    Parcel,
    abort,
    acceptor,
    begin,
    between_frames,
    chunk,
    dialer,
    encoded,
    feed,
    frame,
    held_bytes,
    hello,
    letters,
    letters_frame,
    opened,
    opening,
    step,
)

from sllm_actor.errors import (
    BY_CODE,
    FrameInvalid,
    FrameTooLong,
    HandshakeRefused,
    LinkDuplicate,
    NodeDown,
    NodeMismatch,
    ProtocolViolation,
    SecretMismatch,
    SllmError,
    VersionMismatch,
)
from sllm_actor.runtime import handshake
from sllm_actor.runtime.handshake import MAX_HANDSHAKE_FRAME_BYTES, MIN_FRAME_BYTES, PREFACE, Hello
from sllm_actor.runtime.letters import Answer, Beat, Goodbye, Tell
from sllm_actor.runtime.values import Blob
from sllm_actor.runtime.wire import FIRST_SCRATCH_BYTES, SCRATCH_BYTES, Introduced, Opened, Role, State, Wire

KIB = 1024
MIB = 1024 * KIB
few = settings(max_examples=40, deadline=None)


@contextmanager
def little_memory(bound_bytes: int) -> Iterator[None]:
    """Fail if more than this is allocated at once."""
    tracemalloc.start()
    try:
        yield
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes <= bound_bytes


def parcel(transfer: int, *blobs: bytes) -> bytes:
    """Refer to the blobs of a transfer that has come."""
    first, *more = map(Blob, blobs)
    return letters_frame(encoded(Tell("actor", None, Parcel(blob=first, more=tuple(more))), transfer))


def conversation() -> tuple[bytes, list[object]]:
    """Letters and transfers between each other, with frames that outgrow the scratch buffer; and what they say."""
    large = bytes(index % 251 for index in range(SCRATCH_BYTES + 7))
    long = Answer(1, "x" * (SCRATCH_BYTES + 100))
    sent = (
        letters(Beat(1), Tell("actor", b"trace", Note(text="é", number=-5)))
        + begin(1, [3, 0, 5])
        + begin(2, [len(large)])
        + chunk(1, b"ab")
        + chunk(2, large[:40_000])
        + letters(Beat(2))
        + chunk(1, b"c")
        + chunk(1, b"hello")
        + parcel(1, b"abc", b"", b"hello")
        + begin(1, [1])
        + chunk(2, large[40_000:])
        + letters(long)
        + abort(1)
        + parcel(2, large)
        + begin(3, [0])
        + parcel(3, b"")
        + letters(Goodbye("done"))
    )
    said: list[object] = [
        Beat(1),
        Tell("actor", b"trace", Note(text="é", number=-5)),
        Beat(2),
        Tell("actor", None, Parcel(blob=Blob(b"abc"), more=(Blob(b""), Blob(b"hello")))),
        long,
        Tell("actor", None, Parcel(blob=Blob(large))),
        Tell("actor", None, Parcel(blob=Blob(b""))),
        Goodbye("done"),
    ]
    return sent, said


SENT, SAID = conversation()
pieces_of = st.lists(st.integers(1, 90) | st.sampled_from([4096, 65_536, 2**30]), max_size=60)


# Splits.


@few
@given(pieces_of, pieces_of)
def test_any_split_of_the_bytes_gives_a_dialer_the_same_events(early: list[int], late: list[int]) -> None:
    made = opening()
    wire = dialer()
    assert feed(wire, made.answer, early) == []
    assert feed(wire, made.welcome + SENT, [*early, *late]) == [Opened(hello("acceptor")), *SAID]
    assert held_bytes(wire) == SCRATCH_BYTES


@few
@given(pieces_of, pieces_of)
def test_any_split_of_the_bytes_gives_an_acceptor_the_same_events(early: list[int], late: list[int]) -> None:
    made = opening()
    wire = acceptor()
    assert feed(wire, made.first + made.proof, early) == [Introduced(hello())]
    wire.admit()
    assert feed(wire, SENT, late) == SAID
    assert held_bytes(wire) == SCRATCH_BYTES


def test_bytes_that_arrive_one_by_one_give_the_same_events() -> None:
    made = opening()
    wire = acceptor()
    one_by_one = [1] * (len(made.first) + len(made.proof))
    assert feed(wire, made.first + made.proof, one_by_one) == [Introduced(hello())]
    wire.admit()
    assert feed(wire, SENT, [1] * len(SENT)) == SAID


@pytest.mark.parametrize("count", range(1, len(PREFACE)))
def test_a_preface_that_comes_in_parts_is_waited_for(count: int) -> None:
    made = opening()
    wire = acceptor()
    assert feed(wire, made.first, [count]) == []
    assert wire.state is State.PROOF


@few
@given(st.integers(0, len(SENT) - 1))
def test_a_conversation_that_is_cut_gives_what_had_come_whole(cut: int) -> None:
    heard = feed(opened(), SENT[:cut])
    assert heard == SAID[: len(heard)]


def test_several_frames_in_one_read_cost_one_call_and_keep_their_order() -> None:
    wire = opened()
    data = b"".join(letters(Beat(number)) for number in range(300))
    wire.buffer()[: len(data)] = data
    assert wire.received(len(data)) == [Beat(number) for number in range(300)]


def test_a_wire_that_carries_little_keeps_a_small_buffer_until_a_read_fills_it() -> None:
    wire = opened()
    feed(wire, letters(Beat(1)))
    assert len(wire._scratch) == len(wire.buffer()) == FIRST_SCRATCH_BYTES
    many = b"".join(letters(Beat(number)) for number in range(2000))
    assert feed(wire, many, [FIRST_SCRATCH_BYTES]) == [Beat(number) for number in range(2000)]
    assert len(wire._scratch) == len(wire.buffer()) == SCRATCH_BYTES


def test_the_scratch_buffer_grows_for_one_large_frame_and_shrinks_after_it() -> None:
    wire = opened()
    large = letters(Answer(1, "x" * (LIMITS.max_frame_bytes - 100)))
    feed(wire, large[:100])
    assert held_bytes(wire) == len(large)
    feed(wire, large[100:])
    assert held_bytes(wire) == SCRATCH_BYTES


# Frames that break the rules.


@pytest.mark.parametrize(
    ("data", "error"),
    [
        pytest.param(b"\x00\x10\x00\x01\xdc", FrameTooLong, id="too long by one"),
        pytest.param(b"\xff\xff\xff\xff\xdc", FrameTooLong, id="as long as a length can say"),
        pytest.param(b"\xff\xff\xff\xff\x92", FrameTooLong, id="a chunk as long as a length can say"),
        pytest.param(b"\x00\x00\x00\x00\xdc", ProtocolViolation, id="empty"),
        pytest.param(frame(b"\xdc"), FrameInvalid, id="letters without a number"),
        pytest.param(frame(b"\xdc\x00"), FrameInvalid, id="letters with half a number"),
        pytest.param(frame(b"\xdc\x00\x01"), FrameInvalid, id="a letter that is missing"),
        pytest.param(frame(b"\xdc\x00\x02") + encoded(Beat(1)), FrameInvalid, id="the second letter is missing"),
        pytest.param(frame(b"\xdc\x00\x01" + encoded(Beat(1)) + b"\xc0"), FrameInvalid, id="more than it says"),
        pytest.param(frame(b"\xc1"), FrameInvalid, id="a byte that MessagePack never uses"),
        pytest.param(frame(b"\x80"), FrameInvalid, id="a map"),
        pytest.param(frame(b"\x94\x01\x02\x03\x04"), FrameInvalid, id="an array of four"),
        pytest.param(frame(b"\x91\x92\x0b\x01"), FrameInvalid, id="letters in a short array"),
        pytest.param(frame(b"\xdd\x00\x00\x00\x01\x92\x0b\x01"), FrameInvalid, id="letters in a long array"),
        pytest.param(frame(b"\xdd\xff\xff\xff\xff"), FrameInvalid, id="four billion elements"),
        pytest.param(frame(b"\xdf\xff\xff\xff\xff"), FrameInvalid, id="four billion entries"),
        pytest.param(frame(b"\xdc\xff\xff" + b"\x92\x0b\x01" * 0xFFFF), FrameTooLong, id="65,535 tiny letters"),
        pytest.param(frame(b"\xdc\x04\x01" + b"\x92\x0b\x01" * 1025), FrameTooLong, id="1,025 tiny letters"),
        pytest.param(frame(b"\xdc\x00\x01" + b"\x92\x0b\x01" * 300_000), FrameInvalid, id="300,000 letters, said one"),
        pytest.param(letters(Answer(1, "x" * 70_000), Beat(1)), FrameTooLong, id="two letters, one of them large"),
    ],
)
def test_a_frame_that_breaks_the_rules_is_refused_and_costs_little(data: bytes, error: type[SllmError]) -> None:
    wire = opened()
    with little_memory(4 * len(data) + 256 * KIB), pytest.raises(error) as raised:
        feed(wire, data + b"\0")
    assert isinstance(raised.value, ProtocolViolation)
    assert wire.state is State.CLOSED
    assert wire.take_output() == b""


def test_a_length_beyond_the_bound_is_refused_before_anything_else_has_come() -> None:
    with pytest.raises(FrameTooLong, match="1048577"):
        feed(opened(), b"\x00\x10\x00\x01")
    assert feed(opened(), b"\x00\x10\x00\x00") == []


def test_letters_as_many_and_as_long_as_may_be_are_read() -> None:
    assert feed(opened(), frame(b"\xdc\x04\x00" + b"\x92\x0b\x01" * 1024)) == [Beat(1)] * 1024
    wire = opened()
    most = Answer(1, "x" * (LIMITS.max_frame_bytes - 3 - len(encoded(Answer(1, "x" * 70_000))) + 70_000))
    assert len(letters(most)) == LIMITS.max_frame_bytes + 4
    assert feed(wire, letters(most)) == [most]
    assert between_frames(wire)


def test_a_frame_of_no_letters_says_nothing() -> None:
    wire = opened()
    assert feed(wire, frame(b"\xdc\x00\x00")) == []
    assert between_frames(wire)


@few
@given(st.binary(max_size=300), st.booleans())
def test_whatever_bytes_come_nothing_but_a_violation_is_raised(data: bytes, framed: bool) -> None:
    for wire in (opened(), opening().dialer, acceptor(), dialer()):
        try:
            feed(wire, frame(b"\xdc" + data) if framed else data)
        except ProtocolViolation:
            assert wire.state is State.CLOSED
        assert held_bytes(wire) <= LIMITS.max_blob_bytes + LIMITS.max_frame_bytes + 4


@few
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_no_change_of_a_byte_does_anything_but_say_something_else_or_break_the_rules(place: int, byte: int) -> None:
    data = bytearray(SENT)
    data[place % 200 if place % 2 else place % len(data)] = byte
    wire = opened()
    try:
        feed(wire, bytes(data))
    except ProtocolViolation:
        assert wire.state is State.CLOSED
    assert held_bytes(wire) <= LIMITS.max_blob_bytes + LIMITS.max_frame_bytes + 4


# The handshake.


def refusal(wire: Wire, data: bytes) -> ProtocolViolation:
    """Give the error with which a wire refuses to read this."""
    with pytest.raises(ProtocolViolation) as raised:
        feed(wire, data)
    assert wire.state is State.CLOSED
    return raised.value


def both_refuse(dialling: Wire, accepting: Wire) -> tuple[ProtocolViolation, ProtocolViolation]:
    """Let two ends talk until both have given up; give why, the dialer's reason first."""
    reasons: dict[Wire, ProtocolViolation] = {}
    for _ in range(4):
        for speaker, hearer in ((dialling, accepting), (accepting, dialling)):
            said = speaker.take_output()
            if hearer not in reasons:
                try:
                    feed(hearer, said)
                except ProtocolViolation as violation:
                    reasons[hearer] = violation
    return reasons[dialling], reasons[accepting]


def test_both_sides_learn_who_the_other_is() -> None:
    made = opening(dialer(hello("a", uid=5)), acceptor(hello("b", uid=6)))
    assert made.dialer.peer == hello("b", uid=6)
    assert made.acceptor.peer == hello("a", uid=5)


def test_without_a_secret_on_either_side_proofs_are_empty_and_the_connection_opens() -> None:
    made = opening(dialer(secret=b""), acceptor(secret=b""))
    assert msgspec.msgpack.decode(made.proof[4:]) == {"kind": "proof", "mac": b""}


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32),
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"sllm\x00acu",
        b"sllm\x01",
        b"s\x00",
        bytes(64),
        b"\xff" * 64,
    ],
)
def test_a_stranger_is_refused_at_its_first_wrong_byte_and_hears_nothing(data: bytes) -> None:
    wire = acceptor()
    with little_memory(256 * KIB):
        error = refusal(wire, data)
    assert type(error) is FrameInvalid
    assert wire.take_output() == b""
    caller = dialer()
    caller.take_output()
    assert type(refusal(caller, data)) is FrameInvalid
    assert caller.take_output() == b""


def test_a_wrong_secret_is_refused_and_both_sides_know_why() -> None:
    for pair in ((dialer(), acceptor(secret=b"y" * 32)), (dialer(secret=b"y" * 32), acceptor())):
        theirs, ours = both_refuse(*pair)
        assert type(theirs) is SecretMismatch
        assert type(ours) is SecretMismatch


def test_a_secret_on_one_side_only_is_refused_and_both_sides_know_why() -> None:
    for pair in ((dialer(), acceptor(secret=b"")), (dialer(secret=b""), acceptor())):
        theirs, ours = both_refuse(*pair)
        assert type(theirs) is SecretMismatch
        assert type(ours) is SecretMismatch
        assert "has no cluster secret" in f"{theirs} {ours}"


def test_a_dialer_that_claims_a_secret_and_proves_nothing_is_refused() -> None:
    for mac in (b"", bytes(32), SECRET):
        wire = acceptor()
        feed(wire, opening().first)
        assert type(refusal(wire, step(kind="proof", mac=mac))) is SecretMismatch


def test_an_acceptor_that_proves_nothing_is_refused() -> None:
    for mac in (b"", bytes(32), SECRET):
        wire = dialer()
        feed(wire, opening().answer)
        assert type(refusal(wire, step(kind="proof", mac=mac))) is SecretMismatch


def test_a_recorded_handshake_can_not_be_replayed_to_an_acceptor_with_another_nonce() -> None:
    recorded = opening()
    same = acceptor()
    assert feed(same, recorded.first + recorded.proof) == [Introduced(hello())]
    other = acceptor(hello("acceptor", nonce=b"!" * 32))
    assert type(refusal(other, recorded.first + recorded.proof)) is SecretMismatch


def test_a_recorded_handshake_can_not_be_replayed_to_a_dialer_with_another_nonce() -> None:
    recorded = opening()
    other = dialer(hello("dialer", nonce=b"!" * 32))
    assert type(refusal(other, recorded.answer + recorded.welcome)) is SecretMismatch


def test_a_proof_reflected_to_its_sender_is_refused() -> None:
    wire = dialer()
    feed(wire, wire.take_output())
    assert type(refusal(wire, wire.take_output())) is SecretMismatch


def test_a_hello_changed_on_its_way_is_refused() -> None:
    wire, other = acceptor(), dialer()
    first = other.take_output()
    said = msgspec.msgpack.decode(first[12:]) | {"endpoint": "tcp://attacker:1"}
    feed(wire, PREFACE + step(**said))
    feed(other, wire.take_output())
    assert type(refusal(wire, other.take_output())) is SecretMismatch


@contextmanager
def speaking(patch: pytest.MonkeyPatch, oldest: int, newest: int) -> Iterator[None]:
    with patch.context() as patched:
        patched.setattr(handshake, "VERSION_MIN", oldest)
        patched.setattr(handshake, "VERSION_MAX", newest)
        yield


def test_a_newer_dialer_and_an_older_acceptor_both_name_both_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    newer, older = dialer(hello("new", version_min=2, version_max=3)), acceptor(hello("old"))
    ours = refusal(older, newer.take_output())
    said = older.take_output()
    with speaking(monkeypatch, 2, 3):
        theirs = refusal(newer, said)
    assert type(ours) is type(theirs) is VersionMismatch
    assert ours.message == "new speaks protocol 2 to 3, this node 1 to 1"
    assert theirs.message == "old speaks protocol 1 to 1, this node 2 to 3"


def test_an_older_dialer_and_a_newer_acceptor_both_name_both_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    older, newer = dialer(hello("old")), acceptor(hello("new", version_min=2, version_max=3))
    with speaking(monkeypatch, 2, 3):
        theirs = refusal(newer, older.take_output())
    ours = refusal(older, newer.take_output())
    assert type(ours) is type(theirs) is VersionMismatch
    assert theirs.message == "old speaks protocol 1 to 1, this node 2 to 3"
    assert ours.message == "new speaks protocol 2 to 3, this node 1 to 1"


def test_the_refusal_alone_names_both_ranges_to_a_peer_that_can_not_judge_the_hello() -> None:
    older, newer = acceptor(hello("old")), dialer(hello("new", version_min=2, version_max=3))
    refusal(older, newer.take_output())
    error = refusal(newer, older.take_output())
    assert type(error) is VersionMismatch
    assert error.message == "refused by the peer: new speaks protocol 2 to 3, this node 1 to 1"


def test_ranges_of_versions_that_overlap_are_no_obstacle() -> None:
    opening(dialer(hello("new", version_max=9)), acceptor(hello("old")))
    opening(dialer(hello("old")), acceptor(hello("new", version_max=9)))


def test_another_node_than_the_one_expected_is_refused() -> None:
    error = refusal(dialer(expected="x"), opening().answer)
    assert type(error) is NodeMismatch
    assert error.message == "'acceptor' answers where 'x' was expected"
    opening(dialer(expected="acceptor"))


def test_a_certificate_for_another_node_is_refused() -> None:
    made = opening()
    for wire, data in ((acceptor(), made.first), (dialer(), made.answer)):
        wire.certified = frozenset({"somebody"})
        assert type(refusal(wire, data)) is NodeMismatch
    right, left = acceptor(), dialer()
    right.certified, left.certified = frozenset({"dialer", "alias"}), frozenset({"acceptor"})
    opening(left, right)


def test_fields_that_a_later_version_adds_to_a_hello_are_passed_over() -> None:
    said = msgspec.to_builtins(hello(version_max=2), builtin_types=(bytes,))
    wire = acceptor()
    assert feed(wire, PREFACE + step(**said, region="moon", more={"a": [1, None]})) == []
    assert wire.peer == hello(version_max=2)
    assert wire.state is State.PROOF


@pytest.mark.parametrize(
    "change",
    [
        {"node": ""},
        {"node": "x" * 256},
        {"node": b"bytes"},
        {"uid": 0},
        {"uid": -1},
        {"uid": 2**63},
        {"uid": 1.5},
        {"uid": True},
        {"nonce": b""},
        {"nonce": bytes(31)},
        {"nonce": bytes(33)},
        {"nonce": "x" * 32},
        {"links": -1},
        {"endpoint": "x" * 256},
        {"endpoint": None},
        {"secured": 1},
        {"max_frame_bytes": MIN_FRAME_BYTES - 1},
        {"max_frame_bytes": -1},
        {"max_blob_bytes": -1},
        {"version_min": "1"},
        {"version_max": None},
        {"kind": "hallo"},
        {"kind": 1},
    ],
    ids=str,
)
def test_a_hello_with_an_absurd_field_is_refused(change: dict[str, Any]) -> None:
    said = msgspec.to_builtins(hello(), builtin_types=(bytes,)) | change
    assert type(refusal(acceptor(), PREFACE + step(**said))) is FrameInvalid
    assert type(refusal(dialer(), PREFACE + step(**said))) is FrameInvalid


@pytest.mark.parametrize("missing", sorted(set(Hello.__struct_fields__)))
def test_a_hello_without_one_of_its_fields_is_refused(missing: str) -> None:
    said = msgspec.to_builtins(hello(), builtin_types=(bytes,))
    del said[missing]
    assert type(refusal(acceptor(), PREFACE + step(**said))) is FrameInvalid


def test_names_as_long_as_may_be_are_taken_and_what_is_said_of_them_fits_a_frame() -> None:
    name = "\U0001f600" * 255
    opening(dialer(hello(name)), acceptor())
    wire = acceptor()
    refusal(wire, PREFACE + frame(msgspec.msgpack.encode(hello(name, version_min=2, version_max=2))))
    answer = wire.take_output()
    assert len(answer) < 2 * MAX_HANDSHAKE_FRAME_BYTES
    other = dialer(hello(name))
    assert type(refusal(other, answer)) is VersionMismatch


def test_a_handshake_frame_beyond_its_bound_is_refused_before_it_comes() -> None:
    length = (MAX_HANDSHAKE_FRAME_BYTES + 1).to_bytes(4, "big")
    assert type(refusal(acceptor(), PREFACE + length)) is FrameTooLong
    assert type(refusal(dialer(), PREFACE + length)) is FrameTooLong


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x91" * 4096,
        b"\x81\xa1a" * 1365,
        b"\x82\xa4kind\xa5hello\xa1x" + b"\x91" * 4000,
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\x81\xa4kind\xa5hello",
        b"\x81\xa4kind\xdb\xff\xff\xff\xff",
        b"\x81\xa4kind\xa5\xff\xfe\xfd\xfc\xfb",
        b"\x82\xa4kind\xa5proof\xa3mac\xc6\xff\xff\xff\xff",
        b"\xdc\x00\x01\x92\x0b\x01",
    ],
    ids=lambda body: f"{bytes(body[:12])!r}, {len(body)} bytes",
)
def test_a_handshake_that_can_not_be_read_is_refused_and_costs_little(body: bytes) -> None:
    for wire in (acceptor(), dialer()):
        wire.take_output()
        with little_memory(256 * KIB):
            error = refusal(wire, PREFACE + frame(body))
        assert type(error) is FrameInvalid
        assert wire.take_output() == b""


def at(role: Role, state: State) -> Wire:
    """Give a wire that waits in a state for its peer's next step."""
    made = opening()
    wire = dialer() if role is Role.DIALER else acceptor()
    proof = made.welcome[: -len(step(kind="welcome"))]
    parts = [made.answer[8:], proof] if role is Role.DIALER else [made.first[8:], made.proof]
    order = [State.PREFACE, State.HELLO, State.PROOF, State.WELCOME if role is Role.DIALER else State.ADMISSION]
    for part in [PREFACE, *parts][: order.index(state)]:
        feed(wire, part)
    assert wire.state is state
    wire.take_output()
    return wire


STEPS = {
    "hello": frame(msgspec.msgpack.encode(hello())),
    "proof": step(kind="proof", mac=bytes(32)),
    "welcome": step(kind="welcome"),
    "letters": letters(Beat(1)),
    "begin": begin(1, [1]),
    "chunk": chunk(1, b"x"),
}
EXPECTED = {State.HELLO: "hello", State.PROOF: "proof", State.WELCOME: "welcome"}
WAITING = [
    *((Role.DIALER, state) for state in (State.HELLO, State.PROOF, State.WELCOME)),
    *((Role.ACCEPTOR, state) for state in (State.HELLO, State.PROOF, State.ADMISSION)),
]


@pytest.mark.parametrize(
    ("role", "state", "name"),
    [(role, state, name) for role, state in WAITING for name in STEPS if name != EXPECTED.get(state)],
)
def test_a_step_out_of_turn_is_refused(role: Role, state: State, name: str) -> None:
    assert type(refusal(at(role, state), STEPS[name])) is FrameInvalid


@pytest.mark.parametrize(("role", "state"), WAITING)
def test_a_refusal_is_heard_at_every_step(role: Role, state: State) -> None:
    wire = at(role, state)
    error = refusal(wire, step(kind="refused", code="node_down", text="begin another"))
    assert type(error) is NodeDown
    assert error.message == "refused by the peer: begin another"
    assert wire.take_output() == b""


@pytest.mark.parametrize("code", ["handshake_refused", "internal_error", "model_not_found", "frame_invalid", "?", ""])
def test_a_refusal_by_whatever_code_is_a_refused_handshake(code: str) -> None:
    error = refusal(at(Role.DIALER, State.PROOF), step(kind="refused", code=code, text="y" * 3000))
    assert type(error) is HandshakeRefused
    assert len(error.message) < 600


@pytest.mark.parametrize("kind", [LinkDuplicate, NodeDown, NodeMismatch, HandshakeRefused])
def test_whom_the_owner_refuses_learns_why(kind: type[HandshakeRefused]) -> None:
    recorded = opening()
    wire, other = acceptor(), dialer()
    feed(other, recorded.answer)
    feed(wire, recorded.first + recorded.proof)
    wire.take_output()
    wire.refuse(kind("z" * 600))
    error = refusal(other, wire.take_output())
    assert type(error) is kind is BY_CODE[kind.code]
    assert error.message.endswith("z" * 400)


def test_a_wire_that_has_refused_reads_nothing_more() -> None:
    wire = acceptor()
    refusal(wire, b"GET /")
    with pytest.raises(ProtocolViolation):
        feed(wire, opening().first)


def test_letters_may_follow_the_welcome_in_the_same_bytes() -> None:
    made = opening()
    wire = dialer()
    feed(wire, made.answer)
    assert feed(wire, made.welcome + letters(Beat(1)))[1:] == [Beat(1)]


def test_letters_that_are_sent_before_the_welcome_are_refused() -> None:
    made = opening()
    wire = acceptor()
    with pytest.raises(FrameInvalid):
        feed(wire, made.first + made.proof + letters(Beat(1)))
