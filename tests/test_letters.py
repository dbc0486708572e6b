"""Letters: each kind survives its way, what can't be read costs that letter alone, and nothing costs much memory."""

from __future__ import annotations

import struct
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wire import KIB, MIB, few, little_memory
from wire_pairs import (
    LIMITS,
    Loose,
    Message,
    Note,
    Parcel,
    Pointer,
    Ref,
    between_frames,
    codec,
    encoded,
    feed,
    frame,
    letters,
    letters_frame,
    opened,
)

from sllm_actor.errors import FrameInvalid, ProtocolViolation
from sllm_actor.runtime.letters import (
    MAX_BLOBS,
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
    check_message_type,
)
from sllm_actor.runtime.values import MAX_FREE_FORM_BYTES, MAX_FREE_FORM_ITEMS, Blob, FreeForm

NESTED = 100_000
BEAT = b"\x92\x0b\x01"
ASK, OPEN_STREAM, TELL, ANSWER, ITEM = 1, 2, 3, 4, 6

calls = st.integers(0, 2**63)
texts = st.text(max_size=30)
floats = st.floats(allow_nan=False)
numbers = st.integers(-(2**63), 2**64 - 1)
plain = st.none() | st.booleans() | numbers | floats | texts
free = st.recursive(
    plain | st.binary(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=10,
)
references = st.builds(Ref, texts, texts, st.integers(0, 2**63 - 1), texts)
messages = st.one_of(
    st.builds(Note, text=texts, number=st.integers(-(2**63), 2**63 - 1)),
    st.builds(Loose, anything=st.builds(FreeForm, free)),
    st.builds(Pointer, ref=references),
)
values = plain | messages | st.lists(plain | messages, max_size=4).map(tuple)
traces = st.none() | st.binary(max_size=20)
all_letters = st.one_of(
    st.builds(Ask, calls, texts, st.floats(min_value=0), traces, messages),
    st.builds(OpenStream, calls, texts, traces, messages, calls, calls),
    st.builds(Tell, texts, traces, messages),
    st.builds(Answer, calls, values),
    st.builds(Failure, calls, texts, texts, st.none() | texts, st.none() | floats),
    st.builds(Item, calls, values),
    st.builds(Mark, calls),
    st.builds(Credit, calls, calls),
    st.builds(Cancel, calls),
    st.builds(Watch, calls, texts),
    st.builds(Beat, numbers),
    st.builds(Echo, numbers),
    st.builds(Goodbye, texts),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(all_letters, max_size=6))
def test_every_kind_of_letter_is_read_as_it_was_written(sent: list[object]) -> None:
    assert feed(opened(), letters(*sent)) == sent


@few
@given(all_letters)
def test_the_msgpack_package_reads_every_letter_as_an_array_that_begins_with_a_small_number(letter: object) -> None:
    fields = msgpack.unpackb(encoded(letter), strict_map_key=False)
    assert type(fields) is list
    assert 1 <= fields[0] <= 13


# What can't be read.


def tell(message: bytes) -> bytes:
    return b"\x94\x03\xa5actor\xc0" + message


def packed(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


def heard(*raws: bytes) -> list[Any]:
    """Read letters, in a frame with good ones before and after, which must stand."""
    wire = opened()
    first, *between, last = feed(wire, letters_frame(encoded(Beat(1)), *raws, encoded(Echo(2))))
    assert (first, last) == (Beat(1), Echo(2))
    assert between_frames(wire)
    return between


BAD_MESSAGES = {
    "an unknown field": packed({"kind": "note", "text": "x", "more": 1}),
    "a missing field": packed({"kind": "note"}),
    "an unknown kind": packed({"kind": "no such", "text": "x"}),
    "no kind": packed({"text": "x"}),
    "a kind that is a number": packed({"kind": 5, "text": "x"}),
    "two kinds": b"\x83\xa4kind\xa4note\xa4kind\xa6parcel\xa4text\xa1x",
    "a wrong type": packed({"kind": "note", "text": 5}),
    "a wrong type, given twice": b"\x83\xa4kind\xa4note\xa4text\xa1x\xa4text\x05",
    "a number as a string": packed({"kind": "note", "text": "x", "number": "5"}),
    "a number beyond 64 bits as a float": packed({"kind": "note", "text": "x", "number": 1e30}),
    "bytes as a string": packed({"kind": "note", "text": b"x"}),
    "no UTF-8": b"\x82\xa4kind\xa4note\xa4text\xa4\xff\xfe\xfd\xfc",
    "an array": packed(["note", "x"]),
    "nothing": b"\xc0",
    "a number": b"\x05",
    "an extension": b"\xd6\xff\x00\x00\x00\x00",
    "a key that is no string": b"\x82\xa4kind\xa4note\x01\xa1x",
    "nested too deep for a field": b"\x82\xa4kind\xa4note\xa4text" + b"\x91" * 50 + b"\xc0",
    "a reference that is no array": packed({"kind": "pointer", "ref": "x"}),
    "a reference that is too short": packed({"kind": "pointer", "ref": ["n", "", 1]}),
    "a reference of other types": packed({"kind": "pointer", "ref": ["n", "", "1", "x"]}),
    "a blob that is no array": packed({"kind": "parcel", "blob": b"bytes"}),
    "a blob of three": packed({"kind": "parcel", "blob": [1, 0, 0]}),
    "a blob of strings": packed({"kind": "parcel", "blob": ["1", "0"]}),
    "a blob of booleans": packed({"kind": "parcel", "blob": [True, False]}),
    "a blob that never came": packed({"kind": "parcel", "blob": [1, 0]}),
    "free form that is no bytes": packed({"kind": "loose", "anything": "x"}),
    "free form that is no MessagePack": packed({"kind": "loose", "anything": b"\xc1"}),
    "free form that is cut": packed({"kind": "loose", "anything": b"\x92\x01"}),
    "free form with more behind it": packed({"kind": "loose", "anything": b"\x01\x01"}),
    "free form nested deep": packed({"kind": "loose", "anything": b"\x91" * 50_000}),
    "free form with a number as a key": packed({"kind": "loose", "anything": b"\x81\x01\x02"}),
    "free form with an extension": packed({"kind": "loose", "anything": b"\xd6\xff\x00\x00\x00\x00"}),
    "free form of four billion elements": packed({"kind": "loose", "anything": b"\xdd\xff\xff\xff\xff"}),
    "free form of four billion entries": packed({"kind": "loose", "anything": b"\xdf\xff\xff\xff\xff"}),
    "free form of four billion bytes": packed({"kind": "loose", "anything": b"\xc6\xff\xff\xff\xff"}),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_a_message_that_can_not_be_read_costs_its_letter_alone(name: str) -> None:
    message = BAD_MESSAGES[name]
    with little_memory(2 * MIB):
        (misread,) = heard(tell(message))
    assert isinstance(misread, Misread)
    assert (misread.kind, misread.call) == (TELL, 0)
    assert type(misread.error) is FrameInvalid


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_an_ask_that_can_not_be_read_names_its_call(name: str) -> None:
    message = BAD_MESSAGES[name]
    kinds = [(b"\x96\x01\x07\xa1a\x01\xc0", b"", ASK), (b"\x97\x02\xcd\x01\x00\xa1a\xc0", b"\x01\x01", OPEN_STREAM)]
    for begin, end, kind in kinds:
        (misread,) = heard(begin + message + end)
        assert (misread.kind, misread.call) == (kind, 7 if kind == ASK else 256)


@pytest.mark.parametrize("kind", [ANSWER, ITEM])
@pytest.mark.parametrize(
    "value",
    [
        packed({"kind": "no such"}),
        packed({}),
        packed(b"bytes"),
        packed([b"bytes"]),
        packed([["x"]]),
        packed([{"kind": "note"}]),
        b"\xd6\xff\x00\x00\x00\x00",
    ],
    ids=str,
)
def test_an_answer_that_can_not_be_read_names_its_call(kind: int, value: bytes) -> None:
    (misread,) = heard(b"\x93" + bytes([kind]) + b"\x09" + value)
    assert (misread.kind, misread.call) == (kind, 9)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"\x90", id="empty"),
        pytest.param(b"\x92\x0e\x01", id="an unknown kind"),
        pytest.param(b"\x92\x00\x01", id="kind 0"),
        pytest.param(b"\x92\xff\x01", id="kind -1"),
        pytest.param(b"\x92\xa1x\x01", id="a kind that is a string"),
        pytest.param(b"\x92\xcf" + b"\xff" * 8 + b"\x01", id="the largest kind"),
        pytest.param(b"\x80", id="a map"),
        pytest.param(b"\x0b", id="a number"),
        pytest.param(b"\x91\x0b", id="a heartbeat without its stamp"),
        pytest.param(b"\x93\x0b\x01\x01", id="a heartbeat with more"),
        pytest.param(b"\x92\x0b\xa1x", id="a heartbeat by a string"),
        pytest.param(b"\x92\x0b\xcb\x3f\xf0\x00\x00\x00\x00\x00\x01", id="a heartbeat by a fraction"),
        pytest.param(b"\x92\x07\xc0", id="a mark without a call"),
        pytest.param(b"\x92\x04\x01", id="an answer without a value"),
        pytest.param(b"\x93\x04\xa1x\x01" + b"", id="an answer to a string"),
        pytest.param(b"\x94\x05\x01\xa1x\xa1y", id="half a failure"),
        pytest.param(b"\x91" * NESTED, id="nested without end"),
        pytest.param(b"\x92\x0d" + b"\x91" * NESTED + b"\xc0", id="nested deep"),
    ],
)
def test_what_is_no_letter_breaks_the_rules(raw: bytes) -> None:
    with little_memory(4 * len(raw) + 256 * KIB), pytest.raises(FrameInvalid):
        feed(opened(), letters_frame(raw))


