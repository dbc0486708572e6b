"""Who asks in the chaos scenario: a driver on each node, with a lane to each other node, for everything there is."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial

import msgspec

from sllm_actor.errors import SllmError
from sllm_actor.runtime import Actor, ActorRef, Blob, Ended, handles
from sllm_actor.testing.chaos_actors import (
    FOR_EVER_S,
    Count,
    Crash,
    Hold,
    Meet,
    Met,
    Mortal,
    Note,
    Parcel,
    Question,
    Through,
    noise,
)
from sllm_actor.testing.chaos_witness import Witness


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much a driver does: so many steps with each other node, on average so far apart."""

    steps: int = 5
    pace_s: float = 0.75
    mortals: int = 2


class Driver(Actor):
    """Asks the workers of other nodes for everything, in a fixed number of steps. Owns the watches of its node."""

    def __init__(self, witness: Witness, dice: random.Random, plan: Plan) -> None:
        self._witness = witness
        self._dice = dice
        self._plan = plan
        self._stops: list[Callable[[], None]] = []
        self._mortal: ActorRef | None = None

    async def started(self) -> None:
        await self._next_mortal(0)

    def begin(self, others: dict[str, str]) -> None:
        """Start to drive: ask the nodes at these addresses."""
        self.context.tasks.spawn(self._end_mortals(), "mortals")
        for node, address in others.items():
            lane = Lane(self, node, self.context.system.ref("worker", at=address), self._witness, self._dice)
            self.context.tasks.spawn(lane.run(self._plan), f"lane-{node}")

    @property
    def tasks_left(self) -> int:
        """How many of its tasks have not ended."""
        return len(self.context.tasks)

    def stop_watching(self) -> None:
        """Watch nobody any more."""
        for stop in self._stops:
            stop()
        self._stops.clear()

    async def _next_mortal(self, number: int) -> None:
        # Each has a name of its own: a watch is by name.
        self._mortal = await self.context.spawn(Mortal(self._witness), f"mortal-{number}")

    async def _end_mortals(self) -> None:
        for number in range(self._plan.mortals):
            await self.context.system.clock.sleep(self._dice.random() * self._plan.pace_s * self._plan.steps)
            assert self._mortal is not None
            await self.context.system.stop(self._mortal.name)
            await self._next_mortal(number + 1)

    @handles(Meet, concurrent=True)
    async def meet(self, _: Meet) -> Met:
        assert self._mortal is not None
        return Met(worker=self.context.system.ref("worker"), mortal=self._mortal)

    def watch(self, ref: ActorRef) -> None:
        """Watch an actor of another node, unless that is being done."""
        if self._witness.watches(self.context.system.address.uid, ref):
            self._stops.append(self.context.watch(ref))

    @handles(Ended)
    async def gone(self, ended: Ended) -> None:
        self._witness.hears(self.context.system.address.uid, ended.ref, ended.reason)


