"""The node's handle on a simulated engine process: the production client, and what a simulation alone sees of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from contextvars import Context, copy_context
from typing import cast

from sllm_actor.domain import RequestId
from sllm_actor.domain.tokens import unpack_uint32
from sllm_actor.engine.client import Engine
from sllm_actor.engine.streams import AnswerStream, Item, Parking
from sllm_actor.messages.embedding import Embed
from sllm_actor.messages.generation import Generate, Tokens
from sllm_actor.runtime.channel import Channel
from sllm_actor.runtime.forking import Child
from sllm_actor.testing.simulated_cores import Cores
from sllm_actor.testing.simulated_engine import EngineProcess, Node, Speed


class SimulatedParking(Parking):
    """What a simulated process holds; its node hears when that is handed over."""

    def __init__(
        self, number: RequestId, stream: AnswerStream, send: Callable[[object], None], process: EngineProcess
    ) -> None:
        super().__init__(number, stream, send)
        self._process = process

    def hand_over(self) -> None:
        """Have it wait for the request that takes it over."""
        super().hand_over()
        self._process.is_handed_over(self.number)


class SimulatedEngine(Engine):
    """The node's handle on a simulated process. Where it `echoes`, a token of the epoch before comes late."""

    def __init__(self, process: EngineProcess, echoes: bool) -> None:
        super().__init__(cast(Child, process))
        self.process = process
        self._echoes = echoes
        self._channel = cast(Channel, process)
        process.answer = self._take

    def _parking(self, number: RequestId, stream: AnswerStream) -> Parking:
        return SimulatedParking(number, stream, self._send, self.process)

    def generate(
        self, request: Generate | Embed, stream: AnswerStream | None = None, parking: Parking | None = None
    ) -> AsyncGenerator[Item, None]:
        """Run one request."""
        items = super().generate(request, stream, parking)
        if self._echoes and isinstance(request, Generate) and request.generated:
            return _echoing(request, items)
        return items


async def _echoing(request: Generate, items: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
    index, token_id = len(request.generated) // 4 - 1, unpack_uint32(request.generated)[-1]
    yield Tokens(request_id=request.request_id, index=index, token_ids=(token_id,), epoch=request.epoch - 1)
    async with aclosing(items):
        async for item in items:
            yield item


def fork(
    context: Context, pid: int, speed_of: Callable[[str], Speed], node: Node, cores: Cores, echoes: bool
) -> SimulatedEngine:
    """Start a process that runs in a context of its own, for the node that calls this.

    `speed_of` tells how fast the model of a folder is; of "", how fast processes are forked.
    """
    there = copy_context()
    return SimulatedEngine(context.run(EngineProcess, there, pid, speed_of, node, cores), echoes)
