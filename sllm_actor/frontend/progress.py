"""What those are told who wait for a model: what it waits for, and how far that is."""

from __future__ import annotations

import asyncio

from sllm_actor.domain import Model, ModelName, ModelState
from sllm_actor.errors import SllmError
from sllm_actor.messages.models import ListModels, ModelStatus
from sllm_actor.runtime import ActorRef, Clock

# All who wait are told from one look at the models, this old at most.
FRESH_S = 0.5


class Progress:
    """Asks the ModelManager how its models are, once for all who want to know at one time.

    Nobody is told of a time before its own: what a model did before is not what an answer of it waits for.
    """

    def __init__(self, manager: ActorRef, clock: Clock, ask_timeout_s: float) -> None:
        self._manager = manager
        self._clock = clock
        self._ask_timeout_s = ask_timeout_s
        self._asking = asyncio.Lock()
        self._seen: dict[ModelName, ModelStatus] = {}
        # When that was asked; it may be how things stood then.
        self._seen_s = float("-inf")

    async def of(self, model: Model, since_s: float) -> str:
        """Say on one line what an answer of `model` waits for, which has waited since `since_s`."""
        try:
            await self._look(since_s)
        except SllmError:
            return "waiting"
        status = self._seen.get(model.name)
        if status is None or status.state is ModelState.RUNNING:
            return "waiting"
        if status.state is not ModelState.LOADING:
            return f"waiting for a place for {model.name}"
        if not status.loading_bytes:
            return f"loading {model.name}"
        percent = min(100, status.loading_bytes * 100 // max(1, model.size_bytes))
        return f"loading {model.name} {percent}%"

    async def _look(self, since_s: float) -> None:
        async with self._asking:
            now_s = self._clock.monotonic_s()
            if now_s - self._seen_s < FRESH_S and self._seen_s >= since_s:
                return
            statuses: tuple[ModelStatus, ...] = await self._manager.ask(ListModels(), timeout_s=self._ask_timeout_s)
            self._seen = {status.model.name: status for status in statuses}
            self._seen_s = now_s
