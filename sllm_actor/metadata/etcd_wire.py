"""What is said to etcd's JSON gateway and what it answers: data only.

The gateway speaks proto3's JSON: bytes are base64, 64-bit numbers are strings, what is zero, false or
empty is absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from sllm_actor.metadata.store import (
    Absent,
    Change,
    Changes,
    Condition,
    CreatedAt,
    Delete,
    Fact,
    HasValue,
    Kind,
    LeaseId,
    Operation,
    Present,
    Unchanged,
    prefix_end,
)

Body = dict[str, Any]


class Header(msgspec.Struct, frozen=True):
    """Where the store was when it answered."""

    revision: int = 0


class KeyValue(msgspec.Struct, frozen=True):
    """A key as etcd has it."""

    key: bytes = b""
    value: bytes = b""
    create_revision: int = 0
    mod_revision: int = 0
    lease: int = 0


class RangeAnswer(msgspec.Struct, frozen=True):
    """The facts asked for; `more` where a page was full."""

    header: Header = Header()
    kvs: tuple[KeyValue, ...] = ()
    more: bool = False


class OperationAnswer(msgspec.Struct, frozen=True):
    """One operation's answer; only ranges are looked at."""

    response_range: RangeAnswer | None = None


class CommitAnswer(msgspec.Struct, frozen=True):
    """Which branch was taken, and the answers of its operations."""

    header: Header = Header()
    succeeded: bool = False
    responses: tuple[OperationAnswer, ...] = ()


class GrantAnswer(msgspec.Struct, frozen=True):
    """A lease, perhaps with more time than was asked for."""

    id: int = msgspec.field(name="ID", default=0)
    ttl_s: int = msgspec.field(name="TTL", default=0)


class KeptAlive(msgspec.Struct, frozen=True):
    """A stream of one: a lease without time has ended."""

    result: GrantAnswer = GrantAnswer()


class Token(msgspec.Struct, frozen=True):
    """What proves who asks, for some minutes."""

    token: str = ""


class StatusAnswer(msgspec.Struct, frozen=True):
    """What a member says of itself."""

    version: str = ""


class Nothing(msgspec.Struct, frozen=True):
    """An answer that says no more than that it was done."""


class Refusal(msgspec.Struct, frozen=True):
    """An error; `code` is gRPC's."""

    message: str = ""
    code: int = 0


class Event(msgspec.Struct, frozen=True):
    """A change; one without a type is a put."""

    kv: KeyValue = KeyValue()
    type: str = "PUT"


class WatchAnswer(msgspec.Struct, frozen=True):
    """Some of a watch: that it has begun, has ended, how far it is, or changes."""

    header: Header = Header()
    created: bool = False
    canceled: bool = False
    compact_revision: int = 0
    cancel_reason: str = ""
    events: tuple[Event, ...] = ()


class WatchPiece(msgspec.Struct, frozen=True):
    """One line of a watch."""

    result: WatchAnswer | None = None


def fact_of(kv: KeyValue, root: bytes) -> Fact:
    """Give the fact of a key below `root`."""
    lease = LeaseId(kv.lease) if kv.lease else None
    return Fact(kv.key[len(root) :].decode(), kv.value, kv.create_revision, kv.mod_revision, lease)


def changes_of(answer: WatchAnswer, root: bytes) -> list[Changes]:
    """Give the changes of an answer, by revision."""
    found: dict[int, list[Change]] = {}
    for event in answer.events:
        key = event.kv.key[len(root) :].decode()
        deleted = event.type == "DELETE"
        fact = None if deleted else fact_of(event.kv, root)
        change = Change(Kind.DELETED if deleted else Kind.PUT, key, fact)
        found.setdefault(event.kv.mod_revision, []).append(change)
    return [Changes(revision, tuple(found[revision])) for revision in sorted(found)]


def get_body(key: bytes) -> Body:
    """Ask for one key."""
    return {"key": key}


def page_body(first: bytes, prefix: bytes, revision: int, limit: int) -> Body:
    """Ask for the keys of a prefix from `first` on, as of a revision, or of now where that is 0."""
    return {"key": first, "range_end": prefix_end(prefix), "revision": str(revision), "limit": str(limit)}


def watch_body(prefix: bytes, from_revision: int) -> Body:
    """Ask for the changes below a prefix."""
    return {
        "create_request": {
            "key": prefix,
            "range_end": prefix_end(prefix),
            "start_revision": str(from_revision),
            "progress_notify": True,
        }
    }


def commit_body(
    root: bytes,
    conditions: Sequence[Condition],
    operations: Iterable[Operation],
    receipt: bytes,
    receipt_lease: LeaseId,
    retried: bool,
) -> Body:
    """Ask for a commit that is made once, however often it is asked for.

    With what it does it leaves a receipt, and where there is a receipt it does nothing. An attempt that is refused
    after others that may yet arrive leaves one too, so that those are refused as it was. Receipts are put under a
    lease: when that has ended, and they are gone with it, no attempt can be carried out any more.
    """
    keys = dict.fromkeys(condition.key for condition in conditions)
    no_receipt = {"target": "CREATE", "result": "EQUAL", "key": receipt, "create_revision": "0"}
    refused = [{"request_range": get_body(key)} for key in (receipt, *(root + key.encode() for key in keys))]
    if retried:
        settle = {"compare": [no_receipt], "success": [_receipt(receipt, b"refused", receipt_lease)]}
        refused.append({"request_txn": settle})
    return {
        "compare": [*(_compare(root, condition) for condition in conditions), no_receipt],
        "success": [
            *(_operation(root, operation) for operation in operations),
            _receipt(receipt, b"done", receipt_lease),
        ],
        "failure": refused,
    }


def _receipt(key: bytes, value: bytes, lease: LeaseId) -> Body:
    return {"request_put": {"key": key, "value": value, "lease": str(lease)}}


def _compare(root: bytes, condition: Condition) -> Body:
    body: Body = {"key": root + condition.key.encode(), "result": "EQUAL", "target": "CREATE"}
    match condition:
        case Absent():
            return body | {"create_revision": "0"}
        case Present():
            return body | {"create_revision": "0", "result": "GREATER"}
        case CreatedAt():
            return body | {"create_revision": str(condition.created)}
        case Unchanged():
            return body | {"target": "MOD", "mod_revision": str(condition.changed)}
        case HasValue():
            return body | {"target": "VALUE", "value": condition.value}


def _operation(root: bytes, operation: Operation) -> Body:
    key = root + operation.key.encode()
    if isinstance(operation, Delete):
        return {"request_delete_range": {"key": key}}
    return {"request_put": {"key": key, "value": operation.value, "lease": str(operation.lease or 0)}}
