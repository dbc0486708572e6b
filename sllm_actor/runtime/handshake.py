"""How two nodes prove to each other who they are, before either decodes anything else. Pure functions and data.

Each side sends a hello with a fresh nonce; each then proves that it knows the cluster's secret by an HMAC over both
hellos and its own role, so that no proof can be replayed to another connection or reflected to its sender.
With mutual TLS the certificate's names prove the node id instead, or as well.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

import msgspec

from sllm_actor.errors import FrameInvalid, NodeMismatch, SecretMismatch, VersionMismatch

PREFACE = b"sllm\x00act"
VERSION_MIN = 1
VERSION_MAX = 1
NONCE_BYTES = 32
MIN_SECRET_BYTES = 16
MAX_HANDSHAKE_FRAME_BYTES = 4096
MAX_NAME_LENGTH = 255
# Every node takes frames of this size at least: a chunk of a blob with its header.
MIN_FRAME_BYTES = 192 * 1024


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello", tag_field="kind"):
    """Who speaks. Later versions may add fields, so unknown ones are passed over here, and here only.

    `links` counts the connections with this peer that the speaker has seen open: it tells a new dial after a loss from
    one that crossed the other's. `secured` says whether a proof by secret follows.
    """

    version_min: int
    version_max: int
    node: str
    uid: int
    nonce: bytes
    endpoint: str
    secured: bool
    links: int
    max_frame_bytes: int
    max_blob_bytes: int


class Proof(msgspec.Struct, frozen=True, kw_only=True, tag="proof", tag_field="kind"):
    """The HMAC of the speaker, empty where there is no secret."""

    mac: bytes


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome", tag_field="kind"):
    """The acceptor's last word: letters may come."""


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused", tag_field="kind"):
    """No connection, and why: an error by its code."""

    code: str
    text: str


Step = Hello | Proof | Welcome | Refused
_decoder: msgspec.msgpack.Decoder[Step] = msgspec.msgpack.Decoder(Step)


def read_step(body: Any) -> Step:
    """Decode one frame of a handshake.

    Raises:
        FrameInvalid: it is none.
    """
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FrameInvalid(f"a handshake that can't be read: {error}") from error


def common_version(hello: Hello) -> int:
    """Give the newest version that both sides speak.

    Raises:
        VersionMismatch: there is none.
    """
    version = min(hello.version_max, VERSION_MAX)
    if version < max(hello.version_min, VERSION_MIN):
        raise VersionMismatch(
            f"{hello.node[:MAX_NAME_LENGTH]} speaks protocol {hello.version_min} to {hello.version_max}, "
            f"this node {VERSION_MIN} to {VERSION_MAX}"
        )
    return version


def check_hello(hello: Hello, *, expected_node: str, secured: bool, certified: frozenset[str] | None) -> None:
    """Check what a peer says of itself.

    Raises:
        FrameInvalid, VersionMismatch, NodeMismatch, SecretMismatch: what is wrong.
    """
    common_version(hello)
    if not 0 < len(hello.node) <= MAX_NAME_LENGTH or len(hello.nonce) != NONCE_BYTES or not 0 < hello.uid < 2**63:
        raise FrameInvalid("a hello whose node id, uid or nonce is out of bounds")
    if hello.max_blob_bytes < 0 or hello.links < 0:
        raise FrameInvalid("a hello with a negative count")
    if len(hello.endpoint) > MAX_NAME_LENGTH or hello.max_frame_bytes < MIN_FRAME_BYTES:
        raise FrameInvalid("a hello whose endpoint or limits are out of bounds")
    if expected_node and hello.node != expected_node:
        raise NodeMismatch(f"{hello.node!r} answers where {expected_node!r} was expected")
    if certified is not None and hello.node not in certified:
        raise NodeMismatch(f"the certificate is not for node {hello.node!r}")
    if hello.secured != secured:
        raise SecretMismatch(f"{hello.node!r} {'has' if hello.secured else 'has no'} cluster secret, unlike this node")


def mac_of(secret: bytes, role: bytes, dialer_hello: bytes, acceptor_hello: bytes) -> bytes:
    """Compute one side's proof over both hellos as they were sent: `[32]` bytes, or none without a secret."""
    if not secret:
        return b""
    heard = hashlib.sha256(dialer_hello).digest() + hashlib.sha256(acceptor_hello).digest()
    return hmac.digest(secret, b"sllm actor handshake 1 " + role + b" " + heard, "sha256")


def check_mac(given: bytes, expected: bytes) -> None:
    """Compare a proof with what it must be.

    Raises:
        SecretMismatch: the peer does not know the secret.
    """
    if not hmac.compare_digest(given, expected):
        raise SecretMismatch("the peer does not know the cluster secret")
