"""The only place that starts asyncio tasks, so that none is lost, anonymous or silently failed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextvars import Context
from functools import partial
from typing import Any

log = logging.getLogger(__name__)


class TaskScope:
    """Owns a set of tasks: keeps them alive, reports their failures, and ends them together.

    Not thread-safe: belongs to one event loop.
    """

    def __init__(self, name: str, make_context: Callable[[], Context] | None = None) -> None:
        self._name = name
        self._make_context = make_context
        # In the order of their start, so that they also end in one.
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._closed = False

    def __len__(self) -> int:
        return len(self._tasks)

    def tasks(self) -> list[asyncio.Task[Any]]:
        """List the tasks that have not ended, oldest first."""
        return list(self._tasks)

    def spawn(
        self,
        work: Coroutine[Any, Any, Any],
        name: str,
        on_failure: Callable[[BaseException], None] | None = None,
        context: Context | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> asyncio.Task[Any]:
        """Start `work` as a task of this scope; its failure goes to `on_failure`, or to the log.

        It runs in `context`, or in the one that the scope makes, or in a copy of the caller's. `on_end` hears its end.
        """
        if self._closed:
            work.close()
            raise asyncio.CancelledError(f"{self._name} is closed")
        if context is None and self._make_context is not None:
            context = self._make_context()
        task = asyncio.get_running_loop().create_task(work, name=f"{self._name}/{name}", context=context)
        self._tasks[task] = None
        task.add_done_callback(partial(self._ended, on_failure, on_end))
        return task

    def _ended(
        self,
        on_failure: Callable[[BaseException], None] | None,
        on_end: Callable[[], None] | None,
        task: asyncio.Task[Any],
    ) -> None:
        self._tasks.pop(task, None)
        if on_end is not None:
            on_end()
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            return
        if on_failure is not None:
            on_failure(error)
        else:
            log.error("task %s failed", task.get_name(), exc_info=error)

    async def close(self) -> None:
        """Cancel every task and wait until each has ended; nothing can be spawned afterwards."""
        self._closed = True
        current = asyncio.current_task()
        pending = [task for task in self._tasks if task is not current]
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.gather(*pending, return_exceptions=True)
        for task in pending:
            # One that had ended just before may not have been told off yet.
            self._tasks.pop(task, None)
