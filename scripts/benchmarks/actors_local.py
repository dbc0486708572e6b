"""Actors of one process: `python -m benchmarks.actors_local both | idle`.

The peer of an ask is a bare asyncio.Queue as the mailbox, with one task that awaits a handler for each message.
"""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks.actors_ours import NAME, Answer, Ask, Bench, Client, new_system
from benchmarks.actors_process import Commands, Tally, measure, memory, serve, trace
from sllm_actor.runtime import Actor, ActorSystem, handles

# Spawned before the memory of the others is taken: what the first ones import and cache is not theirs.
FIRST_ACTORS = 100
# A mailbox is bounded, and who puts into a full one waits.
MAILBOX_MESSAGES = 1024


class Idle(Actor):
    """Waits for a message that never comes."""

    @handles(Ask)
    async def ask(self, message: Ask) -> Answer:
        return Answer(body=message.body)


class QueueActor:
    """An actor as the standard library alone would have it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._mailbox: asyncio.Queue[tuple[Ask, asyncio.Future[Answer]]] = asyncio.Queue(MAILBOX_MESSAGES)
        self._runner = self._loop.create_task(self._run())

    async def _handle(self, message: Ask) -> Answer:
        return Answer(body=message.body)

    async def _run(self) -> None:
        while True:
            message, answer = await self._mailbox.get()
            answer.set_result(await self._handle(message))

    async def work(self, tally: Tally, body: bytes) -> None:
        """Ask, one after the other."""
        while tally.running:
            answer: asyncio.Future[Answer] = self._loop.create_future()
            await self._mailbox.put((Ask(body=body), answer))
            await answer
            tally.count += 1

    async def ask(self, outstanding: int, item_bytes: int, seconds: float) -> Any:
        tally = Tally()
        return await measure(tally, [self.work(tally, bytes(item_bytes)) for _ in range(outstanding)], seconds)


async def both() -> tuple[None, Commands]:
    """Have both kinds of actors in this process."""
    system = new_system("bench-local")
    ours = Client(await system.spawn(Bench(), NAME)).commands()
    return None, {**ours, "queue_ask": QueueActor().ask}


async def idle() -> tuple[None, Commands]:
    """Make a system for actors that do nothing."""
    system = new_system("bench-idle")
    await _spawn(system, "first", FIRST_ACTORS)

    async def spawn(actors: int, traced: bool) -> float:
        if traced:
            await trace(True)
        kind = "traced" if traced else "rss"
        before = await memory()
        await _spawn(system, kind, actors)
        return ((await memory())[kind] - before[kind]) / actors

    return None, {"spawn": spawn}


async def _spawn(system: ActorSystem, name: str, actors: int) -> None:
    for number in range(actors):
        await system.spawn(Idle(), f"{name}-{number}")
    await asyncio.sleep(0.1)  # Each has had its turn, and waits.


if __name__ == "__main__":
    serve(both=both, idle=idle)
