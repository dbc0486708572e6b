"""Where the requests of one node wait, counted and bounded: for a model to start, or for a slot of one that runs."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
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
        # Of those that wait, the ones whose model starts, and how many there were when `on_awaited` was last told.
        self._awaited: Counter[ModelName] = Counter()
        self._told: dict[ModelName, int] = {}
        # Told of the second that waits for a start, of every doubling, and when none of those wait any more. The first
        # asks for the start itself.
        self.on_awaited: Callable[[], None] = lambda: None

    def waiting(self) -> Mapping[ModelName, int]:
        """Tell how many wait for each model that anyone waits for."""
        return dict(self._waiting)

    def awaited(self) -> dict[ModelName, int]:
        """Tell how many wait for a start of each model that `on_awaited` told of, beside the one that asked for it."""
        return {model: self._awaited[model] - 1 for model in self._told}

    @contextmanager
    def start(self, model: ModelName) -> Iterator[None]:
        """Wait in this block for a start of a model."""
        self._awaited[model] += 1
        if self._awaited[model] >= 2 * self._told.get(model, 1):
            self._told[model] = self._awaited[model]
            self.on_awaited()
        try:
            yield
        finally:
            self._awaited[model] -= 1
            if not self._awaited[model]:
                del self._awaited[model]
                if self._told.pop(model, 0):
                    self.on_awaited()

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
