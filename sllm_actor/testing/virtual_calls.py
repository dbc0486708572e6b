"""What a virtual loop calls, and when: asyncio's handles without what only debugging needs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context, copy_context
from typing import Any


class _Made:
    """Sets what a handle has, as the base class does."""

    __slots__ = ()

    def __init__(
        self,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: asyncio.AbstractEventLoop,
        context: Context | None,
    ) -> None:
        made: Any = self
        made._callback = callback
        made._args = args
        made._loop = loop
        made._context = copy_context() if context is None else context
        made._cancelled = False
        made._repr = None
        made._source_traceback = None


class Call(_Made, asyncio.Handle):
    """What has its turn soon."""

    __slots__ = ()


class Timer(_Made, asyncio.TimerHandle):
    """What is called at a moment. The loop keeps it beside that, in order."""

    __slots__ = ()

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: asyncio.AbstractEventLoop,
        context: Context | None,
    ) -> None:
        super().__init__(callback, args, loop, context)
        self._when = when
        self._scheduled = True


# When, the how manieth that was made, and what is to be called: so that those of one moment come in their order.
Scheduled = tuple[float, int, Timer]
