"""The starts of a node that go on: which there are, and an end for all of them at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from sllm_actor.domain import ModelName
from sllm_actor.errors import Draining


class UnderWay:
    """Owns them, by their placements. Belongs to one event loop."""

    def __init__(self) -> None:
        self.models: dict[str, ModelName] = {}
        self._tasks: dict[str, asyncio.Task[object]] = {}
        self._ended: set[str] = set()

    @contextmanager
    def going(self, placement_id: str, model: ModelName) -> Iterator[None]:
        """Count the start that the current task carries out in this block.

        Raises:
            Draining: it was ended: another node may do it.
        """
        task = asyncio.current_task()
        assert task is not None, "a start is a task"
        self.models[placement_id], self._tasks[placement_id] = model, task
        try:
            yield
        except asyncio.CancelledError:
            if placement_id not in self._ended:
                raise
            task.uncancel()
            raise Draining(f"the node gives up {model}, which it was starting", retry_after_s=1.0) from None
        finally:
            del self.models[placement_id], self._tasks[placement_id]
            self._ended.discard(placement_id)

    def end(self) -> int:
        """End all of them; give how many."""
        for placement_id, task in self._tasks.items():
            if placement_id not in self._ended:
                self._ended.add(placement_id)
                task.cancel()
        return len(self._tasks)
