"""The wire format does not change by accident: each kind of frame, byte for byte, read by the msgpack package alone."""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any

import golden_frames
import msgpack
import pytest
from wire_pairs import SECRET as ANOTHER_SECRET
from wire_pairs import Note, feed

from sllm_actor.runtime.letters import Answer, Goodbye, Tell
from sllm_actor.runtime.wire import Opened

GOLDEN: dict[str, bytes] = {
    name: bytes.fromhex(text) for name, text in json.loads(golden_frames.FILE.read_text()).items()
}
NOTE = {"kind": "note", "text": "hi", "number": -1}
PREFACE = b"sllm\x00act"
DIALER_HELLO = {
    "kind": "hello",
    "version_min": 1,
    "version_max": 1,
    "node": "client",
    "uid": 1,
    "nonce": bytes(range(32)),
    "endpoint": "",
    "secured": True,
    "links": 0,
    "max_frame_bytes": 1_048_576,
    "max_blob_bytes": 1_048_576,
}
ACCEPTOR_HELLO = DIALER_HELLO | {
    "node": "server",
    "uid": 2**40 + 1,
    "nonce": bytes(range(32, 64)),
    "endpoint": "tcp://127.0.0.1:8401",
}
FREE_FORM = msgpack.packb({"a": [1, None, b"\0"]})
LETTERS: dict[str, list[list[Any]]] = {
    "ask": [[1, 1, "greeter", 1.5, b"trace", NOTE]],
    "ask without a trace": [[1, 2, "greeter", 1.5, None, NOTE]],
    "open a stream": [[2, 3, "counter", None, NOTE, 64, 262_144]],
    "tell": [[3, "greeter", None, NOTE]],
    "tell free-form data": [[3, "greeter", None, {"kind": "loose", "anything": FREE_FORM}]],
    "tell a reference": [[3, "greeter", None, {"kind": "pointer", "ref": ["client", "unix:///tmp/x", 1, "me"]}]],
    "answer with a message": [[4, 1, NOTE]],
    "answer with nothing": [[4, 3, None]],
    "answer with a tuple": [[4, 300, [True, 1, 0.5, "x", None, NOTE]]],
    "failure": [[5, 2, "mailbox_full", "try later", None, 0.1]],
    "failure that names a parameter": [[5, 2, "invalid_request", "no", "text", None]],
    "item": [[6, 3, "a"]],
    "mark": [[7, 3]],
    "credit": [[8, 3, 32]],
    "cancel": [[9, 3]],
    "watch": [[10, 4, "greeter"]],
    "beat": [[11, 1_000_000_000]],
    "echo": [[12, 1_000_000_000]],
    "goodbye": [[13, "closing"]],
    "two letters in one frame": [[6, 3, "b"], [7, 3]],
    "tell that refers to it": [[3, "greeter", None, {"kind": "parcel", "blob": [1, 0], "more": [[1, 1], [1, 2]]}]],
}  # fmt: skip


def body_of(name: str) -> bytes:
    """Give a frame's body; its length must be right."""
    data = GOLDEN[name]
    assert int.from_bytes(data[:4], "big") == len(data) - 4
    return data[4:]


def read(name: str) -> Any:
    return msgpack.unpackb(body_of(name))


def proof(role: bytes) -> bytes:
    """Compute a proof as docs/protocol.md says."""
    hellos = [hashlib.sha256(body_of(f"{side}: hello")).digest() for side in ("dialer", "acceptor")]
    return hmac.digest(golden_frames.SECRET, b"sllm actor handshake 1 " + role + b" " + b"".join(hellos), "sha256")


def test_our_encoder_writes_every_frame_as_it_was() -> None:
    assert golden_frames.frames() == GOLDEN


def test_every_kind_of_letter_and_every_step_is_among_them() -> None:
    assert {letter[0] for said in LETTERS.values() for letter in said} == set(range(1, 14))
    assert {read(name)["kind"] for name in GOLDEN if ": " in name and "preface" not in name} == {
        "hello",
        "proof",
        "welcome",
        "refused",
    }
    assert {body_of(name)[0] for name in GOLDEN if ": " not in name} == {0xDC, 0x91, 0x92, 0x93}


def test_the_handshake_is_what_the_document_says() -> None:
    assert GOLDEN["dialer: preface"] == GOLDEN["acceptor: preface"] == PREFACE
    assert read("dialer: hello") == DIALER_HELLO
    assert read("acceptor: hello") == ACCEPTOR_HELLO
    assert read("dialer: proof") == {"kind": "proof", "mac": proof(b"dialer")}
    assert read("acceptor: proof") == {"kind": "proof", "mac": proof(b"acceptor")}
    assert read("acceptor: welcome") == {"kind": "welcome"}
    assert read("acceptor: refused") == {"kind": "refused", "code": "version_mismatch", "text": "why"}
    assert golden_frames.SECRET != ANOTHER_SECRET


@pytest.mark.parametrize("name", LETTERS)
def test_letters_are_arrays_in_an_array_with_a_number_of_16_bits(name: str) -> None:
    body = body_of(name)
    assert body[:3] == b"\xdc" + len(LETTERS[name]).to_bytes(2, "big")
    assert msgpack.unpackb(body) == LETTERS[name]


def test_transfers_are_arrays_of_three_two_and_one() -> None:
    assert read("begin of a transfer") == [1, [5, 0, 5], 10]
    assert read("chunk of its first blob") == [1, b"first"]
    assert read("chunk of its third blob") == [1, b"third"]
    assert body_of("chunk of its first blob")[:11] == b"\x92\xce\x00\x00\x00\x01\xc6\x00\x00\x00\x05"
    assert read("abort of a transfer") == [7]


def test_the_conversation_is_understood_by_both_ends() -> None:
    caller, called = golden_frames.ends()
    feed(called, GOLDEN["dialer: preface"] + GOLDEN["dialer: hello"] + GOLDEN["dialer: proof"])
    called.admit()
    feed(caller, GOLDEN["acceptor: preface"] + GOLDEN["acceptor: hello"])
    opened, *_ = feed(caller, GOLDEN["acceptor: proof"] + GOLDEN["acceptor: welcome"])
    assert opened == Opened(golden_frames.ACCEPTOR)
    everything = b"".join(data for name, data in GOLDEN.items() if ": " not in name and "abort" not in name)
    for wire in (caller, called):
        heard = feed(wire, everything)
        assert len(heard) == sum(map(len, LETTERS.values()))
        assert Tell("greeter", None, Note(text="hi", number=-1)) in heard
        assert Answer(3, None) in heard
        assert Goodbye("closing") in heard
