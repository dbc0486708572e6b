"""Frames: any split of the bytes gives the same messages, and whatever is no message is refused."""

from __future__ import annotations

import importlib
import pkgutil
import random
import struct
from collections.abc import Sequence

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sllm_actor.messages
from sllm_actor.domain import FinishReason, ModelName, RequestId, Sampling, Span
from sllm_actor.errors import FrameInvalid, FrameTooLong
from sllm_actor.messages.declare import message
from sllm_actor.messages.engine import FROM_ENGINE, TO_ENGINE, PooledFile, PrepareModel
from sllm_actor.messages.generation import Finished, Generate, Tokens
from sllm_actor.messages.text import TO_TEXT
from sllm_actor.runtime.frames import Codec

MAX_FRAME_BYTES = 4096
NESTED = 100_000

messages = st.one_of(
    st.builds(
        Tokens,
        request_id=st.text(max_size=20).map(RequestId),
        index=st.integers(0, 2**31),
        token_ids=st.lists(st.integers(0, 2**32), max_size=20).map(tuple),
    ),
    st.builds(
        Finished,
        request_id=st.text(max_size=20).map(RequestId),
        reason=st.sampled_from(FinishReason),
        prompt_tokens=st.integers(0, 2**31),
        generated_tokens=st.integers(0, 2**31),
    ),
)


def codec(max_frame_bytes: int = MAX_FRAME_BYTES) -> Codec:
    """One end of a channel that says to itself what an engine says."""
    return Codec(FROM_ENGINE, FROM_ENGINE, max_frame_bytes)


def frame(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def tokens(*token_ids: int) -> Tokens:
    return Tokens(request_id=RequestId("r"), index=0, token_ids=token_ids)


def body_of(sent: object) -> bytes:
    return msgspec.msgpack.encode(sent)


@given(st.lists(messages, max_size=8), st.data())
def test_any_split_of_the_bytes_gives_the_same_messages(sent: Sequence[object], data: st.DataObject) -> None:
    stream = b"".join(codec().encode(one) for one in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    receiver = codec()
    received: list[object] = []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        received += receiver.feed(stream[begin:end])
    assert received == sent


def test_bytes_that_arrive_one_by_one_give_the_same_messages() -> None:
    sent = [tokens(*range(k)) for k in range(50)]
    receiver = codec()
    stream = b"".join(codec().encode(one) for one in sent)
    assert [one for byte in stream for one in receiver.feed(bytes([byte]))] == sent


def test_the_msgpack_package_alone_reads_a_frame_and_writes_one_that_is_read() -> None:
    said = Finished(request_id=RequestId("r"), reason=FinishReason.STOP, prompt_tokens=3, generated_tokens=5)
    raw = codec().encode(said)
    assert int.from_bytes(raw[:4], "big") == len(raw) - 4
    plain = msgpack.unpackb(raw[4:])
    assert plain == {
        "kind": "generation.finished",
        "request_id": "r",
        "reason": "stop",
        "prompt_tokens": 3,
        "generated_tokens": 5,
        "cached_tokens": 0,
    }
    assert list(codec().feed(frame(msgpack.packb(plain)))) == [said]


def test_nested_data_and_bytes_travel_whole() -> None:
    asked = Generate(
        request_id=RequestId("r"),
        model=ModelName("m"),
        prompt=bytes(range(256)),
        sampling=Sampling(max_tokens=1, temperature=0.5, top_p=0.25, seed=2**63 - 1, ignore_eos=True),
        spans=(Span(name="a", begin_s=1.5, end_s=float("inf"), size_bytes=2**40, tier="ssd"),),
    )
    both = Codec(TO_ENGINE, TO_ENGINE, MAX_FRAME_BYTES)
    assert list(both.feed(both.encode(asked))) == [asked]


def test_a_length_over_the_bound_is_refused_before_any_of_the_body_has_come() -> None:
    with pytest.raises(FrameTooLong, match="4097"):
        list(codec().feed(struct.pack(">I", MAX_FRAME_BYTES + 1)))
    assert list(codec().feed(struct.pack(">I", MAX_FRAME_BYTES))) == []


def test_a_message_over_the_bound_is_not_sent() -> None:
    fits = PooledFile(name="x" * (MAX_FRAME_BYTES - 100), size_bytes=1, chunks=b"")
    over = PooledFile(name="x" * MAX_FRAME_BYTES, size_bytes=1, chunks=b"")
    sender = Codec([PooledFile], [PooledFile], MAX_FRAME_BYTES)
    assert list(sender.feed(sender.encode(fits))) == [fits]
    with pytest.raises(FrameTooLong):
        sender.encode(over)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x91" * NESTED,
        b"\x81\xa1a" * NESTED,
        b"\x82\xa4kind\xb1generation.tokens\xa9token_ids" + b"\x91" * NESTED,
        b"\x81\xa4kind\xa4\xff\xfe\xfd\xfc",
        body_of({"kind": "generation.tokens"}),
        body_of({"kind": "no.such.kind"}),
        body_of({"kind": 5}),
        body_of({"request_id": "r", "index": 0, "token_ids": []}),
        body_of({"kind": "generation.tokens", "request_id": "r", "index": 0, "token_ids": [], "more": 1}),
        body_of({"kind": "generation.tokens", "request_id": "r", "index": "0", "token_ids": []}),
        body_of({"kind": "generation.tokens", "request_id": "r", "index": 0, "token_ids": [1.5]}),
        body_of({"kind": "generation.tokens", "request_id": "r", "index": 0, "token_ids": [2**64 - 1, "x"]}),
        body_of({"kind": "generation.tokens", "request_id": None, "index": 0, "token_ids": []}),
        body_of(
            PrepareModel(path="/", dtype="F32", eos_token_ids=(), context_tokens=1, aliases={})
        ),
        body_of(tokens(1)) + b"\x00",
        body_of(tokens(1))[:-1],
    ],
)  # fmt: skip
def test_a_body_that_is_no_message_of_the_conversation_is_refused(body: bytes) -> None:
    with pytest.raises(FrameInvalid):
        list(codec(max_frame_bytes=4 * NESTED).feed(frame(body)))


