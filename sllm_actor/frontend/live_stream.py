"""One stream that a gateway answers: what is known of each choice, what of that is written, and whose it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager

from sllm_actor.errors import StreamTaken
from sllm_actor.frontend.choice_log import ChoiceLog
from sllm_actor.messages.generation import Finished
from sllm_actor.metadata import LeaseId

# Of each choice, how many tokens, and whether its end.
Mark = list[tuple[int, bool]]


class LiveStream:
    """A stream. `kept` while its record is in the store, and is this gateway's: then others can go on with it."""

    def __init__(self, stream_id: str, choices: int, on_change: Callable[[LiveStream], None]) -> None:
        self.id = stream_id
        self._on_change = on_change
        self.logs = [ChoiceLog(self._changed) for _ in range(choices)]
        self.written: Mark = [(0, False)] * choices
        self.keys: set[str] = set()
        # False where the tokens are not all that its events are made of: who goes on with it begins anew.
        self.keeps_tokens = True
        # As many of them are written at most; what is behind that is generated once more.
        self.room_tokens = 0
        # The revision of the record's last change, and the lease that all of it is under.
        self.changed = 0
        self.lease: LeaseId | None = None
        # Set once the record is written, or is known not to be.
        self.decided = asyncio.Event()
        self.left = asyncio.Event()
        self._lost = False
        self._limit: asyncio.Timeout | None = None

    @property
    def kept(self) -> bool:
        return self.changed > 0

    @property
    def undecided(self) -> bool:
        """Whether its record is being written."""
        return not self.decided.is_set()

    def own(self, changed: int, lease: LeaseId | None) -> None:
        """Note that the record is there since revision `changed`."""
        self.changed, self.lease = changed, lease
        self.decided.set()

    def unkept(self) -> LiveStream:
        """Note that there is no record, or none any more."""
        self.changed = 0
        self.decided.set()
        return self

    def know(self, choice: int, tokens: Sequence[int], end: Finished | None) -> None:
        """Begin with what is written of a choice."""
        self.logs[choice] = ChoiceLog(self._changed, tokens, end)
        self.written[choice] = (len(tokens), end is not None)

    def _changed(self) -> None:
        if self.keeps_tokens and (self.kept or self.undecided):
            self._on_change(self)

    def mark(self) -> Mark:
        """Give how far each choice is."""
        return [(len(log.tokens), log.end is not None) for log in self.logs]

    def unwritten(self, upto: Mark) -> list[int]:
        """List the choices that are further than what is written of them, as long as there is room."""
        if sum(tokens for tokens, _ in upto) > self.room_tokens:
            return []
        return [number for number, mark in enumerate(upto) if mark != self.written[number]]

    def note_written(self, upto: Mark) -> None:
        """Note what is in the store now."""
        self.written = upto
        if self.left.is_set():
            self.logs = []

    def leave(self) -> None:
        """Note that nothing more comes."""
        self.left.set()
        if self.written == self.mark() or not (self.kept or self.undecided):
            self.logs = []

    def lose(self) -> None:
        """End: somebody else has gone on with it."""
        self._lost = True
        self.unkept()
        if self._limit is not None:
            self._limit.reschedule(0.0)

    @asynccontextmanager
    async def held(self) -> AsyncGenerator[None, None]:
        """Answer it in this block, which is left when it is lost.

        Raises:
            StreamTaken: somebody else has gone on with it.
        """
        taken = StreamTaken("another client has gone on with this stream")
        if self._lost:
            raise taken
        try:
            async with asyncio.timeout(None) as self._limit:
                yield
        except TimeoutError:
            if self._limit is None or not self._limit.expired():
                raise
            raise taken from None
        finally:
            self._limit = None
