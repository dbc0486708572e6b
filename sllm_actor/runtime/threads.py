"""Work that ends before whoever asked for it goes on, cancelled or not: what it works on is free after."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


async def on_thread(function: Callable[..., Result], *arguments: object) -> Result:
    """Call `function` on a thread of the loop's."""
    return await to_the_end(asyncio.get_running_loop().run_in_executor(None, function, *arguments))


async def to_the_end(future: asyncio.Future[Result]) -> Result:
    """Wait until `future` is done, also when cancelled meanwhile, which takes effect afterwards."""
    cancelled = False
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        if not future.cancelled():
            future.exception()
        raise asyncio.CancelledError
    return future.result()
