"""One whole conversation with everything fixed, frame by frame as our encoder writes it.

`tests/golden/VERSION/frames.json` has what it must be: `tests/golden_files.py` writes it after a change of the
protocol, which is then a new version of it.
"""

from __future__ import annotations

import json
from pathlib import Path

from wire_pairs import Loose, Note, Parcel, Pointer, Ref, acceptor, dialer, encoded, feed, hello, letters, opening, step

from sllm_actor.errors import VersionMismatch
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
    OpenStream,
    Tell,
    Watch,
)
from sllm_actor.runtime.transfers import Outgoing
from sllm_actor.runtime.values import Blob, FreeForm
from sllm_actor.runtime.wire import Wire

FILE = Path(__file__).parent / "golden/0.1.0/frames.json"
SECRET = b"a golden secret of just 32 bytes"
DIALER = hello("client", uid=1, nonce=bytes(range(32)))
ACCEPTOR = hello("server", uid=2**40 + 1, nonce=bytes(range(32, 64)), endpoint="tcp://127.0.0.1:8401")


def ends() -> tuple[Wire, Wire]:
    return dialer(DIALER, secret=SECRET), acceptor(ACCEPTOR, secret=SECRET)


def handshake_frames() -> dict[str, bytes]:
    made = opening(*ends())
    welcome = step(kind="welcome")
    assert made.welcome.endswith(welcome)
    other, refusing = ends()
    feed(refusing, other.take_output())
    refusing.take_output()
    feed(refusing, made.proof)
    refusing.refuse(VersionMismatch("why"))
    return {
        "dialer: preface": made.first[:8],
        "dialer: hello": made.first[8:],
        "acceptor: preface": made.answer[:8],
        "acceptor: hello": made.answer[8:],
        "dialer: proof": made.proof,
        "acceptor: proof": made.welcome[: -len(welcome)],
        "acceptor: welcome": welcome,
        "acceptor: refused": refusing.take_output(),
    }


def letter_frames() -> dict[str, bytes]:
    note = Note(text="hi", number=-1)
    return {
        "ask": letters(Ask(1, "greeter", 1.5, b"trace", note)),
        "ask without a trace": letters(Ask(2, "greeter", 1.5, None, note)),
        "open a stream": letters(OpenStream(3, "counter", None, note, 64, 262_144)),
        "tell": letters(Tell("greeter", None, note)),
        "tell free-form data": letters(Tell("greeter", None, Loose(anything=FreeForm({"a": [1, None, b"\x00"]})))),
        "tell a reference": letters(Tell("greeter", None, Pointer(ref=Ref("client", "unix:///tmp/x", 1, "me")))),
        "answer with a message": letters(Answer(1, note)),
        "answer with nothing": letters(Answer(3, None)),
        "answer with a tuple": letters(Answer(300, (True, 1, 0.5, "x", None, note))),
        "failure": letters(Failure(2, "mailbox_full", "try later", None, 0.1)),
        "failure that names a parameter": letters(Failure(2, "invalid_request", "no", "text", None)),
        "item": letters(Item(3, "a")),
        "mark": letters(Mark(3)),
        "credit": letters(Credit(3, 32)),
        "cancel": letters(Cancel(3)),
        "watch": letters(Watch(4, "greeter")),
        "beat": letters(Beat(1_000_000_000)),
        "echo": letters(Echo(1_000_000_000)),
        "goodbye": letters(Goodbye("closing")),
        "two letters in one frame": letters(Item(3, "b"), Mark(3)),
    }


def transfer_frames() -> dict[str, bytes]:
    outgoing = Outgoing()
    blobs = [Blob(b"first"), Blob(b""), Blob(b"third")]
    parcel = Parcel(blob=blobs[0], more=tuple(blobs[1:]))
    number = outgoing.number()
    outgoing.send("greeter", encoded(Tell("greeter", None, parcel), number), number, blobs)
    sent: list[bytes] = []
    letter: list[bytes] = []
    while outgoing:
        sent.append(b"".join(bytes(part) for part in outgoing.next_frames(letter)))
    begin, first, third = filter(None, sent)
    return {
        "begin of a transfer": begin,
        "chunk of its first blob": first,
        "chunk of its third blob": third,
        "tell that refers to it": b"".join((_length(letter), *letter)),
        "abort of a transfer": b"\x00\x00\x00\x02\x91\x07",
    }


def _length(raws: list[bytes]) -> bytes:
    return (3 + sum(map(len, raws))).to_bytes(4, "big") + b"\xdc" + len(raws).to_bytes(2, "big")


def frames() -> dict[str, bytes]:
    return {**handshake_frames(), **letter_frames(), **transfer_frames()}


def written() -> str:
    return json.dumps({name: data.hex() for name, data in frames().items()}, indent=1) + "\n"
