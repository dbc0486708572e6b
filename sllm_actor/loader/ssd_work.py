"""Threads for the SSD tier's file work, and its tasks, none of which is left half done by who stops waiting for it.

Cancelling the caller of a piece of work takes effect when the work has ended: until then its thread may still read
the caller's buffer, and files and books must agree.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

from sllm_actor.errors import Draining
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.runtime.threads import to_the_end

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


class DiskWork:
    """Owns a few threads and the tasks that use them. Belongs to the event loop that made it."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._loop = asyncio.get_running_loop()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="sllm-ssd")
        self._scope = TaskScope("ssd-tier")
        self._refusing = False

    async def aside(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Run blocking work on a thread."""
        return await to_the_end(self._loop.run_in_executor(self._pool, partial(function, *args, **kwargs)))

    async def whole(
        self,
        work: Coroutine[Any, Any, Result],
        name: str,
        undo: Callable[[Result], Coroutine[Any, Any, None]] | None = None,
    ) -> Result:
        """Run a change that has several steps: all of them, whoever goes on waiting.

        What it gives goes to `undo` where the caller was cancelled and nobody would ever have it.

        Raises:
            Draining: the tier is closing; nothing was done.
        """
        if self._refusing:
            work.close()
            raise Draining("the SSD tier is closing")
        task = self._scope.spawn(work, name, on_failure=_told_to_the_caller)
        try:
            return await to_the_end(task)
        except asyncio.CancelledError:
            if undo is not None and not task.cancelled() and task.exception() is None:
                await undo(task.result())
            raise

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Start what nobody waits for; its failure goes to the log."""
        return self._scope.spawn(work, name)

    def refuse(self) -> None:
        """Begin nothing new from outside from now on."""
        self._refusing = True

    async def idle(self) -> None:
        """Wait until every task has ended, those too that they start."""
        while others := [task for task in self._scope.tasks() if task is not asyncio.current_task()]:
            await asyncio.wait(others)

    async def close(self) -> None:
        """Wait for what is under way, and end the threads."""
        self.refuse()
        await self.idle()
        await self._scope.close()
        await to_the_end(self._loop.run_in_executor(None, self._pool.shutdown))


def _told_to_the_caller(error: BaseException) -> None:
    """Keep it out of the log."""
