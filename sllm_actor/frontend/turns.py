"""Shares each turn of the event loop among all answers: so much work is done in one, and the rest waits in order.

A loop whose tasks are all ready runs each of them before it looks at its timers and sockets again: with a thousand
streams a fifth of a second. Here some have their turn, then the loop looks round, then others have theirs. Requests
and first tokens have a share of their own, so that they do not wait for the next tokens of all other answers, nor
these for them.
"""

from __future__ import annotations

import asyncio
from collections import deque

# An item of an answer that has begun is one unit, a fifth of a millisecond's work; to look round takes a tenth of that.
NEXT_UNITS = 4
# Of requests two are begun in a turn.
FIRST_UNITS = 12
REQUEST_UNITS = 6


class Share:
    """Bounds one kind of work in a turn of the loop. Belongs to one event loop."""

    def __init__(self, units: int) -> None:
        self._units = units
        self._left = units
        self._renewing = False
        # Those who wait, in order: as many as requests are here, which connections bound.
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()

    def take_now(self, units: int = 1) -> bool:
        """Take a part in this turn; false where it is used up, or others wait for theirs."""
        if self._left <= 0 or self._waiting:
            return False
        # The last one in a turn may take more than is left: what takes many units has its turn, too.
        self._left -= units
        if not self._renewing:
            self._renewing = True
            asyncio.get_running_loop().call_soon(self._renew)
        return True

    async def take(self, units: int = 1) -> None:
        """Take a part in this turn or in one that comes."""
        if self.take_now(units):
            return
        mine = asyncio.get_running_loop().create_future()
        self._waiting.append((mine, units))
        await mine

    def _renew(self) -> None:
        """Begin another turn, which goes first to those who wait."""
        if self._left == self._units:
            self._renewing = False
            return
        self._left = self._units
        while self._waiting and self._left > 0:
            waiter, units = self._waiting.popleft()
            if not waiter.done():
                self._left -= units
                waiter.set_result(None)
        asyncio.get_running_loop().call_soon(self._renew)


class Turns:
    """The shares of one node's answers."""

    def __init__(self) -> None:
        # Of requests that come and of first tokens, and of the tokens that follow.
        self.first = Share(FIRST_UNITS)
        self.next = Share(NEXT_UNITS)
