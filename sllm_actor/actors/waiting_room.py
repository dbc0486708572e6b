"""Where the requests of one node wait, counted and bounded: for a model to start, or for a slot of one that runs."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sllm_actor.domain import ModelName
from sllm_actor.errors import QueueFull
from sllm_actor.policy.retrying import Pace
from sllm_actor.runtime import Clock

# Of the models whose requests have waited last.
MAX_PACES = 1000


class WaitingRoom:
    """Owns the number of waiting requests of each model. Belongs to one event loop."""

    def __init__(self, clock: Clock, *, max_in_all: int, max_per_model: int) -> None:
        self._clock = clock
        self._max_in_all = max_in_all
        self._max_per_model = max_per_model
        self._waiting: Counter[ModelName] = Counter()
        self._pace = Pace()
        self._paces: OrderedDict[ModelName, Pace] = OrderedDict()

    def waiting(self) -> Mapping[ModelName, int]:
        """Tell how many wait for each model that anyone waits for."""
        return dict(self._waiting)

    @contextmanager
    def place(self, model: ModelName) -> Iterator[None]:
        """Wait in this block.

        Raises:
            QueueFull: as many wait already as may, for this model or in all.
        """
        if self._waiting[model] >= self._max_per_model:
            pace = self._paces.get(model, Pace())
            raise QueueFull(
                f"{self._max_per_model} requests for {model} are waiting already",
                retry_after_s=pace.next_s(self._clock.monotonic_s()),
            )
        if self._waiting.total() >= self._max_in_all:
            raise QueueFull(
                f"{self._max_in_all} requests are waiting already",
                retry_after_s=self._pace.next_s(self._clock.monotonic_s()),
            )
        self._waiting[model] += 1
        try:
            yield
        finally:
            self._waiting[model] -= 1
            if not self._waiting[model]:
                del self._waiting[model]
            self._left(model)

    def _left(self, model: ModelName) -> None:
        now_s = self._clock.monotonic_s()
        self._pace.note(now_s)
        self._paces.setdefault(model, Pace()).note(now_s)
        self._paces.move_to_end(model)
        if len(self._paces) > MAX_PACES:
            self._paces.popitem(last=False)
