"""Where the requests of one node wait, counted and bounded: for a model to start, or for a slot of one that runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sllm_actor.domain import ModelName
from sllm_actor.errors import QueueFull

TRY_AGAIN_S = 1.0


class WaitingRoom:
    """Owns the number of waiting requests of each model. Belongs to one event loop."""

    def __init__(self, *, max_in_all: int, max_per_model: int) -> None:
        self._max_in_all = max_in_all
        self._max_per_model = max_per_model
        self._waiting: Counter[ModelName] = Counter()

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
            raise QueueFull(
                f"{self._max_per_model} requests for {model} are waiting already", retry_after_s=TRY_AGAIN_S
            )
        if self._waiting.total() >= self._max_in_all:
            raise QueueFull(f"{self._max_in_all} requests are waiting already", retry_after_s=TRY_AGAIN_S)
        self._waiting[model] += 1
        try:
            yield
        finally:
            self._waiting[model] -= 1
            if not self._waiting[model]:
                del self._waiting[model]