def test_a_field_that_comes_twice_is_checked_twice_and_counts_once() -> None:
    """MessagePack has no rule for it, and the decoder takes the last. No second reader could see another message."""
    twice = b"\x84\xa4kind\xa4note\xa4text\xa1x\xa4text\xa1y\xa6number\x05"
    assert heard(tell(twice)) == [Tell("actor", None, Note(text="y", number=5))]
    many = b"\xde\x1f\x41\xa4kind\xa4note" + b"\xa4text\xa1z" * 8000
    with little_memory(MIB):
        assert heard(tell(many)) == [Tell("actor", None, Note(text="z"))]
    kinds = b"\x83\xa4kind\xa4note\xa4kind\xa4note\xa4text\xa1x"
    assert heard(tell(kinds)) == [Tell("actor", None, Note(text="x"))]


def test_several_letters_that_can_not_be_read_are_told_one_by_one() -> None:
    bad = tell(BAD_MESSAGES["an unknown kind"])
    good = tell(packed({"kind": "note", "text": "x"}))
    assert [type(letter) for letter in heard(bad, good, bad, good)] == [Misread, Tell, Misread, Tell]


def test_a_message_nested_100_000_deep_breaks_the_rules_and_costs_little() -> None:
    for opener in (b"\x91", b"\x81\xa1a"):
        for ending in (b"", b"\xc0"):
            wire = opened()
            data = letters_frame(tell(b"\x82\xa4kind\xa4note\xa4text" + opener * NESTED + ending))
            with little_memory(4 * len(data) + 256 * KIB), pytest.raises(ProtocolViolation):
                feed(wire, data)


