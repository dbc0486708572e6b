"""The reads of one source that are under way, so that closing the source ends them and waits until they have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from sllm_actor.errors import SourceUnreachable
from sllm_actor.runtime.tasks import TaskScope

T = TypeVar("T")


class UnderWay:
    """Runs the work of a source. Who is cancelled waits until the work has let go of the buffer that it was given."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._closed = False
        self._scope = TaskScope(url)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do the work and give its result.

        Raises:
            SourceUnreachable: the source was closed before the work was done.
        """
        if self._closed:
            work.close()
            raise self._is_closed()
        task: asyncio.Task[T] = self._scope.spawn(work, "source", on_failure=_is_told)
        try:
            return await task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            assert caller is not None, "a coroutine runs in a task"
            if not caller.cancelling():
                raise self._is_closed() from None
            raise

    def _is_closed(self) -> SourceUnreachable:
        return SourceUnreachable(f"{self._url} was closed")

    async def close(self) -> None:
        """Cancel all of it, and wait until each part has ended."""
        self._closed = True
        await self._scope.close()


def _is_told(_: BaseException) -> None:
    """Whoever waits for the work hears of its failure."""