class Lane:
    """Everything that one driver wants of one other node, in the order in which it wants it."""

    def __init__(self, driver: Driver, node: str, ref: ActorRef, witness: Witness, dice: random.Random) -> None:
        self._driver = driver
        self._node = node
        self._ref = ref
        self._witness = witness
        self._dice = dice
        self._system = driver.context.system
        self._uid = self._system.address.uid
        self._met: ActorRef | None = None

    async def run(self, plan: Plan) -> None:
        """Do what the dice say, step by step."""
        steps: list[tuple[Callable[[], Awaitable[None]], int]] = [
            (self._tell, 4), (self._flood, 1), (self._ask, 5), (self._carry, 3), (self._carry_untold, 2),
            (self._crash, 1), (self._hold, 2), (self._through, 2), (self._stream, 4), (self._meet, 3),
        ]  # fmt: skip
        kinds, weights = zip(*steps, strict=True)
        await self._meet()
        for _ in range(plan.steps):
            await self._system.clock.sleep(self._dice.random() * 2 * plan.pace_s)
            await self._dice.choices(kinds, weights)[0]()

    def _aside(self, work: Callable[[], Awaitable[None]], name: str) -> None:
        async def run() -> None:
            await work()

        self._driver.context.tasks.spawn(run(), name)

    def _token(self) -> int:
        return self._dice.getrandbits(48)

    def _next(self, *, is_tell: bool) -> int:
        return self._witness.sends(self._uid, self._node, is_tell=is_tell).seq

    async def _tell(self) -> None:
        for _ in range(self._dice.randint(1, 4)):
            self._ref.tell(Note(by=self._uid, seq=self._next(is_tell=True)))

    async def _flood(self) -> None:
        """More in one turn than fits into one frame, and then more of the small ones."""
        large = noise(self._token(), 3000)
        for index in range(self._dice.choice((20, 40, 80))):
            padding = large if index < 30 and index % 8 else b""
            self._ref.tell(Note(by=self._uid, seq=self._next(is_tell=True), padding=padding))

    async def _ask(self) -> None:
        for _ in range(self._dice.randint(1, 3)):
            nap_s = self._dice.choice((0.0, 0.0, 0.0, 0.05, 0.2))
            timeout_s = self._dice.choice((0.1, 1.0, 6.0))
            patience_s = self._dice.choice((FOR_EVER_S, FOR_EVER_S, 0.15))
            self._aside(partial(self._question, nap_s, timeout_s, patience_s), "ask")

    async def _question(self, nap_s: float, timeout_s: float, patience_s: float) -> None:
        token = self._token()
        sent = self._witness.sends(self._uid, self._node, is_tell=False)
        began_s = self._system.now_s()
        message = Question(by=self._uid, seq=sent.seq, token=token, nap_s=nap_s)
        try:
            # A caller that runs out of patience cancels its ask.
            async with asyncio.timeout(patience_s):
                answer = await self._ref.ask(message, timeout_s=timeout_s)
        except SllmError as error:
            self._witness.failed(sent, error, began_s, min(timeout_s, patience_s))
        except TimeoutError:
            sent.error = SllmError("cancelled")
        else:
            self._witness.answered(sent, token, answer, began_s, timeout_s)

    async def _carry(self) -> None:
        self._aside(partial(self._parcel, self._dice.choice((0, 100, 5_000, 40_000, 200_000))), "carry")
        # These are of the parcel's lane, and must stay behind it.
        await asyncio.sleep(0)
        await self._tell()

    async def _carry_untold(self) -> None:
        """Send parcels and notes in one turn, whose answers nobody wants."""
        for size in (self._dice.choice((10_000, 150_000)), 20_000):
            token, seq = self._token(), self._next(is_tell=True)
            self._ref.tell(Parcel(by=self._uid, seq=seq, token=token, blob=Blob(noise(token, size))))
            await self._tell()

    async def _parcel(self, size: int) -> None:
        token = self._token()
        sent = self._witness.sends(self._uid, self._node, is_tell=False)
        began_s = self._system.now_s()
        parcel = Parcel(by=self._uid, seq=sent.seq, token=token, blob=Blob(noise(token, size)))
        try:
            returned = await self._ref.ask(parcel, timeout_s=4.0)
        except SllmError as error:
            self._witness.failed(sent, error, began_s, 4.0)
            return
        self._witness.answered(sent, token, returned.token, began_s, 4.0)
        if returned.blob.data != noise(token, size):
            self._witness.problem(f"parcel {sent.seq} comes back with other bytes")

    async def _crash(self) -> None:
        self._ref.tell(Crash(by=self._uid, seq=self._next(is_tell=True)))
        await self._tell()

    async def _hold(self) -> None:
        self._aside(partial(self._held, self._dice.random(), self._dice.random()), "hold")

    async def _held(self, timeout_s: float, patience_s: float) -> None:
        began_s = self._system.now_s()
        try:
            async with asyncio.timeout(patience_s):
                await self._ref.ask(Hold(), timeout_s=timeout_s)
        except SllmError as error:
            self._witness.expected("a hold", error)
        except TimeoutError:
            self._witness.saw("cancelled")
        else:
            self._witness.problem("a hold is answered")
        self._witness.in_time("a hold", began_s, min(timeout_s, patience_s))

    async def _through(self) -> None:
        if self._met is not None:
            others = [self._system.ref("worker"), self._met]
            self._aside(partial(self._asked_through, self._dice.choice(others)), "through")

    async def _asked_through(self, onward: ActorRef) -> None:
        token, timeout_s, began_s = self._token(), self._dice.choice((0.2, 2.0)), self._system.now_s()
        try:
            answer = await self._ref.ask(Through(ref=onward, token=token, left_s=timeout_s), timeout_s=timeout_s)
        except SllmError as error:
            self._witness.expected("an ask through another", error)
        else:
            self._witness.saw("through", answer)
            if answer != token:
                self._witness.problem(f"an ask through another with token {token} is answered by {answer!r}")
        self._witness.in_time("an ask through another", began_s, timeout_s)

    async def _stream(self) -> None:
        item_bytes = self._dice.choice((0, 0, 0, 1_000, 30_000))
        pause_s = self._dice.choice((0.0, 0.0, 0.02))
        reading_s = self._dice.choice((0.0, 0.0, 0.05))
        leave_at = self._dice.choice((FOR_EVER_S, FOR_EVER_S, 3))
        count = Count(
            flow=self._witness.open_flow(), upto=self._dice.randint(0, 24), item_bytes=item_bytes, pause_s=pause_s
        )
        self._aside(partial(self._read, count, reading_s, leave_at), "stream")

    async def _read(self, count: Count, reading_s: float, leave_at: float) -> None:
        try:
            async with aclosing(self._ref.stream(count)) as items:
                async for item in items:
                    self._witness.took(count.flow, item.n)
                    if item.blob is not None and item.blob.data != noise(count.flow + item.n, count.item_bytes):
                        self._witness.problem(f"item {item.n} of stream {count.flow} has other bytes")
                    if item.n >= leave_at:
                        return
                    if reading_s:
                        await self._system.clock.sleep(reading_s)
        except SllmError as error:
            self._witness.expected(f"stream {count.flow}", error)
        else:
            self._witness.ended_stream(count.flow, count.upto)

    async def _meet(self) -> None:
        """Get references that name the incarnation, and watch what they name."""
        address = self._ref.address
        try:
            met = await self._system.ref("driver", at=address).ask(Meet(), timeout_s=1.0)
        except SllmError as error:
            self._witness.expected("a meeting", error)
            return
        self._met = met.worker
        self._driver.watch(met.worker)
        self._driver.watch(met.mortal)
