"""What the metadata store keeps of a stream that can be gone on with: a record of what was asked, and its tokens.

streams/ID/record         the record; the revision of its last change is its owner's epoch
streams/ID/CHOICE/PART    the tokens of a choice, `PART_TOKENS` in each part, and behind the last of them its end
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from sllm_actor.domain.tokens import pack_uint32, unpack_uint32
from sllm_actor.errors import FrameInvalid
from sllm_actor.frontend.choice_log import ChoiceLog
from sllm_actor.frontend.keys import Key
from sllm_actor.frontend.orders import ChatOrder, CompletionOrder
from sllm_actor.messages.generation import Finished
from sllm_actor.metadata import Fact, Store

PREFIX = "streams/"
PART_TOKENS = 64
_STREAM_ID = re.compile(r"stream-[0-9a-f]{32}")


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a stream was asked, of which model as it was then, and whose it is: `asked_by` is empty without a key.

    `owner` differs with everyone who goes on with it. Behind `expires_wall_s` nobody does.
    """

    order: ChatOrder | CompletionOrder
    choices: int
    fingerprint: str
    asked_by: str
    owner: str
    expires_wall_s: float


class Found(NamedTuple):
    """A stream that is known, and its record as it lies in the store."""

    record: Record
    fact: Fact


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Some of a choice's tokens, packed, and its end where that follows them."""

    tokens: bytes
    end: Finished | None = None


_records = msgspec.msgpack.Decoder(Record)
_parts = msgspec.msgpack.Decoder(Part)
encode = msgspec.msgpack.Encoder().encode


def is_stream_id(text: str) -> bool:
    """Tell whether a stream may have this id."""
    return _STREAM_ID.fullmatch(text) is not None


def prefix_of(stream_id: str) -> str:
    """Give what the keys of a stream begin with."""
    return f"{PREFIX}{stream_id}/"


def record_key(stream_id: str) -> str:
    """Give the key of a stream's record."""
    return f"{prefix_of(stream_id)}record"


def part_key(stream_id: str, choice: int, part: int) -> str:
    """Give the key of a part of a choice's tokens."""
    return f"{prefix_of(stream_id)}{choice}/{part:06}"


def asked_by(key: Key | None) -> str:
    """Tell keys apart without naming one: what is stored of it is a hash of its hash."""
    return "" if key is None else hashlib.sha256(f"stream {key.sha256}".encode()).hexdigest()


def read_record(fact: Fact) -> Record | None:
    """Read a record; None for one of another version."""
    try:
        return _records.decode(fact.value)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


async def look_up(store: Store, stream_id: str, key: Key | None, now_wall_s: float) -> Found | None:
    """Give the record of a stream; None where there is none, none any more, or it is not this key's.

    Raises:
        MetadataFailed: the store can't be asked.
    """
    fact = await store.get(record_key(stream_id))
    record = read_record(fact) if fact is not None else None
    if fact is None or record is None or record.asked_by != asked_by(key):
        return None
    return Found(record, fact) if now_wall_s <= record.expires_wall_s else None


def parts_of(stream_id: str, choice: int, log: ChoiceLog, written: int) -> Iterator[tuple[str, bytes]]:
    """Give the keys and values that have changed of a choice since so many of its tokens were written."""
    last = max(len(log.tokens) - 1, 0) // PART_TOKENS
    for part in range(min(written // PART_TOKENS, last), last + 1):
        tokens = log.tokens[part * PART_TOKENS : (part + 1) * PART_TOKENS]
        end = log.end if part == last else None
        yield part_key(stream_id, choice, part), encode(Part(tokens=pack_uint32(tokens), end=end))


def read_parts(stream_id: str, choice: int, facts: Iterable[Fact]) -> tuple[list[int], Finished | None]:
    """Read a choice's tokens as far as they are there without a gap, and its end if it is behind them."""
    tokens: list[int] = []
    values = {fact.key: fact.value for fact in facts}
    part, end = 0, None
    while end is None and len(tokens) == part * PART_TOKENS:
        value = values.get(part_key(stream_id, choice, part))
        if value is None:
            break
        try:
            read = _parts.decode(value)
            tokens += unpack_uint32(read.tokens)
        except (msgspec.DecodeError, UnicodeDecodeError, FrameInvalid):
            break
        end = read.end
        part += 1
    return tokens, end
