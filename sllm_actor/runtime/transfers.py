"""Blobs on their way: cut into chunks and interleaved where they are sent, put together where they come. No I/O.

A transfer is announced by the sizes of its blobs, comes in chunks among other frames, and is claimed by a letter in the
first frame of letters after the last chunk. Small letters overtake it; letters of the same lane (one actor's, one
call's) wait behind it, so that order holds where order was promised.
"""

from __future__ import annotations

import mmap
import struct
from collections import deque
from collections.abc import Hashable, Sequence

import msgspec

from sllm_actor.errors import FrameInvalid, FrameTooLong
from sllm_actor.runtime.limits import Limits
from sllm_actor.runtime.values import Blob

# The first byte of a frame's body: a MessagePack array of one, two or three.
ABORT, CHUNK, BEGIN = 0x91, 0x92, 0x93
# Length; array of two; uint32 transfer; bin32 of so many bytes.
CHUNK_HEADER = struct.Struct(">IBBIBI")
UINT32, BIN32 = 0xCE, 0xC6
CHUNK_BYTES = 64 * 1024
MAX_BLOBS_PER_TRANSFER = 64
# Transfers that a sender has begun and not ended; a receiver takes more.
RUNNING_TRANSFERS = 8
LAZY_BYTES = 4 * 1024 * 1024
MAX_CONTROL_BYTES = 1024


class _Arriving:
    __slots__ = ("buffers", "filled", "index")

    def __init__(self, sizes: Sequence[int]) -> None:
        self.buffers = [_room_for(size) for size in sizes]
        self.index = 0
        self.filled = 0
        self.skip_empty()

    def skip_empty(self) -> None:
        while self.index < len(self.buffers) and self.filled == len(self.buffers[self.index]):
            self.index += 1
            self.filled = 0

    @property
    def complete(self) -> bool:
        return self.index == len(self.buffers)


def _room_for(size: int) -> bytearray | memoryview:
    """Make a buffer. A large one is not touched before its bytes come: to announce it costs the receiver nothing."""
    return bytearray(size) if size < LAZY_BYTES else memoryview(mmap.mmap(-1, size))


