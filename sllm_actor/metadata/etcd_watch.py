"""A watch that outlives its connections: each begins at the revision after the last one that was given out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator

import aiohttp
import msgspec

from sllm_actor.errors import MetadataCompacted, MetadataFailed, MetadataRefused
from sllm_actor.metadata.etcd_client import (
    MAX_AUTHENTICATIONS,
    NO_USER,
    STALE_TOKEN,
    EtcdClient,
    Passing,
    StaleToken,
)
from sllm_actor.metadata.etcd_wire import WatchAnswer, WatchPiece, changes_of, watch_body
from sllm_actor.metadata.limits import StoreLimits
from sllm_actor.metadata.store import Changes
from sllm_actor.runtime import Clock

log = logging.getLogger(__name__)


async def watch(
    client: EtcdClient, prefix: bytes, root: bytes, from_revision: int, clock: Clock, limits: StoreLimits
) -> AsyncGenerator[Changes, None]:
    """Give the changes below `prefix`, with keys below `root`, across reconnections.

    Raises:
        MetadataCompacted: changes since then are no longer kept.
        MetadataFailed: the store refuses the watch.
    """
    failures, stale_tokens = 0, 0
    while True:
        try:
            async with client.stream("/v3/watch", watch_body(prefix, from_revision)) as content:
                async for answer in _answers(content, limits):
                    if answer.canceled:
                        raise _end(answer)
                    failures = stale_tokens = 0
                    for changes in changes_of(answer, root):
                        # Those before were given out already.
                        if changes.revision >= from_revision:
                            yield changes
                            from_revision = changes.revision + 1
                    if not answer.created and not answer.events:
                        # A notice of progress: all that there was up to its revision has been sent.
                        from_revision = max(from_revision, answer.header.revision + 1)
        except StaleToken as stale:
            stale_tokens += 1
            if not client.forget_token() or stale_tokens > MAX_AUTHENTICATIONS:
                raise MetadataRefused(f"etcd: {stale}") from None
        except Passing as passing:
            failures += 1
            log.debug("a watch from revision %d is opened anew: %s", from_revision, passing)
            await clock.sleep(client.pause_s(failures))


def _end(answer: WatchAnswer) -> Exception:
    if answer.compact_revision:
        return MetadataCompacted(f"changes before revision {answer.compact_revision} are no longer kept; list anew")
    if any(text in answer.cancel_reason for text in (*STALE_TOKEN, *NO_USER, "permission denied")):
        # Versions differ in what they say of a token that has expired.
        return StaleToken(answer.cancel_reason)
    return Passing("the member has ended the watch", made=False)


async def _answers(content: aiohttp.StreamReader, limits: StoreLimits) -> AsyncIterator[WatchAnswer]:
    """Give what comes, line by line, until nothing has come for too long: a member that hangs is silent, too."""
    held = bytearray()
    while True:
        try:
            async with asyncio.timeout(limits.watch_quiet_s):
                piece = await content.readany()
        except TimeoutError:
            return
        if not piece:
            raise Passing("the connection has ended", made=False)
        searched = len(held)
        held += piece
        while (end := held.find(b"\n", searched)) >= 0:
            yield _answer(bytes(held[:end]))
            del held[: end + 1]
            searched = 0
        if len(held) > limits.answer_bytes:
            raise MetadataFailed(f"etcd sends a change of more than {limits.answer_bytes} bytes")


def _answer(line: bytes) -> WatchAnswer:
    try:
        piece = msgspec.json.decode(line, type=WatchPiece, strict=False)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MetadataFailed(f"etcd sends what is no change: {error}") from None
    if piece.result is None:
        raise Passing("the member has ended the watch", made=False)
    return piece.result
