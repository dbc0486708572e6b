"""What one engine says of each request, on the node's side: in order, for one reader, and where need be held back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from sllm_actor.domain import RequestId
from sllm_actor.domain.tokens import pack_uint32
from sllm_actor.errors import SllmError
from sllm_actor.messages.embedding import Embedded
from sllm_actor.messages.engine import CancelGeneration, ExtendParked, Parked, Prefilled
from sllm_actor.messages.generation import Finished, Migrated, PromptLogprobs, Tokens
from sllm_actor.runtime.calls import Inflow

Said = Prefilled | Parked | PromptLogprobs | Tokens | Embedded | Finished
Item = Prefilled | PromptLogprobs | Tokens | Embedded | Finished | Migrated


class AnswerStream:
    """The items of one request: bounded by its max_tokens, or its texts. Belongs to one event loop."""

    def __init__(self) -> None:
        self._inflow = Inflow()
        self._held: list[Said | SllmError] | None = None
        # Of the answer here, all that the reader has or will find, but for what is held back.
        self.token_ids: list[int] = []
        # Whether it has come to its end, good or bad, or its reader has left.
        self.ended = False
        self._grown = asyncio.Event()

    def put(self, item: Said | SllmError) -> None:
        """Have the reader find an item, unless they are held back."""
        if self._held is not None:
            self._held.append(item)
            return
        if self.ended:
            return
        if isinstance(item, Tokens):
            self.token_ids += item.token_ids
        self.ended = isinstance(item, Finished | SllmError)
        self._inflow.push(item)
        self._grown.set()

    async def grown(self) -> None:
        """Wait until there is something new for the reader, an end included. One waits at a time."""
        self._grown.clear()
        await self._grown.wait()

    async def get(self) -> Said | Migrated | SllmError:
        """Wait for the next item."""
        items = self._inflow.items
        if not items:
            await self._inflow.arrived(asyncio.get_running_loop().create_future)
        item: Said | Migrated | SllmError = items.popleft()
        return item

    def hold(self) -> None:
        """Hold back what comes from now on, until `release` or `end_with`."""
        assert self._held is None, "one holds it at a time"
        self._held = []

    def release(self) -> None:
        """Give the reader what was held back, and all that comes."""
        held, self._held = self._held or [], None
        for item in held:
            self.put(item)

    def leave(self) -> None:
        """Say that the reader has left, or has all of it."""
        self.ended = True
        self._grown.set()

    def end_with(self, item: Migrated) -> None:
        """Let the stream end so, and forget what was held back and comes still."""
        self._held = None
        self.ended = True
        self._inflow.push(item)


class Parking:
    """A request's tokens in an engine that will go on with them: their keys and values are computed and held.

    Whoever has it lets it go with `leave`, unless a request takes it over.
    """

    def __init__(self, number: RequestId, stream: AnswerStream, send: Callable[[object], None]) -> None:
        self.number = number
        self._stream = stream
        self._send = send
        self.taken = False
        # No more tokens come but with the request that takes it over.
        self.handed_over = False

    async def reached(self) -> int:
        """Wait until all that can be is computed, again behind each `extend`; give the tokens that are known then.

        Raises:
            EngineDied: the process has left.
            SllmError: the engine can't hold it; it holds nothing more.
        """
        item = await self._stream.get()
        if isinstance(item, SllmError):
            raise item
        assert isinstance(item, Parked), "nothing else is said of what is parked"
        return item.known_tokens

    def extend(self, token_ids: Sequence[int]) -> None:
        """Hold these tokens behind the others.

        Raises:
            EngineDied: the process has left.
        """
        self._send(ExtendParked(request_id=self.number, token_ids=pack_uint32(token_ids)))

    def hand_over(self) -> None:
        """Have it wait for the request that takes it over.

        What is missing comes with that: computed alone it would take a step for which the answer's next token waits.
        """
        self.handed_over = True

    def leave(self) -> None:
        """Let go of it, unless it was taken over. Where this can't be said, the process is on its way out."""
        if not self.taken:
            self.taken = True
            with contextlib.suppress(SllmError):
                self._send(CancelGeneration(request_id=self.number))
