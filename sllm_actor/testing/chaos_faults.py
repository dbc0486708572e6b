"""What goes wrong in the chaos scenario, and when: drawn from a seed, and remembered, to judge by it what was heard."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import combinations
from math import inf
from typing import Protocol

import msgspec

from sllm_actor.runtime.clock import Clock
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.testing.simulated_link import JITTER_S, LATENCY_S
from sllm_actor.testing.simulated_network import SimulatedNetwork

# What fits between two faults of a pair and does not suffice to connect: an attempt given up, a pause, and another.
RECONNECT_S = 2.5


class Weather(msgspec.Struct, frozen=True, kw_only=True):
    """How bad it is: so many faults within `span_s`, of the kinds that are weighted; the longest last `long_s`."""

    faults: int
    span_s: float
    long_s: float
    weights: dict[str, int]


WEIGHTS = {
    "cut": 4, "half_open": 2, "partition": 4, "one_way": 4, "freeze": 3, "slow_reader": 2, "latency": 2, "loss": 2,
    "kill": 2, "leave": 1,
}  # fmt: skip


def draw_weather(dice: random.Random, span_s: float, down_after_s: float) -> Weather:
    """Draw how bad it will be: one seed in eight has no faults at all, and some have one kind only."""
    faults = dice.choice((0, 2, 4, 6, 6, 8, 8, 12))
    weights = WEIGHTS if dice.random() < 0.7 else {dice.choice(list(WEIGHTS)): 1}
    return Weather(faults=faults, span_s=span_s, long_s=down_after_s + 2 * RECONNECT_S, weights=weights)


class Nodes(Protocol):
    """What the faults do to nodes, beside to their network."""

    async def kill(self, name: str, *, silent: bool) -> None:
        """End the node's process without a word."""

    async def leave(self, name: str) -> None:
        """Close the node, and say goodbye."""

    async def start(self, name: str) -> None:
        """Begin another incarnation."""


class Faults:
    """Breaks a simulated network by the dice, and mends it."""

    def __init__(
        self,
        network: SimulatedNetwork,
        nodes: Nodes,
        names: list[str],
        dice: random.Random,
        clock: Clock,
    ) -> None:
        self._network = network
        self._nodes = nodes
        self._names = names
        self._dice = dice
        self._clock = clock
        self._scope = TaskScope("faults")
        self._over = asyncio.Event()
        # For each two hosts, from when to when something was between them.
        self._hindered: dict[tuple[str, str], list[list[float]]] = {pair: [] for pair in combinations(names, 2)}
        # Hosts that are being broken or mended as a whole: one thing at a time.
        self._taken: dict[str, None] = {}
        self._kinds: dict[str, Callable[[str, str, float], Awaitable[None]]] = {
            "cut": self._cut,
            "half_open": self._half_open,
            "partition": self._partition,
            "one_way": self._one_way,
            "freeze": self._freeze,
            "slow_reader": self._slow_reader,
            "latency": self._latency,
            "loss": self._loss,
            "kill": self._kill,
            "leave": self._leave,
        }

    async def run(self, weather: Weather) -> None:
        """Break things until the span is over; what lasts longer is mended by `end`."""
        kinds, weights = list(weather.weights), list(weather.weights.values())
        begins_s = sorted(self._dice.random() * weather.span_s for _ in range(weather.faults))
        now_s = 0.0
        for begin_s in begins_s:
            await self._clock.sleep(begin_s - now_s)
            now_s = begin_s
            kind = self._dice.choices(kinds, weights)[0]
            x, y = self._dice.sample(self._names, 2)
            self._scope.spawn(self._one(kind, x, y, weather), kind)
        await self._clock.sleep(weather.span_s - now_s)

    async def _one(self, kind: str, x: str, y: str, weather: Weather) -> None:
        await self._kinds[kind](x, y, self._dice.choice((0.05, 0.3, 1.0, 2.0, weather.long_s)))

    async def end(self) -> None:
        """Mend everything."""
        self._over.set()
        while len(self._scope):
            await asyncio.wait(self._scope.tasks())

    def may_be_down(self, x: str, y: str, down_after_s: float) -> bool:
        """Tell whether two hosts had no chance to meet for the last `down_after_s` seconds."""
        now_s = self._clock.monotonic_s()
        free_s = now_s - down_after_s
        for begin_s, end_s in sorted(self._hindered[min(x, y), max(x, y)]):
            if end_s <= free_s:
                continue
            if begin_s - free_s > RECONNECT_S:
                return False
            free_s = end_s
        return now_s - free_s <= RECONNECT_S

    async def _while(self, pairs: list[tuple[str, str]], duration_s: float) -> None:
        """Note that something is between these hosts for a while."""
        now_s = self._clock.monotonic_s()
        notes = [[now_s, inf] for _ in pairs]
        for (x, y), note in zip(pairs, notes, strict=True):
            self._hindered[min(x, y), max(x, y)].append(note)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(duration_s):
                    await self._over.wait()
        finally:
            for note in notes:
                note[1] = self._clock.monotonic_s()

    def _around(self, x: str) -> list[tuple[str, str]]:
        return [(x, other) for other in self._names if other != x]

    # The kinds.

    async def _cut(self, x: str, y: str, _: float) -> None:
        self._network.cut(x, y)

    async def _half_open(self, x: str, y: str, _: float) -> None:
        self._network.half_open(x, y, resets=self._dice.random() < 0.5)

    async def _partition(self, x: str, y: str, duration_s: float) -> None:
        await self._parted(x, y, duration_s, both=True)

    async def _one_way(self, x: str, y: str, duration_s: float) -> None:
        await self._parted(x, y, duration_s, both=False)

    async def _parted(self, x: str, y: str, duration_s: float, *, both: bool) -> None:
        self._network.partition(x, y, both=both)
        await self._while([(x, y)], duration_s)
        self._network.heal(x, y)

    async def _freeze(self, x: str, _: str, duration_s: float) -> None:
        if x in self._taken:
            return
        self._taken[x] = None
        self._network.freeze(x)
        await self._while(self._around(x), duration_s)
        self._network.thaw(x)
        del self._taken[x]

    async def _slow_reader(self, x: str, _: str, duration_s: float) -> None:
        self._network.slow_reader(x, self._dice.choice((2_000, 50_000, 1_000_000)))
        await self._while(self._around(x), duration_s)
        self._network.slow_reader(x, inf)

    async def _latency(self, x: str, y: str, duration_s: float) -> None:
        latency_s = self._dice.choice((0.01, 0.1, 0.4))
        self._network.set_link(x, y, latency_s=latency_s, jitter_s=latency_s * self._dice.random(), both=False)
        await self._while([(x, y)], duration_s)
        self._network.set_link(x, y, latency_s=LATENCY_S, jitter_s=JITTER_S, both=False)

    async def _loss(self, x: str, y: str, duration_s: float) -> None:
        self._network.set_link(x, y, loss=self._dice.choice((0.05, 0.3)))
        await self._while([(x, y)], duration_s)
        self._network.set_link(x, y, loss=0.0)

    async def _kill(self, x: str, _: str, duration_s: float) -> None:
        if x in self._taken:
            return
        self._taken[x] = None
        await self._nodes.kill(x, silent=self._dice.random() < 0.5)
        await self._while(self._around(x), duration_s)
        self._network.revive(x)
        await self._nodes.start(x)
        del self._taken[x]

    async def _leave(self, x: str, _: str, duration_s: float) -> None:
        if x in self._taken:
            return
        self._taken[x] = None
        await self._nodes.leave(x)
        await self._while(self._around(x), duration_s)
        await self._nodes.start(x)
        del self._taken[x]
