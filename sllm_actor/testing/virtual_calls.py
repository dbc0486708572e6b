"""What a virtual loop calls, and when: asyncio's handles without what only debugging needs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context
from typing import Any


class Call(asyncio.Handle):
    """What has its turn soon."""

    __slots__ = ()
    # The base class's, which its type stubs do not name.
    _callback: Callable[..., object] | None
    _context: Context
    # Only debugging sets these.
    _repr = None
    _source_traceback = None

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], context: Context) -> None:
        self._callback = callback
        self._args = args
        self._context = context
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True
        self._callback, self._args = None, ()


class Timer(asyncio.TimerHandle):
    """What is called at a moment. The loop keeps it beside that, in order."""

    __slots__ = ()
    _loop: Any
    _callback: Callable[..., object] | None
    _context: Context
    _repr = None
    _source_traceback = None

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: asyncio.AbstractEventLoop,
        context: Context,
    ) -> None:
        self._when = when
        self._callback = callback
        self._args = args
        self._loop = loop
        self._context = context
        self._cancelled = False
        self._scheduled = True

    def cancel(self) -> None:
        if not self._cancelled:
            self._cancelled = True
            self._loop._timer_handle_cancelled(self)
            self._callback, self._args = None, ()


# When, the how manieth that was made, and what is to be called: so that those of one moment come in their order.
Scheduled = tuple[float, int, Timer]
