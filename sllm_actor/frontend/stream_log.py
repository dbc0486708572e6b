"""Streams that outlive their gateway: what each was asked and its tokens so far are in the metadata store.

Records are written as they come, tokens of all streams together once in a while. What is not written when a gateway
dies is generated once more by whoever goes on, and is the same: draws depend on seed, choice and position alone.
Whoever goes on with a stream changes its record; each write of its tokens holds only while that is unchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import math
import secrets
import string
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec

from sllm_actor.domain import Model
from sllm_actor.errors import Conflict, MetadataFailed, StreamNotFound
from sllm_actor.frontend.keys import Key
from sllm_actor.frontend.live_stream import LiveStream, Mark
from sllm_actor.frontend.orders import Order
from sllm_actor.frontend.owned_writes import COMMIT_OPERATIONS, Write, commit_owned
from sllm_actor.frontend.stream_records import (
    PREFIX,
    Found,
    Record,
    asked_by,
    encode,
    is_stream_id,
    look_up,
    parts_of,
    prefix_of,
    read_parts,
    read_record,
    record_key,
)
from sllm_actor.metadata import Delete, Fact, LeaseId, Put, Store, Unchanged
from sllm_actor.runtime import Clock
from sllm_actor.runtime.tasks import TaskScope

log = logging.getLogger(__name__)

# Of one commit; a store takes 1.2 MB.
COMMIT_BYTES = 1_000_000
SWEEP_S = 1.0
# After a write has failed nobody waits for another one for so long: a store's patience is less.
PAUSE_S = 15.0
# Streams that begin within so long share a lease.
LEASE_SHARED_S = 60.0
MAX_LEASE_S = 86_400
TAKE_OVERS = 3
# Whoever asks for a stream that another gateway has just begun waits so long for its record.
WRITTEN_WITHIN_S, LOOK_AGAIN_S = 0.5, 0.1


class StreamLimits(NamedTuple):
    """The log's knobs; the names are those of `Config`."""

    stream_log_lag_s: float
    stream_kept_s: float
    stream_log_bytes: int
    max_kept_streams: int
    request_timeout_s: float