class Incoming:
    """The transfers that a connection receives. `rest` is where the present chunk's rest goes, None between chunks."""

    def __init__(self, limits: Limits) -> None:
        self.rest: memoryview | None = None
        self.running = 0
        self.claimed: dict[int, None] = {}
        self._limits = limits
        self._transfers: dict[int, _Arriving] = {}
        self._held_bytes = 0
        self._current: _Arriving | None = None

    def control(self, body: memoryview) -> None:
        """Take a `begin` ([transfer, sizes, total]) or an `abort` ([transfer]).

        Raises:
            FrameInvalid, FrameTooLong: it lies, or exceeds a bound.
        """
        if len(body) > MAX_CONTROL_BYTES:
            raise FrameTooLong(f"a frame of {len(body)} bytes that begins or ends a transfer")
        try:
            fields = _BEGIN.decode(body) if body[0] == BEGIN else _ABORT.decode(body)
        except (msgspec.DecodeError, RecursionError) as error:
            raise FrameInvalid(f"a transfer that can't be read: {error}") from error
        if len(fields) == 1:
            self._abort(fields[0])
            return
        transfer, sizes, total = fields
        if transfer in self._transfers:
            raise FrameInvalid(f"transfer {transfer} has begun already")
        if len(self._transfers) >= self._limits.max_transfers or not 0 < len(sizes) <= MAX_BLOBS_PER_TRANSFER:
            raise FrameTooLong(f"{len(self._transfers) + 1} transfers at once, one of {len(sizes)} blobs")
        if min(sizes) < 0 or sum(sizes) != total or not 0 <= transfer < 2**32:
            raise FrameInvalid(f"transfer {transfer} says {total} bytes, and its blobs do not")
        if self._held_bytes + total > self._limits.max_blob_bytes:
            raise FrameTooLong(f"{self._held_bytes + total} bytes of blobs exceed {self._limits.max_blob_bytes}")
        self._held_bytes += total
        arriving = self._transfers[transfer] = _Arriving(sizes)
        self.running += not arriving.complete

    def _abort(self, transfer: int) -> None:
        arriving = self._transfers.pop(transfer, None)
        if arriving is None:
            raise FrameInvalid(f"there is no transfer {transfer} to abort")
        self.running -= not arriving.complete
        self._held_bytes -= sum(map(len, arriving.buffers))

    def chunk(self, view: memoryview, length: int) -> int:
        """Take a chunk's header and what has come of its bytes; give how much of `view` that was.

        Raises:
            FrameInvalid: it belongs to no transfer, or does not fit into its blob.
        """
        _, _, mark, transfer, bin_mark, size = CHUNK_HEADER.unpack_from(view)
        if mark != UINT32 or bin_mark != BIN32 or length != CHUNK_HEADER.size - 4 + size or not size:
            raise FrameInvalid("a chunk whose header lies")
        arriving = self._transfers.get(transfer)
        if arriving is None or arriving.complete:
            raise FrameInvalid(f"a chunk of transfer {transfer}, which has not begun or is complete")
        buffer, begin = arriving.buffers[arriving.index], arriving.filled
        if begin + size > len(buffer):
            raise FrameInvalid(f"a chunk of {size} bytes goes beyond its blob")
        here: int = min(size, len(view) - CHUNK_HEADER.size)
        buffer[begin : begin + here] = view[CHUNK_HEADER.size : CHUNK_HEADER.size + here]
        arriving.filled += here
        if here < size:
            self._current = arriving
            self.rest = memoryview(buffer)[begin + here : begin + size]
        else:
            self._advanced(arriving)
        return CHUNK_HEADER.size + here

    def advance(self, count: int) -> None:
        """Note that `count` bytes were received into `rest`."""
        assert self.rest is not None and self._current is not None
        self._current.filled += count
        self.rest = self.rest[count:] if count < len(self.rest) else None
        if self.rest is None:
            self._advanced(self._current)
            self._current = None

    def _advanced(self, arriving: _Arriving) -> None:
        arriving.skip_empty()
        self.running -= arriving.complete

    def take(self, transfer: int, index: int) -> Blob:
        """Give a received blob to the letter that refers to it.

        Raises:
            ValueError: there is none, or it has not come whole.
        """
        arriving = self._transfers.get(transfer)
        if arriving is None or not arriving.complete or not 0 <= index < len(arriving.buffers):
            raise ValueError(f"there is no blob {index} of a complete transfer {transfer}")
        self.claimed[transfer] = None
        return Blob(arriving.buffers[index])

    def forget_claimed(self) -> None:
        """Let go of the transfers whose letter has been read."""
        for transfer in self.claimed:
            self._held_bytes -= sum(map(len, self._transfers.pop(transfer).buffers))
        self.claimed.clear()

    def forget_complete(self) -> None:
        """Let go of all that have come whole: a letter that could not be read may have been for any of them."""
        self.claimed = {number: None for number, arriving in self._transfers.items() if arriving.complete}
        self.forget_claimed()


class _Leaving:
    __slots__ = ("begun", "index", "lane", "letter", "position", "transfer", "views")

    def __init__(self, transfer: int, lane: Hashable, letter: bytes, blobs: Sequence[Blob]) -> None:
        self.transfer = transfer
        self.lane = lane
        self.letter = letter
        self.views = [memoryview(blob.data).cast("B") for blob in blobs]
        self.begun = False
        self.index = 0
        self.position = 0
        self._skip_sent()

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.views))

    @property
    def is_done(self) -> bool:
        return self.index == len(self.views)

    def next_chunk(self) -> tuple[bytes, memoryview]:
        """Give the next chunk's header, and a view of the sender's own bytes."""
        payload = self.views[self.index][self.position : self.position + CHUNK_BYTES]
        self.position += len(payload)
        self._skip_sent()
        size = len(payload)
        length = CHUNK_HEADER.size - 4 + size
        return CHUNK_HEADER.pack(length, CHUNK, UINT32, self.transfer, BIN32, size), payload

    def _skip_sent(self) -> None:
        while self.index < len(self.views) and self.position == len(self.views[self.index]):
            self.index += 1
            self.position = 0


