"""What goes wrong in a simulated cluster, and when: drawn from a seed.

Half of the faults come at a moment of time, half right after some event, so that each step of what the nodes do
together is met: between a placement and its start, between two tokens, while a lease is being renewed. Others are aimed
at an answer's move: they come when it has just reached a step, and hit who has a part in it.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol

import msgspec

from sllm_actor.runtime import Clock
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.testing.cluster_moves import CELLS, LINKS, Met, MoveWatch, Step, kind_of
from sllm_actor.testing.cluster_witness import Witness
from sllm_actor.testing.simulated_link import JITTER_S, LATENCY_S
from sllm_actor.testing.simulated_network import SimulatedNetwork
from sllm_actor.testing.simulated_node import Home

KINDS = {
    "crash": 4, "leader": 2, "engine": 4, "store": 3, "pause": 4, "partition": 2, "one way": 2, "delay": 2, "cut": 2,
    "leave": 1,
}  # fmt: skip
LASTS_S = (0.1, 0.5, 1.5, 3.0, 6.0, 9.0)
EVENTS = 400
MOST_AIMS = 3
# How long after a step an aimed fault comes.
AIMED_AFTER_S = (0.0, 0.0, 0.001, 0.01)


class Weather(msgspec.Struct, frozen=True, kw_only=True):
    """How bad it is: so many faults within `span_s`, of the kinds that are weighted, and those aimed at moves."""

    faults: int
    span_s: float
    weights: dict[str, int]
    aims: tuple[tuple[Step, Met], ...] = ()


def steady_weather(span_s: float, every_s: float) -> Weather:
    """Have faults of all kinds, one in so long on average."""
    return Weather(faults=math.ceil(span_s / every_s), span_s=span_s, weights=KINDS)


def draw_weather(dice: random.Random, span_s: float, *, moves: bool = False) -> Weather:
    """Draw how bad it will be: one seed in eight has no faults at all, and some have one kind only.

    Where there are moves, half of the seeds have faults that are aimed at them, and only half of the others.
    """
    faults = dice.choice((0, 1, 1, 2, 3, 4, 6, 9))
    weights = KINDS if dice.random() < 0.7 else {dice.choice(list(KINDS)): 1}
    if not moves or dice.random() < 0.5:
        return Weather(faults=faults, span_s=span_s, weights=weights)
    aims = tuple(dice.choice(CELLS) for _ in range(dice.randint(1, MOST_AIMS)))
    return Weather(faults=dice.choice((0, 0, faults)), span_s=span_s, weights=weights, aims=aims)


class Nodes(Protocol):
    """What faults do to nodes, beside to their network."""

    def leader(self) -> str | None: ...
    def crash(self, name: str, *, silent: bool) -> None: ...
    async def restart(self, name: str) -> None: ...
    async def leave(self, name: str) -> None: ...
    def kill_engine(self, name: str, dice: random.Random) -> bool: ...
    def kill_engine_of(self, home: Home) -> bool: ...
    def pause(self, name: str) -> None: ...
    def go_on(self, name: str) -> None: ...
    def cut_store(self, name: str, cut: bool, *, loses_answers: bool) -> None: ...


class ClusterFaults:
    """Breaks a cluster by the dice, and mends it."""

    def __init__(
        self, network: SimulatedNetwork, nodes: Nodes, names: list[str], witness: Witness, dice: random.Random,
        clock: Clock, moves: MoveWatch,
    ) -> None:  # fmt: skip
        self._network = network
        self._nodes = nodes
        self._names = names
        self._witness = witness
        self._dice = dice
        self._clock = clock
        self._moves = moves
        self._scope = TaskScope("faults")
        self._over = asyncio.Event()
        # Nodes that are being broken or mended as a whole: one thing at a time.
        self._taken: set[str] = set()
        self._left: dict[int, list[Callable[[], None]]] = {}
        self._seen = 0
        self._kinds: dict[str, Callable[[str, str, float], Awaitable[None]]] = {
            "crash": self._crash,
            "leader": self._leader,
            "engine": self._engine,
            "store": self._store,
            "pause": self._pause,
            "partition": self._partition,
            "one way": self._one_way,
            "delay": self._delay,
            "cut": self._cut,
            "leave": self._leave,
        }

    async def run(self, weather: Weather) -> None:
        """Break things until the span is over; what lasts longer is mended by `end`."""
        dice, kinds, weights = self._dice, list(weather.weights), list(weather.weights.values())
        for _ in range(weather.faults):
            kind, lasts_s = dice.choices(kinds, weights)[0], dice.choice(LASTS_S)
            x, y = dice.sample(self._names, 2) if len(self._names) > 1 else (self._names[0], self._names[0])
            wait_s = dice.random() * weather.span_s
            if dice.random() < 0.5:
                moment = asyncio.Event()
                self._left.setdefault(dice.randrange(EVENTS), []).append(moment.set)
                self._scope.spawn(self._at(moment, kind, x, y, lasts_s), kind)
            else:
                self._scope.spawn(self._after(wait_s, kind, x, y, lasts_s), kind)
        for step, met in weather.aims:
            after_s, lasts_s = dice.choice(AIMED_AFTER_S), dice.choice(LASTS_S)
            self._scope.spawn(self._aimed(step, met, after_s, lasts_s), met.value)
        self._witness.on_event = self._event
        await self._clock.sleep(weather.span_s)

    def _event(self) -> None:
        self._seen += 1
        for ready in self._left.pop(self._seen, ()):
            ready()

    async def _at(self, moment: asyncio.Event, kind: str, x: str, y: str, lasts_s: float) -> None:
        await moment.wait()
        if not self._over.is_set():
            await self._kinds[kind](x, y, lasts_s)

    async def _after(self, wait_s: float, kind: str, x: str, y: str, lasts_s: float) -> None:
        await self._clock.sleep(wait_s)
        if not self._over.is_set():
            await self._kinds[kind](x, y, lasts_s)

    async def _aimed(self, step: Step, met: Met, after_s: float, lasts_s: float) -> None:
        """Wait for a move that reaches a step, and hit who has a part in it."""
        move = await self._moves.aim(step, met)
        if move is None:
            return
        await self._clock.sleep(after_s)
        target = self._moves.target(move, met)
        if target is None or self._over.is_set():
            return
        kind = kind_of(met) or self._dice.choice(LINKS)
        if kind != "engine":
            x, y = target if self._dice.random() < 0.5 or kind not in LINKS else target[::-1]
            await self._kinds[kind](x, y, lasts_s)
            return
        home = move.source if met is Met.ENGINE_SOURCE else move.destination
        if self._nodes.kill_engine_of(home):
            self._moves.meets_engine(move, met)
            self._witness.ends(self._witness.begins("engine", home.node))

    async def end(self) -> None:
        """Mend everything."""
        self._over.set()
        self._moves.end_aims()
        for events in self._left.values():
            for ready in events:
                ready()
        while len(self._scope):
            await asyncio.wait(self._scope.tasks())

    async def _while(self, lasts_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(lasts_s):
                await self._over.wait()

    # The kinds.

    async def _crash(self, x: str, _: str, lasts_s: float) -> None:
        if x in self._taken:
            return
        self._taken.add(x)
        fault = self._witness.begins("crash", x)
        self._nodes.crash(x, silent=self._dice.random() < 0.5)
        await self._while(lasts_s)
        await self._nodes.restart(x)
        self._witness.ends(fault)
        self._taken.discard(x)

    async def _leader(self, _: str, y: str, lasts_s: float) -> None:
        leader = self._nodes.leader()
        if leader is not None:
            await self._dice.choice((self._crash, self._pause))(leader, y, lasts_s)

    async def _engine(self, x: str, _: str, lasts_s: float) -> None:
        if x not in self._taken and self._nodes.kill_engine(x, self._dice):
            self._witness.ends(self._witness.begins("engine", x))

    async def _store(self, x: str, _: str, lasts_s: float) -> None:
        if x in self._taken:
            return
        self._taken.add(x)
        fault = self._witness.begins("store", x)
        self._nodes.cut_store(x, True, loses_answers=self._dice.random() < 0.3)
        await self._while(lasts_s)
        self._nodes.cut_store(x, False, loses_answers=False)
        self._witness.ends(fault)
        self._taken.discard(x)

    async def _pause(self, x: str, _: str, lasts_s: float) -> None:
        if x in self._taken:
            return
        self._taken.add(x)
        fault = self._witness.begins("pause", x)
        self._nodes.pause(x)
        await self._while(lasts_s)
        self._nodes.go_on(x)
        self._witness.ends(fault)
        self._taken.discard(x)

    async def _leave(self, x: str, _: str, lasts_s: float) -> None:
        if x in self._taken:
            return
        self._taken.add(x)
        fault = self._witness.begins("leave", x)
        await self._nodes.leave(x)
        await self._while(lasts_s)
        await self._nodes.restart(x)
        self._witness.ends(fault)
        self._taken.discard(x)

    async def _partition(self, x: str, y: str, lasts_s: float) -> None:
        await self._parted(x, y, lasts_s, both=True)

    async def _one_way(self, x: str, y: str, lasts_s: float) -> None:
        await self._parted(x, y, lasts_s, both=False)

    async def _parted(self, x: str, y: str, lasts_s: float, *, both: bool) -> None:
        fault = self._witness.begins("partition", x, y)
        self._network.partition(x, y, both=both)
        await self._while(lasts_s)
        self._network.heal(x, y)
        self._witness.ends(fault)

    async def _delay(self, x: str, y: str, lasts_s: float) -> None:
        fault, latency_s = self._witness.begins("delay", x), self._dice.choice((0.02, 0.2, 0.6))
        self._network.set_link(x, y, latency_s=latency_s, jitter_s=latency_s * self._dice.random(), both=False)
        await self._while(lasts_s)
        self._network.set_link(x, y, latency_s=LATENCY_S, jitter_s=JITTER_S, both=False)
        self._witness.ends(fault)

    async def _cut(self, x: str, y: str, _: float) -> None:
        fault = self._witness.begins("cut", x, y)
        self._network.cut(x, y)
        self._witness.ends(fault)
