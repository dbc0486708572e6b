"""Metadata in an etcd cluster, through its JSON gateway. Several nodes share one.

Every write is made once however often it has to be sent, because each leaves a receipt (`etcd_wire.commit_body`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from itertools import count
from random import Random

from sllm_actor.errors import AlreadyThere, LeaseLost, MetadataFailed, MetadataUncertain
from sllm_actor.metadata import etcd_watch
from sllm_actor.metadata.etcd_address import EtcdAddress
from sllm_actor.metadata.etcd_client import AnswerTooLong, EtcdClient
from sllm_actor.metadata.etcd_wire import (
    Body,
    CommitAnswer,
    GrantAnswer,
    KeptAlive,
    Nothing,
    RangeAnswer,
    StatusAnswer,
    commit_body,
    fact_of,
    get_body,
    page_body,
)
from sllm_actor.metadata.limits import StoreLimits
from sllm_actor.metadata.store import (
    Changes,
    Condition,
    Delete,
    Fact,
    Lease,
    LeaseId,
    Listing,
    Operation,
    Outcome,
    Present,
    Put,
    check_commit,
    check_key,
    check_prefix,
    check_ttl,
    check_watch,
)
from sllm_actor.runtime import Clock

FACTS = b"sllm/facts/"
RECEIPTS = b"sllm/receipts/"
RANGE, COMMIT = "/v3/kv/range", "/v3/kv/txn"
GRANT, KEEP_ALIVE, REVOKE = "/v3/lease/grant", "/v3/lease/keepalive", "/v3/lease/revoke"
STATUS = "/v3/maintenance/status"


class EtcdStore:
    """A `Store` for many machines. Belongs to one event loop; opens no connection before it is asked for something."""

    def __init__(self, address: EtcdAddress, clock: Clock, random: Random, limits: StoreLimits | None = None) -> None:
        self._limits = limits or StoreLimits()
        self._clock = clock
        self._random = random
        self._client = EtcdClient(address, clock, random, self._limits)
        self._receipts: Lease | None = None
        self._receipts_from_s = 0.0
        self._granting = asyncio.Lock()
        self._receipt_numbers = count(1)

    async def get(self, key: str) -> Fact | None:
        body = get_body(FACTS + check_key(key, self._limits))
        answer = await self._client.call(RANGE, lambda _: body, RangeAnswer)
        return fact_of(answer.kvs[0], FACTS) if answer.kvs else None

    async def list(self, prefix: str) -> Listing:
        raw = FACTS + check_prefix(prefix, self._limits)
        facts: list[Fact] = []
        first, revision, limit, more = raw, 0, self._limits.page_facts, True
        while more:
            try:
                answer = await self._page(page_body(first, raw, revision, limit))
            except MetadataFailed as failed:
                if limit == 1 or not isinstance(failed.__cause__, AnswerTooLong):
                    raise
                limit = max(1, limit // 4)
                continue
            facts += [fact_of(kv, FACTS) for kv in answer.kvs]
            if len(facts) > self._limits.listing_facts:
                raise MetadataFailed(f"there are more than {self._limits.listing_facts} facts below {prefix!r}")
            revision, more = revision or answer.header.revision, answer.more
            first = answer.kvs[-1].key + b"\0" if answer.kvs else first
        return Listing(tuple(facts), revision)

    async def _page(self, body: Body) -> RangeAnswer:
        return await self._client.call(RANGE, lambda _: body, RangeAnswer)

    async def put(self, key: str, value: bytes, lease: LeaseId | None = None) -> int:
        return (await self.commit((), [Put(key, value, lease)])).revision

    async def delete(self, key: str) -> bool:
        return (await self.commit([Present(key)], [Delete(key)])).done

    async def commit(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> Outcome:
        check_commit(conditions, operations, self._limits)
        try:
            return await self._commit_once(conditions, operations)
        except LeaseLost:
            # Whose lease? Ours may have gone with a cluster that was set back; a new one tells.
            self._receipts = None
        try:
            return await self._commit_once(conditions, operations)
        except LeaseLost as lost:
            if any(isinstance(operation, Put) and operation.lease is not None for operation in operations):
                raise
            raise MetadataFailed(f"etcd keeps no lease: {lost.message}") from lost

    async def _commit_once(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> Outcome:
        lease = await self._receipts_lease()
        receipt = RECEIPTS + f"{lease:016x}/{next(self._receipt_numbers)}".encode()
        retried = False

        def make_body(made: bool) -> Body:
            nonlocal retried
            retried = made
            return commit_body(FACTS, conditions, operations, receipt, lease, made)

        try:
            answer = await self._client.call(COMMIT, make_body, CommitAnswer, writes=True)
        except LeaseLost as lost:
            if retried:
                raise MetadataUncertain(f"a lease ended while a write was tried again: {lost.message}") from lost
            raise
        return _outcome(answer)

    async def _receipts_lease(self) -> LeaseId:
        """Give a lease that lives longer than any attempt of a call that begins now."""
        async with self._granting:
            now_s = self._clock.monotonic_s()
            if self._receipts is None or now_s - self._receipts_from_s > self._limits.receipt_ttl_s / 2:
                self._receipts = await self.grant(self._limits.receipt_ttl_s)
                self._receipts_from_s = now_s
            return self._receipts.id

    async def grant(self, ttl_s: int) -> Lease:
        check_ttl(ttl_s, self._limits)
        lease = LeaseId(self._random.randrange(1, 2**63))
        retried = False

        def make_body(made: bool) -> Body:
            nonlocal retried
            retried = made
            return {"ID": str(lease), "TTL": str(ttl_s)}

        try:
            answer = await self._client.call(GRANT, make_body, GrantAnswer)
        except AlreadyThere as there:
            if not retried:
                raise MetadataFailed(there.message) from there
            return Lease(lease, ttl_s)
        return Lease(lease, max(ttl_s, answer.ttl_s))

    async def keep_alive(self, lease: LeaseId) -> None:
        answer = await self._client.call(KEEP_ALIVE, lambda _: {"ID": str(lease)}, KeptAlive)
        if answer.result.ttl_s <= 0:
            raise LeaseLost(f"the lease {lease} has ended")

    async def revoke(self, lease: LeaseId) -> None:
        try:
            await self._client.call(REVOKE, lambda _: {"ID": str(lease)}, Nothing)
        except LeaseLost:
            return

    async def watch(self, prefix: str, from_revision: int) -> AsyncGenerator[Changes, None]:
        raw = FACTS + check_watch(prefix, from_revision, self._limits)
        async for changes in etcd_watch.watch(self._client, raw, FACTS, from_revision, self._clock, self._limits):
            yield changes

    async def version(self) -> str:
        """Give the version that the member which answers says it is of.

        Raises:
            MetadataFailed: nobody answers, or it is refused.
        """
        return (await self._client.call(STATUS, lambda _: {}, StatusAnswer)).version

    async def close(self) -> None:
        """Close every connection. Receipts end with their lease."""
        await self._client.close()


def _outcome(answer: CommitAnswer) -> Outcome:
    if answer.succeeded:
        return Outcome(True, answer.header.revision)
    ranges = [part.response_range for part in answer.responses if part.response_range is not None]
    if not ranges:
        raise MetadataFailed("etcd refuses a commit without the facts that it was to give")
    receipts, *seen = ranges
    if receipts.kvs and receipts.kvs[0].value == b"done":
        return Outcome(True, receipts.kvs[0].mod_revision)
    return Outcome(False, answer.header.revision, tuple(fact_of(kv, FACTS) for part in seen for kv in part.kvs))
