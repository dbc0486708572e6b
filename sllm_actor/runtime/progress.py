"""Work that tells how far it is, followed by whoever passes that on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

from sllm_actor.runtime.tasks import TaskScope

Result = TypeVar("Result")


class Step(NamedTuple):
    """How much has been done, and of how much; told again with the same numbers where others went on in its way."""

    done: int
    total: int


async def followed(
    work: Callable[[Callable[[int, int], None]], Coroutine[Any, Any, Result]],
) -> AsyncGenerator[Step | Result, None]:
    """Run `work`, which is given a function to tell its progress; give the newest step as it changes, then the result.

    Closing this cancels the work and waits for its end. Raises what the work raises.
    """
    latest, changed = Step(0, 0), asyncio.Event()

    def tell(done: int, total: int) -> None:
        nonlocal latest
        latest = Step(done, total)
        changed.set()

    scope = TaskScope("followed")
    try:
        task = scope.spawn(work(tell), "work", on_failure=lambda _: None)
        task.add_done_callback(lambda _: changed.set())
        while True:
            await changed.wait()
            changed.clear()
            if task.done():
                break
            yield latest
        yield await task
    finally:
        await scope.close()