class StreamLog:
    """Owns the streams that this gateway answers, and for a while those that it has answered.

    Where the store is `shared` a lease ends what nobody sweeps any more; else the next process does.
    """

    def __init__(self, store: Store, clock: Clock, limits: StreamLimits, *, shared: bool) -> None:
        self._store = store
        self._clock = clock
        self._limits = limits
        self._shared = shared
        self._scope = TaskScope("streams")
        self._live: dict[str, LiveStream] = {}
        # Those that have been left, by the moment at which they are forgotten; and those whose moment has come.
        self._left: list[tuple[float, int, LiveStream]] = []
        self._due: list[LiveStream] = []
        self._numbers = itertools.count()
        self._to_begin: deque[tuple[LiveStream, bytes]] = deque()
        self._beginning: dict[str, LiveStream] = {}
        self._begins = asyncio.Event()
        self._dirty: dict[LiveStream, float] = {}
        self._dirties = asyncio.Event()
        self._flushing = asyncio.Lock()
        self._lease: LeaseId | None = None
        self._lease_from_s = -math.inf
        self._down_until_s = -math.inf
        self._resumed = 0
        self._failures = 0

    async def open(self) -> None:
        """Begin to write; take over what an earlier process of a store of its own has left.

        Raises:
            MetadataFailed: the store can't be asked.
        """
        # By parts: a listing is bounded.
        for digit in "" if self._shared else string.hexdigits[:16]:
            await self._adopt((await self._store.list(f"{PREFIX}stream-{digit}")).facts)
        for work, name in (
            (self._write_records(), "records"),
            (self._write_on(), "tokens"),
            (self._sweep_on(), "sweep"),
        ):
            self._scope.spawn(work, name)

    async def _adopt(self, facts: Iterable[Fact]) -> None:
        """Note until when what lies there is kept; what has no record that can be read goes at once."""
        now_s, wall_s = self._clock.monotonic_s(), self._clock.wall_s()
        for stream_id, group in itertools.groupby(facts, lambda fact: fact.key.split("/")[1]):
            lies = list(group)
            found = next((fact for fact in lies if fact.key == record_key(stream_id)), None)
            record = read_record(found) if found is not None else None
            if found is None or record is None:
                for fact in lies:
                    await self._store.delete(fact.key)
                continue
            stream = LiveStream(stream_id, record.choices, self._note_dirty)
            stream.own(found.changed, found.lease)
            stream.keys |= {fact.key for fact in lies}
            self._forget_at(now_s + max(0.0, record.expires_wall_s - wall_s), stream)

    def begin(self, order: Order, choices: int, model: Model, key: Key | None) -> LiveStream:
        """Take on a new stream; it is one that can be gone on with once its record is written.

        It never is where it is too long for that, the store does not answer, or as many are kept as may be.
        """
        limits, now_s = self._limits, self._clock.monotonic_s()
        stream = LiveStream(order.stream_id, choices, self._note_dirty)
        stream.keeps_tokens = order.body.wanted_logprobs() is None
        if not limits.stream_kept_s or now_s < self._down_until_s or not self._has_room():
            return stream.unkept()
        record = Record(
            order=order.kept(),
            choices=choices,
            fingerprint=model.fingerprint,
            asked_by=asked_by(key),
            owner=secrets.token_hex(8),
            expires_wall_s=self._clock.wall_s() + limits.request_timeout_s + limits.stream_kept_s,
        )
        value = encode(record)
        if len(value) > limits.stream_log_bytes:
            return stream.unkept()
        stream.room_tokens = (limits.stream_log_bytes - len(value)) // 4
        self._live[stream.id] = stream
        self._to_begin.append((stream, value))
        self._beginning[stream.id] = stream
        self._begins.set()
        return stream

    def _has_room(self) -> bool:
        """Have room for one more; those that were left first make way."""
        if len(self._live) + len(self._left) < self._limits.max_kept_streams:
            return True
        if self._left:
            self._due.append(heapq.heappop(self._left)[2])
            return True
        return False

    @contextmanager
    def answering(self, stream: LiveStream) -> Iterator[None]:
        """Answer a stream in this block; it is kept for a while behind that."""
        try:
            yield
        finally:
            stream.leave()
            if self._live.get(stream.id) is stream:
                del self._live[stream.id]
                self._forget_at(self._clock.monotonic_s() + self._limits.stream_kept_s, stream)

    def _forget_at(self, due_s: float, stream: LiveStream) -> None:
        heapq.heappush(self._left, (due_s, next(self._numbers), stream))

    def _note_dirty(self, stream: LiveStream) -> None:
        if stream not in self._dirty:
            self._dirty[stream] = self._clock.monotonic_s()
            self._dirties.set()

    async def find(self, stream_id: str, key: Key | None) -> Found:
        """Look a stream up.

        Raises:
            StreamNotFound: there is none of that id, none any more, or it is not this key's.
            MetadataFailed: the store can't be asked.
        """
        unknown = StreamNotFound(f"there is no stream {stream_id[:64]!r}, or none any more", param="stream_id")
        if not is_stream_id(stream_id):
            raise unknown
        if stream_id in self._beginning:
            await self._beginning[stream_id].decided.wait()
        until_s = self._clock.monotonic_s() + (WRITTEN_WITHIN_S if self._shared else 0.0)
        while (found := await look_up(self._store, stream_id, key, self._clock.wall_s())) is None:
            if self._clock.monotonic_s() >= until_s:
                raise unknown
            await self._clock.sleep(LOOK_AGAIN_S)
        return found

    async def take_over(self, found: Found, key: Key | None) -> LiveStream:
        """Become the one who answers a stream; whoever did so until now learns of it, and ends.

        Raises:
            StreamNotFound: it is there no more.
            Conflict: others take it over at the same moment.
            MetadataFailed: the store can't be asked.
        """
        with contextlib.suppress(MetadataFailed):
            await self.flush()
        for _ in range(TAKE_OVERS):
            record = msgspec.structs.replace(found.record, owner=secrets.token_hex(8))
            put = Put(found.fact.key, encode(record), found.fact.lease)
            outcome = await self._store.commit([Unchanged(found.fact.key, found.fact.changed)], [put])
            if outcome.done:
                await self._end_here(record.order.stream_id)
                return await self._go_on(record, len(put.value), outcome.revision, found.fact.lease)
            found = await self.find(record.order.stream_id, key)
        raise Conflict("others go on with this stream at the same moment", param="stream_id")

    async def _end_here(self, stream_id: str) -> None:
        """Where it is answered here as well, have that end, so that not both are generated for long."""
        before = self._live.get(stream_id)
        if before is not None:
            before.lose()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._limits.stream_log_lag_s):
                    await before.left.wait()

    async def _go_on(self, record: Record, size_bytes: int, revision: int, lease: LeaseId | None) -> LiveStream:
        order = record.order
        stream = LiveStream(order.stream_id, record.choices, self._note_dirty)
        stream.keeps_tokens = order.body.wanted_logprobs() is None
        stream.room_tokens = (self._limits.stream_log_bytes - size_bytes) // 4
        facts = (await self._store.list(prefix_of(order.stream_id))).facts
        for number in range(record.choices):
            stream.know(number, *read_parts(order.stream_id, number, facts))
        stream.keys |= {fact.key for fact in facts}
        stream.own(revision, lease)
        self._live[stream.id] = stream
        self._resumed += 1
        return stream

    async def _write_records(self) -> None:
        """Write the records of new streams: at once, and those together that come while others are written."""
        while True:
            await self._begins.wait()
            self._begins.clear()
            while self._to_begin:
                batch, size_bytes = [self._to_begin.popleft()], 0
                while self._to_begin and len(batch) < COMMIT_OPERATIONS:
                    size_bytes += len(batch[-1][1])
                    if size_bytes + len(self._to_begin[0][1]) > COMMIT_BYTES:
                        break
                    batch.append(self._to_begin.popleft())
                await self._write_batch(batch)

    async def _write_batch(self, batch: list[tuple[LiveStream, bytes]]) -> None:
        try:
            lease = await self._shared_lease()
            outcome = await self._store.commit((), [Put(record_key(one.id), value, lease) for one, value in batch])
        except MetadataFailed as failed:
            self._fail(failed)
            for stream, _ in batch:
                stream.unkept()
        else:
            self._down_until_s = -math.inf
            for stream, _ in batch:
                stream.own(outcome.revision, lease)
        finally:
            for stream, _ in batch:
                del self._beginning[stream.id]

    async def _shared_lease(self) -> LeaseId | None:
        """Give the lease of what begins now: it outlives the latest end that a stream can have."""
        if not self._shared:
            return None
        now_s = self._clock.monotonic_s()
        if self._lease is None or now_s - self._lease_from_s > LEASE_SHARED_S:
            stay_s = LEASE_SHARED_S + self._limits.request_timeout_s + self._limits.stream_kept_s
            self._lease = (await self._store.grant(min(math.ceil(stay_s), MAX_LEASE_S))).id
            self._lease_from_s = now_s
        return self._lease

    def _fail(self, failed: MetadataFailed) -> None:
        self._failures += 1
        self._lease = None
        now_s = self._clock.monotonic_s()
        if now_s > self._down_until_s:
            log.warning("streams can't be gone on with elsewhere for now: %s", failed.message)
        self._down_until_s = now_s + PAUSE_S

    async def _write_on(self) -> None:
        while True:
            await self._dirties.wait()
            await self._clock.sleep(self._limits.stream_log_lag_s)
            self._dirties.clear()
            try:
                await self.flush()
            except MetadataFailed as failed:
                self._fail(failed)

    async def flush(self) -> None:
        """Write the tokens that are not written yet.

        Raises:
            MetadataFailed: the store did not take them; they are tried again.
        """
        async with self._flushing:
            begin_s, dirty = self._clock.monotonic_s(), list(self._dirty)
            try:
                # By parts, between which the loop looks round.
                for first in range(0, len(dirty), COMMIT_OPERATIONS):
                    await self._flush_some(dirty[first : first + COMMIT_OPERATIONS], begin_s)
            finally:
                # What came meanwhile, and that of streams whose records are being written, is behind this.
                if self._dirty:
                    self._dirties.set()

    async def _flush_some(self, dirty: Sequence[LiveStream], begin_s: float) -> None:
        upto = {stream: stream.mark() for stream in dirty if stream.kept}
        writes: list[Write] = []
        for stream, mark in upto.items():
            for number in stream.unwritten(mark):
                for key, value in parts_of(stream.id, number, stream.logs[number], stream.written[number][0]):
                    writes.append((stream, Put(key, value, stream.lease)))
                    stream.keys.add(key)
        await commit_owned(self._store, writes)
        if writes:
            self._down_until_s = -math.inf
        self._note_written(dirty, upto, begin_s)

    def _note_written(self, dirty: Iterable[LiveStream], upto: dict[LiveStream, Mark], begin_s: float) -> None:
        for stream in dirty:
            more_came = stream in upto and stream.mark() != upto[stream]
            if stream in upto:
                stream.note_written(upto[stream])
            if more_came:
                self._dirty[stream] = begin_s
            elif stream in upto or not (stream.kept or stream.undecided):
                del self._dirty[stream]

    async def _sweep_on(self) -> None:
        while True:
            await self._clock.sleep(SWEEP_S)
            try:
                await self.sweep()
            except MetadataFailed as failed:
                self._fail(failed)

    async def sweep(self) -> None:
        """Forget the streams that have been kept long enough."""
        now_s = self._clock.monotonic_s()
        while self._left and self._left[0][0] <= now_s:
            self._due.append(heapq.heappop(self._left)[2])
        due = [stream for stream in self._due if not stream.undecided]
        deletes: list[Write] = []
        for stream in due:
            own = record_key(stream.id)
            # The record goes last: while it is there, what is left can still be found.
            deletes += [(stream, Delete(key)) for key in (*sorted(stream.keys - {own}), own)]
        await commit_owned(self._store, deletes)
        for stream in due:
            stream.unkept()
            self._due.remove(stream)

    def observe(self) -> dict[str, Any]:
        """Give what `/metrics` shows of it; `lag_s` is the age of the oldest token that is not written yet."""
        since_s = min(self._dirty.values(), default=math.inf)
        return {
            "live": len(self._live),
            "left": len(self._left),
            "resumed": self._resumed,
            "failures": self._failures,
            "lag_s": max(0.0, self._clock.monotonic_s() - since_s),
        }

    async def close(self) -> None:
        """Write what is left to write, and stop."""
        with contextlib.suppress(MetadataFailed):
            await self.flush()
        await self._scope.close()
