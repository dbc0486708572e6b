"""The choices of one request: as many generations, merged into one stream as their pieces come."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from sllm_actor.frontend.answer import Choice, Wish, answer
from sllm_actor.frontend.choice_log import ChoiceLog
from sllm_actor.frontend.text import TextService
from sllm_actor.frontend.turns import Turns
from sllm_actor.runtime import ActorRef
from sllm_actor.runtime.tasks import TaskScope

# Pieces that may wait for a reader who is slow, of all choices together; beyond that generations wait, too.
MAX_WAITING_PIECES = 64


def choices(
    wishes: Sequence[Wish], router: ActorRef, text: TextService, turns: Turns, logs: Sequence[ChoiceLog]
) -> AsyncGenerator[Choice, None]:
    """Generate all of them at once, each ending with the piece that has a `finish`. Closing it cancels them.

    Each has its log, and goes on behind what is in it.

    Raises:
        SllmError: whatever went wrong with one of them; the others are cancelled.
    """
    if len(wishes) == 1:
        return answer(wishes[0], 0, router, text, turns, logs[0])
    return _merged(wishes, router, text, turns, logs)


async def _merged(
    wishes: Sequence[Wish], router: ActorRef, text: TextService, turns: Turns, logs: Sequence[ChoiceLog]
) -> AsyncGenerator[Choice, None]:
    waiting: deque[Choice | BaseException] = deque()
    room = asyncio.Semaphore(MAX_WAITING_PIECES)
    arrived = asyncio.Event()

    def put(item: Choice | BaseException) -> None:
        waiting.append(item)
        arrived.set()

    async def run(index: int, wish: Wish) -> None:
        async with aclosing(answer(wish, index, router, text, turns, logs[index])) as pieces:
            async for choice in pieces:
                await room.acquire()
                put(choice)

    scope = TaskScope(f"choices-{wishes[0].request_id}")
    try:
        for index, wish in enumerate(wishes):
            scope.spawn(run(index, wish), str(index), on_failure=put)
        running = len(wishes)
        while running:
            while not waiting:
                arrived.clear()
                await arrived.wait()
            item = waiting.popleft()
            if isinstance(item, BaseException):
                raise item
            room.release()
            running -= item.piece.finish is not None
            yield item._replace(more=bool(waiting))
    finally:
        await scope.close()


class Counts:
    """The tokens of a request: each prompt once, and what all choices have generated so far."""

    def __init__(self, wishes: Sequence[Wish], n: int) -> None:
        self._n = n
        self.choices = len(wishes)
        self.prompt_tokens = sum(len(wish.prompt) for wish in wishes[::n])
        self._generated = [0] * len(wishes)
        self._cached = [0] * len(wishes)

    def take(self, choice: Choice) -> None:
        self._generated[choice.number] = choice.piece.generated_tokens
        self._cached[choice.number] = choice.piece.cached_tokens

    @property
    def generated_tokens(self) -> int:
        return sum(self._generated)

    def usage(self) -> dict[str, object]:
        """Give OpenAI's `usage`; tokens of a prompt that were computed before it came are counted once, too."""
        generated = self.generated_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached[:: self._n])},
        }
