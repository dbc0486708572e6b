"""Writes of streams that hold only while those are this gateway's: many of them in one commit."""

from __future__ import annotations

from collections.abc import Sequence

from sllm_actor.errors import LeaseLost
from sllm_actor.frontend.live_stream import LiveStream
from sllm_actor.frontend.stream_records import record_key
from sllm_actor.metadata import Delete, Outcome, Put, Store, Unchanged

# Of one commit; a store takes a hundred.
COMMIT_OPERATIONS = 64

Write = tuple[LiveStream, Put | Delete]


async def commit_owned(store: Store, writes: Sequence[Write]) -> None:
    """Make the writes of those streams whose records are as their gateway left them. The others learn what they are.

    Raises:
        MetadataFailed: the store did not take them, or not all.
    """
    for first in range(0, len(writes), COMMIT_OPERATIONS):
        part = writes[first : first + COMMIT_OPERATIONS]
        while part := [(stream, operation) for stream, operation in part if stream.kept]:
            streams = list(dict.fromkeys(stream for stream, _ in part))
            conditions = [Unchanged(record_key(stream.id), stream.changed) for stream in streams]
            try:
                outcome = await store.commit(conditions, [operation for _, operation in part])
            except LeaseLost:
                await _without_lost_leases(store, part, streams)
                break
            if outcome.done:
                break
            _learn(streams, outcome)


async def _without_lost_leases(store: Store, part: Sequence[Write], streams: Sequence[LiveStream]) -> None:
    """Find whose lease has ended: that stream is kept no more."""
    if len(streams) == 1:
        streams[0].unkept()
        return
    for one in streams:
        await commit_owned(store, [(stream, operation) for stream, operation in part if stream is one])


def _learn(streams: Sequence[LiveStream], outcome: Outcome) -> None:
    for stream in streams:
        fact = outcome.fact(record_key(stream.id))
        if fact is None:
            stream.unkept()
        elif fact.changed != stream.changed:
            stream.lose()
