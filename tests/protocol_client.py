"""A client of a node, written from docs/protocol.md: a blocking socket, MessagePack and HMAC, and nothing of ours."""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import struct
from collections import deque
from typing import Any

import msgpack

PREFACE = bytes.fromhex("73 6c 6c 6d 00 61 63 74")
ASK, STREAM, TELL, ANSWER, FAILURE, ITEM, MARK, CREDIT, CANCEL, WATCH, BEAT, ECHO, GOODBYE = range(1, 14)
MAX_FRAME_BYTES = 1_048_576
CHUNK_BYTES = 1000


class Refused(Exception):
    """The acceptor's reason, its code first."""


class Gone(Exception):
    """The node has closed the connection."""


def mac_of(secret: bytes, role: bytes, dialer_hello: bytes, acceptor_hello: bytes) -> bytes:
    """Compute a proof from the bodies of both hellos."""
    heard = hashlib.sha256(dialer_hello).digest() + hashlib.sha256(acceptor_hello).digest()
    return hmac.new(secret, b"sllm actor handshake 1 " + role + b" " + heard, "sha256").digest()


class Client:
    """One connection to a node. It answers heartbeats while it waits for something else, and counts them."""

    def __init__(self, host: str, port: int, secret: bytes, node: str = "stranger", **hello: Any) -> None:
        self.beats = 0
        self.next_call = 0
        self._letters: deque[list[Any]] = deque()
        self._transfers: dict[int, tuple[list[int], bytearray]] = {}
        self._next_transfer = 0
        self._socket = socket.create_connection((host, port), timeout=20)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self._shake_hands(secret, node, hello)
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()

    # Bytes and frames.

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            try:
                more = self._socket.recv(count - len(data))
            except ConnectionResetError:
                more = b""
            if not more:
                raise Gone
            data += more
        return data

    def _read_frame(self) -> bytes:
        (length,) = struct.unpack(">I", self._read(4))
        assert 0 < length <= MAX_FRAME_BYTES
        return self._read(length)

    def send_frame(self, body: bytes) -> None:
        self._socket.sendall(struct.pack(">I", len(body)) + body)

    # The handshake.

    def _shake_hands(self, secret: bytes, node: str, changes: dict[str, Any]) -> None:
        hello = {
            "kind": "hello",
            "version_min": 1,
            "version_max": 1,
            "node": node,
            "uid": int.from_bytes(os.urandom(7), "big") + 1,
            "nonce": os.urandom(32),
            "endpoint": "",
            "secured": bool(secret),
            "links": 0,
            "max_frame_bytes": MAX_FRAME_BYTES,
            "max_blob_bytes": 16 * 1_048_576,
        }
        ours = msgpack.packb(hello | changes)
        self._socket.sendall(PREFACE)
        self.send_frame(ours)
        assert self._read(8) == PREFACE
        theirs = self._read_frame()
        said = msgpack.unpackb(theirs)
        assert said["kind"] == "hello"
        assert said["secured"] == bool(secret)
        self.node: str = said["node"]
        if min(1, said["version_max"]) < max(1, said["version_min"]):
            raise Refused("version_mismatch")
        self.send_frame(msgpack.packb({"kind": "proof", "mac": self._mac(secret, b"dialer", ours, theirs)}))
        proof = self._step("proof")
        assert hmac.compare_digest(proof["mac"], self._mac(secret, b"acceptor", ours, theirs))
        self._step("welcome")

    def _mac(self, secret: bytes, role: bytes, ours: bytes, theirs: bytes) -> bytes:
        return mac_of(secret, role, ours, theirs) if secret else b""

    def _step(self, kind: str) -> dict[str, Any]:
        said: dict[str, Any] = msgpack.unpackb(self._read_frame())
        if said["kind"] == "refused":
            raise Refused(said["code"], said["text"])
        assert said["kind"] == kind
        return said

    # Letters.

    def say(self, *letters: list[Any]) -> None:
        """Send letters in one frame."""
        self.send_frame(struct.pack(">BH", 0xDC, len(letters)) + b"".join(map(msgpack.packb, letters)))

    def call(self, kind: int, *fields: Any) -> int:
        """Make a call; gives its number."""
        self.next_call += 1
        self.say([kind, self.next_call, *fields])
        return self.next_call

    def ask(self, target: str, body: dict[str, Any]) -> Any:
        """Ask, and give the answer, or the failure's letter."""
        number = self.call(ASK, target, 20.0, None, body)
        letter = self.hear()
        assert letter[1] == number
        return letter[2] if letter[0] == ANSWER else letter

    def hear(self, *, beats: bool = False) -> list[Any]:
        """Give the next letter; heartbeats are echoed, and passed over if they are not asked for."""
        while True:
            while not self._letters:
                self._hear_frame(self._read_frame())
            letter = self._letters.popleft()
            if letter[0] != BEAT:
                return letter
            self.beats += 1
            self.say([ECHO, letter[1]])
            if beats:
                return letter

    def _hear_frame(self, body: bytes) -> None:
        if body[0] == 0xDC:
            said = msgpack.unpackb(body)
            assert len(said) == 1 or (len(said) <= 1024 and len(body) <= 65_536)
            self._letters.extend(said)
        elif body[0] == 0x93:
            transfer, sizes, total = msgpack.unpackb(body)
            assert sum(sizes) == total
            assert transfer not in self._transfers
            self._transfers[transfer] = (sizes, bytearray())
        elif body[0] == 0x92:
            transfer, data = msgpack.unpackb(body)
            assert body[:2] == b"\x92\xce"
            assert body[6] == 0xC6
            self._transfers[transfer][1].extend(data)
        else:
            assert body[0] == 0x91
            del self._transfers[msgpack.unpackb(body)[0]]

    # Blobs.

    def send_blobs(self, *blobs: bytes) -> int:
        """Send a transfer in small chunks; gives its number."""
        self._next_transfer += 1
        number = self._next_transfer
        self.send_frame(msgpack.packb([number, [len(blob) for blob in blobs], sum(map(len, blobs))]))
        for blob in blobs:
            for begin in range(0, len(blob), CHUNK_BYTES):
                piece = blob[begin : begin + CHUNK_BYTES]
                self.send_frame(struct.pack(">BBIBI", 0x92, 0xCE, number, 0xC6, len(piece)) + piece)
        return number

    def take_blob(self, reference: list[int]) -> bytes:
        """Give a blob that a letter refers to; its transfer is over then."""
        transfer, index = reference
        sizes, data = self._transfers.pop(transfer)
        assert len(data) == sum(sizes)
        return bytes(data[sum(sizes[:index]) : sum(sizes[: index + 1])])
