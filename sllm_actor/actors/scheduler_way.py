"""The way to the Scheduler, wherever it leads now: who asks need not know that another one has taken over."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sllm_actor.errors import ActorDied, DeliveryFailed, NodeUnreachable, NoLeader, NoSuchActor
from sllm_actor.runtime import ActorRef, Clock

log = logging.getLogger(__name__)

# Before one that did not answer is asked again, where nobody says that another one leads.
PAUSE_S = 0.2


class SchedulerWay:
    """Belongs to one node. While nobody leads, questions wait for `patience_s`, and what is told is dropped.

    A question may come to two Schedulers, one after the other: it must be one that does no harm twice.
    """

    def __init__(self, clock: Clock, patience_s: float, ref: ActorRef | None = None) -> None:
        self._clock = clock
        self._patience_s = patience_s
        self._ref = ref
        self._changed = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []

    @property
    def ref(self) -> ActorRef | None:
        """The Scheduler of whoever leads, as far as is known here; None while nobody does."""
        return self._ref

    def listen(self, listener: Callable[[], None]) -> None:
        """Let somebody hear that another one leads: it knows nothing yet of what its predecessor was told."""
        self._listeners.append(listener)

    def lead_to(self, ref: ActorRef | None) -> None:
        """Go to another Scheduler from now on."""
        self._ref = ref
        self._changed.set()
        self._changed = asyncio.Event()
        if ref is not None:
            for listener in self._listeners:
                listener()

    async def changed(self, within_s: float | None = None) -> None:
        """Wait until somebody else leads, or nobody, or this time is over; None waits for as long as it takes."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._changed.wait()

    def tell(self, message: object) -> None:
        """Tell the Scheduler; the next one hears nothing of it."""
        if self._ref is not None:
            self._ref.tell(message)

    async def ask(self, message: object, *, timeout_s: float) -> Any:
        """Ask the Scheduler, and its successors as long as it takes.

        Raises:
            NoLeader: nobody leads, or can be reached, for too long.
            SllmError: as `ActorRef.ask` does.
        """
        until_s = self._clock.monotonic_s() + timeout_s
        asked: ActorRef | None = None
        missing_s = self._clock.monotonic_s()
        while True:
            ref, changed = self._ref, self._changed
            failure: DeliveryFailed | None = None
            if ref is not None:
                if ref is not asked:
                    asked, missing_s = ref, self._clock.monotonic_s()
                try:
                    return await ref.ask(message, timeout_s=until_s - self._clock.monotonic_s())
                except (NoSuchActor, ActorDied, NodeUnreachable) as wrong:
                    failure = wrong
                    log.debug("the scheduler of %s does not answer: %s", ref.address.node, wrong.message)
            now_s = self._clock.monotonic_s()
            if now_s >= min(missing_s + self._patience_s, until_s):
                raise NoLeader(
                    "no node of the cluster places starts just now; what runs goes on", retry_after_s=PAUSE_S
                ) from failure
            with suppress(TimeoutError):
                async with asyncio.timeout(PAUSE_S):
                    await changed.wait()
