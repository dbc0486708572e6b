"""Blocking calls on threads, which end before whoever asked for them goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


async def on_thread(function: Callable[..., _T], *arguments: object) -> _T:
    """Call `function` on a thread of the loop's. Cancelling this waits for its end: what it works on is free after."""
    loop = asyncio.get_running_loop()
    called = loop.run_in_executor(None, lambda: function(*arguments))
    try:
        return await asyncio.shield(called)
    except asyncio.CancelledError:
        while not called.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([called])
        if not called.cancelled():
            called.exception()
        raise
