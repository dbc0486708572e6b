"""Whether this node leads: elected among the members, for as long as it is one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress

from sllm_actor.actors.membership import Membership, Standing
from sllm_actor.errors import Fenced, LeaseLost, MetadataFailed
from sllm_actor.metadata import Outcome, Store
from sllm_actor.metadata.election import Seat, campaign, commit_fenced, observe, resign
from sllm_actor.metadata.store import Condition, Operation
from sllm_actor.runtime import Clock
from sllm_actor.runtime.tasks import TaskScope

log = logging.getLogger(__name__)

PAUSE_S = 0.2


class Leadership:
    """Campaigns under `name` with every standing of `membership`.

    `on_seat` hears at once of a seat won, or, as None, of one that is lost; it must stop leading before it returns.
    """

    def __init__(
        self,
        store: Store,
        membership: Membership,
        name: str,
        value: bytes,
        clock: Clock,
        on_seat: Callable[[Seat | None], None],
    ) -> None:
        self._store = store
        self._membership = membership
        self._name = name
        self._value = value
        self._clock = clock
        self._on_seat = on_seat
        self._scope = TaskScope("leadership")
        self._candidacy: asyncio.Task[None] | None = None
        self._seat: Seat | None = None
        self._closed = False
        membership.listen(self._stand)

    @property
    def seat(self) -> Seat | None:
        """The seat that this node holds now by its own clock."""
        return self._seat if self._membership.standing is not None else None

    async def commit(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> Outcome:
        """Commit as the leader.

        Raises:
            Fenced: this node does not lead; nothing was done.
        """
        seat = self.seat
        if seat is None:
            raise Fenced(f"this node does not lead {self._name}")
        return await commit_fenced(self._store, seat, conditions, operations)

    async def stop(self) -> None:
        """Campaign no more, and let the next one lead at once."""
        self._closed = True
        seat = self._seat
        self._tell(None)
        await self._scope.close()
        if seat is not None:
            with suppress(MetadataFailed):
                await resign(self._store, seat)

    def _stand(self, standing: Standing | None) -> None:
        self._tell(None)
        if self._candidacy is not None:
            self._candidacy.cancel()
            self._candidacy = None
        if standing is not None and not self._closed:
            self._candidacy = self._scope.spawn(self._run(standing), "candidacy")

    def _tell(self, seat: Seat | None) -> None:
        if seat != self._seat:
            self._seat = seat
            self._on_seat(seat)

    async def _run(self, standing: Standing) -> None:
        """Campaign and lead, again and again, until the standing is lost, which ends this."""
        while True:
            try:
                seat = await campaign(self._store, self._name, standing.lease, self._value)
                if self._membership.standing == standing:
                    log.info("this node leads %s, in epoch %d", self._name, seat.epoch)
                    self._tell(seat)
                    await self._until_another_leads(seat)
            except LeaseLost as lost:
                log.info("a candidacy for %s has ended: %s", self._name, lost.message)
            except MetadataFailed as failed:
                log.warning("a candidacy for %s is held up: %s", self._name, failed.message)
            self._tell(None)
            await self._clock.sleep(PAUSE_S)

    async def _until_another_leads(self, seat: Seat) -> None:
        """Return when somebody has taken the seat's key away; its lease ending is the membership's to notice."""
        async with aclosing(observe(self._store, self._name, self._clock)) as leaders:
            async for leader in leaders:
                if leader is None or leader.epoch != seat.epoch:
                    return
