"""What a virtual loop calls, and when: asyncio's handles without what only debugging needs."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from typing import Any

import msgspec


class Call(msgspec.Struct, eq=False):
    """What has its turn soon, with the face of an `asyncio.Handle`. Made for every step of every task."""

    callback: Callable[..., object]
    args: tuple[Any, ...]
    context: Context
    is_cancelled: bool = False

    def cancel(self) -> None:
        """Let it not be called."""
        self.is_cancelled = True
        self.callback, self.args = _nothing, ()

    def cancelled(self) -> bool:
        """Tell whether it is not to be called."""
        return self.is_cancelled


class Timer(Call, eq=False, kw_only=True):
    """What is called at a moment, with the face of an `asyncio.TimerHandle`. The loop keeps them in order."""

    at_s: float
    # Told where it is cancelled while it lies among the others.
    note_cancelled: Callable[[], None]
    is_scheduled: bool = True

    def cancel(self) -> None:
        if not self.is_cancelled:
            super().cancel()
            if self.is_scheduled:
                self.note_cancelled()

    def when(self) -> float:
        """Give the moment."""
        return self.at_s


# When, the how manieth that was made, and what is to be called: so that those of one moment come in their order.
Scheduled = tuple[float, int, Timer]


def _nothing() -> None:
    """What was cancelled holds nothing any more."""