def test_what_came_before_a_bad_frame_is_given_first() -> None:
    received = []
    with pytest.raises(FrameInvalid):
        for one in codec().feed(codec().encode(tokens(1)) + frame(b"\xc1")):
            received.append(one)
    assert received == [tokens(1)]


def test_no_change_of_a_byte_does_anything_but_make_another_message_or_a_refusal() -> None:
    dice = random.Random(3)
    whole = body_of(PrepareModel(path="/models/x", dtype="BF16", eos_token_ids=(1, 2), context_tokens=9, aliases={}))
    for table in (TO_ENGINE, FROM_ENGINE, TO_TEXT):
        refused = 0
        for _ in range(3000):
            body = bytearray(whole)
            body[dice.randrange(len(body))] = dice.randrange(256)
            try:
                assert all(isinstance(one, table) for one in Codec((), table, MAX_FRAME_BYTES).feed(frame(bytes(body))))
            except FrameInvalid:
                refused += 1
        assert refused > 1000


def test_a_message_of_the_other_direction_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="does not travel this way"):
        Codec(TO_ENGINE, FROM_ENGINE, MAX_FRAME_BYTES).encode(tokens(1))


def test_no_wire_name_is_used_twice_in_all_conversations() -> None:
    for module in pkgutil.iter_modules(sllm_actor.messages.__path__):
        importlib.import_module(f"sllm_actor.messages.{module.name}")
    with pytest.raises(AssertionError, match=r"'engine.hello' is already the wire name"):

        @message("engine.hello")
        class Another:
            """Takes a name that is taken."""


def test_a_message_is_frozen_keyword_only_and_keeps_its_docstring() -> None:
    said = tokens(1)
    with pytest.raises(AttributeError):
        said.index = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        Tokens(RequestId("r"), 0, (1,))  # type: ignore[call-arg]
    assert (Tokens.__doc__ or "").startswith("Newly generated tokens")