@pytest.mark.parametrize("count", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"])
def test_a_count_that_nothing_can_hold_is_refused_and_costs_little(count: bytes) -> None:
    for raw in (count, tell(count), b"\x93\x04\x01" + count, b"\x93\x04\x01\x92" + count):
        with little_memory(256 * KIB), pytest.raises(FrameInvalid):
            feed(opened(), letters_frame(raw))


def test_a_frame_of_1_000_000_tiny_letters_is_refused_and_costs_little() -> None:
    tiny = b"\x91\x0b" * ((LIMITS.max_frame_bytes - 5) // 2)
    for data in (
        frame(b"\xdd" + struct.pack(">I", len(tiny) // 2) + tiny),
        frame(b"\xdc\xff\xff" + tiny),
        frame(b"\xdc\x00\x01" + tiny),
    ):
        with little_memory(3 * MIB), pytest.raises(ProtocolViolation):
            feed(opened(), data)


def test_the_largest_answer_of_the_smallest_parts_costs_a_bounded_multiple_of_its_bytes() -> None:
    for part in (b"\xa1a", b"\xcd\x10\x00", b"\x82\xa4kind\xa4note\xa4text\xa1x"):
        count = (LIMITS.max_frame_bytes - 20) // len(part)
        data = letters_frame(b"\x93\x04\x01\xdd" + struct.pack(">I", count) + part * count)
        with little_memory(24 * len(data)):
            (answer,) = feed(opened(), data)
        assert len(answer.value) == count


def test_free_form_data_costs_a_bounded_multiple_of_its_bytes() -> None:
    empty = b"\xdc\xff\xff" + b"\x80" * 65_535
    data = letters_frame(tell(packed({"kind": "loose", "anything": b"\x9f" + empty * 15})))
    with little_memory(100 * len(data)):
        (said,) = feed(opened(), data)
    assert len(said.body.anything.value) == 15


# Writing.


class Stranger(Message, frozen=True, tag="stranger"):
    """In no table."""


@pytest.mark.parametrize("value", [Stranger(), {"a": 1}, [1], b"x", object(), (1, (2,)), (b"x",), 1 + 2j])
def test_a_value_that_the_other_side_could_not_read_is_not_sent(value: object) -> None:
    with pytest.raises(FrameInvalid):
        codec().check_value(value)


@pytest.mark.parametrize("value", [None, True, 5, 1.5, "x", Note(text="x"), (), (1, "x", None, Note(text="y"))])
def test_a_value_that_the_other_side_can_read_may_be_sent(value: object) -> None:
    codec().check_value(value)
    assert feed(opened(), letters(Answer(1, value))) == [Answer(1, value)]


def test_a_message_that_is_not_in_the_table_is_not_sent() -> None:
    codec().check_message(Note(text="x"))
    for message in (Stranger(), "x", None):
        with pytest.raises(FrameInvalid):
            codec().check_message(message)


@pytest.mark.parametrize(
    "message",
    [
        Note(text="x", number=2**64),
        Note(text="\ud800"),
        Loose(anything=FreeForm(object())),
        Loose(anything=FreeForm({"a": {1, 2}})),
        Loose(anything=FreeForm(b"x" * MAX_FREE_FORM_BYTES)),
        Parcel(blob=Blob(b""), more=tuple(Blob(b"") for _ in range(MAX_BLOBS))),
        Note(text=object()),  # type: ignore[arg-type]
    ],
    ids=range(7),
)
def test_what_can_not_be_written_is_refused_and_the_next_letter_is_not_touched(message: object) -> None:
    writer = codec()
    with pytest.raises(FrameInvalid):
        writer.encode(Tell("actor", None, message))
    written = writer.encode(Tell("actor", None, Parcel(blob=Blob(b"x"))), 5)
    assert [blob.data for blob in written.blobs] == [b"x"]
    assert msgpack.unpackb(written.data)[3]["blob"] == [5, 0]


def test_free_form_data_keeps_its_bounds() -> None:
    assert FreeForm.unpack(FreeForm([None] * MAX_FREE_FORM_ITEMS).pack()).value == [None] * MAX_FREE_FORM_ITEMS
    with pytest.raises(ValueError, match="can't be read"):
        FreeForm.unpack(FreeForm([None] * (MAX_FREE_FORM_ITEMS + 1)).pack())
    with pytest.raises(ValueError, match="exceeds the bound"):
        FreeForm.unpack(bytes(MAX_FREE_FORM_BYTES + 1))


def test_types_that_could_not_be_told_apart_on_the_wire_are_our_own_bug() -> None:
    class Untagged(msgspec.Struct, forbid_unknown_fields=True):
        pass

    class Lenient(msgspec.Struct, tag="lenient", tag_field="kind"):
        pass

    class Elsewhere(msgspec.Struct, tag="elsewhere", forbid_unknown_fields=True):
        pass

    class Array(msgspec.Struct, tag="array", tag_field="kind", forbid_unknown_fields=True, array_like=True):
        pass

    for kind in (int, Untagged, Lenient, Elsewhere, Array):
        with pytest.raises(AssertionError):
            check_message_type(kind)
    check_message_type(Note)


def test_a_table_without_messages_still_reads_the_plain_letters() -> None:
    plainest = codec(())
    reader = plainest.decoder(lambda transfer, index: Blob(b""))
    assert reader.decode(b"\xdc\x00\x02" + BEAT + b"\x93\x04\x01\xa1x") == [Beat(1), Answer(1, "x")]
    with pytest.raises(msgspec.ValidationError):
        reader.decode(b"\xdc\x00\x01" + tell(b"\x80"))