class Outgoing:
    """The transfers that a connection sends, in turns, and the letters that wait behind them."""

    def __init__(self) -> None:
        # Blobs and the letters that refer to them; and the letters that wait behind those.
        self.held_bytes = 0
        self.held_letter_bytes = 0
        # What the receiver holds at most of transfers that have begun.
        self.max_running_bytes = 2**62
        self._running_bytes = 0
        self._running: deque[_Leaving] = deque()
        self._next: deque[_Leaving] = deque()
        self.lanes: dict[Hashable, deque[bytes | _Leaving]] = {}
        self._next_transfer = 0

    def __bool__(self) -> bool:
        return bool(self.lanes)

    def number(self) -> int:
        """Give the number of the next transfer."""
        self._next_transfer = (self._next_transfer + 1) % 2**32
        return self._next_transfer

    def hold(self, lane: Hashable, letter: bytes) -> bool:
        """Queue a letter behind a transfer of its lane; false where there is none."""
        waiting = self.lanes.get(lane)
        if waiting is None:
            return False
        waiting.append(letter)
        self.held_letter_bytes += len(letter)
        return True

    def send(self, lane: Hashable, letter: bytes, transfer: int, blobs: Sequence[Blob]) -> None:
        """Queue a letter with blobs."""
        leaving = _Leaving(transfer, lane, letter, blobs)
        self.held_bytes += len(letter) + leaving.size_bytes
        waiting = self.lanes.get(lane)
        if waiting is None:
            self.lanes[lane] = deque()
            self._ready(leaving)
        else:
            waiting.append(leaving)

    def _ready(self, leaving: _Leaving) -> None:
        self._next.append(leaving)
        self._begin_next()

    def _begin_next(self) -> None:
        while self._next and len(self._running) < RUNNING_TRANSFERS:
            size = self._next[0].size_bytes
            if self._running and self._running_bytes + size > self.max_running_bytes:
                return
            self._running_bytes += size
            self._running.append(self._next.popleft())

    def next_frames(self, small: list[bytes]) -> Sequence[bytes | memoryview]:
        """Give the next frame of the transfer whose turn it is; letters that may follow now go to `small`."""
        leaving = self._running[0]
        frames: tuple[bytes | memoryview, ...]
        if not leaving.begun:
            leaving.begun = True
            sizes = [len(view) for view in leaving.views]
            body = msgspec.msgpack.encode((leaving.transfer, sizes, sum(sizes)))
            frames = (len(body).to_bytes(4, "big") + body,)
        else:
            frames = leaving.next_chunk()
            self.held_bytes -= len(frames[1])
            self._running.rotate(-1)
        if leaving.is_done:
            self._running.remove(leaving)
            self._running_bytes -= leaving.size_bytes
            self._complete(leaving, small)
        return frames

    def _complete(self, leaving: _Leaving, small: list[bytes]) -> None:
        self.held_bytes -= len(leaving.letter)
        small.append(leaving.letter)
        waiting = self.lanes[leaving.lane]
        while waiting:
            following = waiting.popleft()
            if isinstance(following, _Leaving):
                self._ready(following)
                break
            self.held_letter_bytes -= len(following)
            small.append(following)
        else:
            del self.lanes[leaving.lane]
        self._begin_next()


_BEGIN: msgspec.msgpack.Decoder[tuple[int, list[int], int]] = msgspec.msgpack.Decoder(tuple[int, list[int], int])
_ABORT: msgspec.msgpack.Decoder[tuple[int]] = msgspec.msgpack.Decoder(tuple[int])
