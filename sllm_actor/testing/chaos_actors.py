"""The messages of the chaos scenario, and the workers that do what they are asked.

They know nothing of the simulation: the same code runs over real connections. What they do they tell the witness.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator

import msgspec

from sllm_actor.runtime import Actor, ActorRef, Blob, handles
from sllm_actor.testing.chaos_witness import PlannedCrash, Witness

NOISE = random.Random(0).randbytes(512 * 1024)
FOR_EVER_S = 3600.0


def noise(token: int, size: int) -> bytes:
    """Give the bytes that a token stands for."""
    begin = token % (len(NOISE) - size)
    return NOISE[begin : begin + size]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", forbid_unknown_fields=True):
    """Base of the scenario's messages."""


class Numbered(Message, frozen=True):
    """One of a sequence: the `seq`-th of the incarnation `by` to this node."""

    by: int
    seq: int


class Note(Numbered, tag="note", frozen=True):
    """Told."""

    padding: bytes = b""


class Question(Numbered, tag="question", frozen=True):
    """Answered by its token, after a nap."""

    token: int
    nap_s: float = 0.0


class Parcel(Numbered, tag="parcel", frozen=True):
    """Told, or answered by `Returned` with the same bytes."""

    token: int
    blob: Blob


class Returned(Message, tag="returned", frozen=True):
    token: int
    blob: Blob


class Crash(Numbered, tag="crash", frozen=True):
    """Handled by a bug; the worker is made anew."""


class Hold(Message, tag="hold", frozen=True):
    """Never answered: its asker must give up, and its handler must end then."""


class Echo(Message, tag="echo", frozen=True):
    """Answered by its token."""

    token: int


class Through(Message, tag="through", frozen=True):
    """Answered by what `ref` answers to an `Echo`; nobody has more time than `until_s`."""

    ref: ActorRef
    token: int
    left_s: float


class Count(Message, tag="count", frozen=True):
    """Answered by a stream of so many `Item`s."""

    flow: int
    upto: int
    item_bytes: int
    pause_s: float


class Item(Message, tag="item", frozen=True):
    n: int
    blob: Blob | None


class Meet(Message, tag="meet", frozen=True):
    """Answered by `Met`."""


class Met(Message, tag="met", frozen=True):
    """Two actors of a node, to be asked and watched."""

    worker: ActorRef
    mortal: ActorRef


TABLE = (Note, Question, Parcel, Returned, Crash, Hold, Echo, Through, Count, Item, Meet, Met)


class Worker(Actor):
    """Does what it is asked. Owns nothing."""

    def __init__(self, witness: Witness) -> None:
        self._witness = witness

    def _note(self, message: Numbered) -> None:
        self._witness.handled(message.by, self.context.system.address.uid, message.seq)

    @handles(Note)
    async def note(self, message: Note) -> None:
        self._note(message)

    @handles(Question)
    async def question(self, message: Question) -> int:
        self._note(message)
        if message.nap_s:
            await self.context.system.clock.sleep(message.nap_s)
        return message.token

    @handles(Parcel)
    async def parcel(self, message: Parcel) -> Returned:
        self._note(message)
        if message.blob.data != noise(message.token, len(message.blob)):
            self._witness.problem(f"parcel {message.seq} has other bytes than were sent")
        return Returned(token=message.token, blob=message.blob)

    @handles(Crash)
    async def crash(self, message: Crash) -> None:
        self._note(message)
        raise PlannedCrash

    @handles(Hold, concurrent=True)
    async def hold(self, _: Hold) -> None:
        uid = self.context.system.address.uid
        self._witness.holding[uid] = self._witness.holding.get(uid, 0) + 1
        try:
            await self.context.system.create_future()
        finally:
            self._witness.holding[uid] -= 1

    @handles(Echo, concurrent=True)
    async def echo(self, message: Echo) -> int:
        return message.token

    @handles(Through, concurrent=True)
    async def through(self, message: Through) -> int:
        began_s = self.context.system.now_s()
        try:
            answer: int = await message.ref.ask(Echo(token=message.token), timeout_s=FOR_EVER_S)
        finally:
            self._witness.in_time("a nested ask", began_s, message.left_s)
        return answer

    @handles(Count)
    async def count(self, message: Count) -> AsyncGenerator[Item, None]:
        for n in range(message.upto):
            self._witness.made(message.flow)
            size = message.item_bytes
            yield Item(n=n, blob=Blob(noise(message.flow + n, size)) if size else None)
            if message.pause_s:
                await self.context.system.clock.sleep(message.pause_s)


class Mortal(Actor):
    """Lives to be watched."""

    def __init__(self, witness: Witness) -> None:
        self._witness = witness

    async def stopped(self) -> None:
        self._witness.actor_ended(self.context.system.address.uid, self.context.self_ref.name)
