"""The source's side of a migration: rounds while the answer goes on, then one short stop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Any, cast

import msgspec

from sllm_actor.actors.prepared import MigrationLimits
from sllm_actor.domain import ModelName
from sllm_actor.domain.tokens import pack_uint32, unpack_uint32
from sllm_actor.engine.streams import AnswerStream
from sllm_actor.errors import Conflict, DestinationFailed, MigrationFailed, SllmError
from sllm_actor.messages.generation import Generate, Migrated
from sllm_actor.messages.migration import ExtendPrepared, HandedOver, LiveRequest, MigrateOut, Prepare
from sllm_actor.runtime import ActorRef, Clock


class Live:
    """A generation that runs here, or waits to."""

    def __init__(self, request: Generate) -> None:
        self.request = request
        self.stream = AnswerStream()
        self.moving: HandingOver | None = None
        # For a slot of its instance.
        self.waits = False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Say of it that it waits in this block."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    def shown(self) -> LiveRequest:
        """Describe it to who would move it."""
        request = self.request
        served = ModelName(request.base or request.model)
        return LiveRequest(
            request_id=request.request_id, model=request.model, served=served, priority=request.priority,
            waits=self.waits,
        )  # fmt: skip

    def token_ids(self) -> list[int]:
        """Give the answer's tokens so far."""
        return [*unpack_uint32(self.request.generated), *self.stream.token_ids]


class HandingOver:
    """One migration, from the first round to the hand-over. Where it fails, the answer goes on here."""

    def __init__(
        self, live: Live, message: MigrateOut, target: ActorRef, limits: MigrationLimits, clock: Clock
    ) -> None:
        self._live = live
        self._message = message
        self._target = target
        self._limits = limits
        self._clock = clock
        self._over = asyncio.Event()
        self._is_handed_over = False
        self._recomputed_s = 0.0
        self._sent: list[int] = []
        self._moved_bytes = 0

    async def run(self) -> HandedOver:
        """Hand it over. Where somebody else has it handed over to the same node, wait for that.

        Raises:
            Conflict: it is being moved to another node already.
            MigrationFailed: the answer ended first, or its reader left, or it has no slot yet.
            DestinationFailed: the destination refused it, was lost, or said nothing for too long.
        """
        live, message = self._live, self._message
        while live.moving is not None:
            handed = await live.moving.joined_by(message)
            if handed is not None:
                return handed
        if live.waits:
            raise MigrationFailed(f"request {message.request_id} waits for a slot: there is nothing to move yet")
        live.moving = self
        try:
            self._sent = live.token_ids()
            request = msgspec.structs.replace(cast(Any, live.request), generated=pack_uint32(self._sent), adapter="")
            self._moved_bytes = len(request.prompt) + len(request.generated)
            prepare = Prepare(migration_id=message.migration_id, request=request)
            async with aclosing(self._target.stream(prepare)) as steps:
                rounds = await self._rounds(steps)
                await self._hand_over()
                self._is_handed_over = True
        finally:
            live.moving = None
            self._over.set()
        return HandedOver(
            node=message.node,
            instance_id=message.instance_id,
            rounds=rounds,
            tokens=len(live.request.prompt) // 4 + len(self._sent),
            bytes_moved=self._moved_bytes,
            recomputed_s=self._recomputed_s,
        )

    async def joined_by(self, other: MigrateOut) -> HandedOver | None:
        """Wait for the end of this, which somebody else wishes, too; None where it has failed.

        Raises:
            Conflict: they wish it elsewhere.
        """
        node = self._message.node
        if other.node != node:
            raise Conflict(f"request {other.request_id} is being moved to {node} already", param="request_id")
        await self._over.wait()
        if not self._is_handed_over:
            return None
        return HandedOver(
            node=node, instance_id=self._message.instance_id, rounds=0, tokens=0, bytes_moved=0, recomputed_s=0.0
        )

    async def _rounds(self, steps: Any) -> int:
        """Let the destination catch up, until little is missing, or it never will be less; give the rounds."""
        for number in range(1, self._limits.max_rounds + 1):
            begun_s = self._clock.monotonic_s()
            with self._blaming_destination():
                async with asyncio.timeout(self._limits.round_timeout_s):
                    await anext(steps)
            self._recomputed_s += self._clock.monotonic_s() - begun_s
            behind = self._behind()
            if len(behind) <= self._limits.threshold_tokens or number == self._limits.max_rounds:
                break
            await self._extend(behind)
        return number

    @contextmanager
    def _blaming_destination(self) -> Iterator[None]:
        node = self._message.node
        try:
            yield
        except TimeoutError:
            raise DestinationFailed(f"{node} did not get ready for {self._message.request_id} in time") from None
        except StopAsyncIteration:
            raise DestinationFailed(f"{node} has ended the preparation of {self._message.request_id}") from None
        except SllmError as failed:
            raise DestinationFailed(f"{node} can't take {self._message.request_id}: {failed.message}") from failed

    def _behind(self) -> list[int]:
        if self._live.stream.ended:
            raise MigrationFailed(f"request {self._message.request_id} ended before it was handed over")
        return self._live.token_ids()[len(self._sent) :]

    async def _extend(self, token_ids: list[int]) -> None:
        packed = pack_uint32(token_ids)
        await self._tell(ExtendPrepared(migration_id=self._message.migration_id, token_ids=packed, last=False))
        self._sent += token_ids
        self._moved_bytes += len(packed)

    async def _tell(self, more: ExtendPrepared) -> None:
        with self._blaming_destination():
            await self._target.ask(more, timeout_s=self._limits.hand_over_timeout_s)

    async def _hand_over(self) -> None:
        """Hold the answer back, say that no more comes, and end the stream so that its reader goes on there.

        Its Router has all tokens of the answer, and asks for the rest with them. First comes the token that is being
        computed: thrown away it would be time that the client has waited for nothing.
        """
        message, stream = self._message, self._live.stream
        with suppress(TimeoutError):
            async with asyncio.timeout(self._limits.hand_over_timeout_s):
                await stream.grown()
        self._behind()
        stream.hold()
        try:
            await self._tell(ExtendPrepared(migration_id=message.migration_id, token_ids=b"", last=True))
        except BaseException:
            stream.release()
            raise
        stream.end_with(
            Migrated(
                request_id=message.request_id,
                migration_id=message.migration_id,
                instance_id=message.instance_id,
                model=message.model,
                node=message.node,
                worker=message.worker,
                address=message.address,
            )
        )
