"""The ground a simulated network stands on: hosts, and how bytes get from one to another.

Values and small state only; the bytes themselves are in `simulated_pipe`, the faults in `simulated_network`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextvars import Context
from enum import Enum
from math import inf
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sllm_actor.testing.simulated_network import SimulatedListener
    from sllm_actor.testing.simulated_transport import SimulatedTransport
    from sllm_actor.testing.virtual_loop import VirtualLoop

LATENCY_S = 0.000_2
JITTER_S = 0.000_1
# A lost segment is sent again after this time, and again after twice as long.
RETRANSMIT_S = 0.2
MAX_LOSSES = 6
FIRST_PORT = 40_000


class Link:
    """The way from one host to another, one direction. All connections between the two share its bandwidth."""

    __slots__ = (
        "bandwidth_bytes_per_s",
        "blocked_since_s",
        "free_s",
        "jitter_s",
        "latency_s",
        "loss",
        "source",
        "target",
    )

    def __init__(self, source: str, target: str) -> None:
        self.source = source
        self.target = target
        self.latency_s = LATENCY_S
        self.jitter_s = JITTER_S
        self.bandwidth_bytes_per_s = inf
        self.loss = 0.0
        # What would arrive later than this is held back by a partition.
        self.blocked_since_s = inf
        # When the last byte that was sent has left.
        self.free_s = 0.0

    @property
    def blocked(self) -> bool:
        return self.blocked_since_s < inf

    def delay_s(self, dice: random.Random) -> float:
        """Draw how long a segment takes, beside the time that its length costs."""
        delay_s = self.latency_s + self.jitter_s * dice.random()
        if self.loss:
            again_s = RETRANSMIT_S
            for _ in range(MAX_LOSSES):
                if dice.random() >= self.loss:
                    break
                delay_s += again_s
                again_s *= 2
        return delay_s


class Power(Enum):
    """Who answers at a host's address."""

    UP = "up"
    NO_PROCESS = "no process"
    """The machine refuses and resets what comes."""
    DARK = "dark"
    """Nobody does."""


class Host:
    """A machine with one process. Each time it is revived it is another incarnation; the old ones are not heard of."""

    def __init__(self, name: str, loop: VirtualLoop) -> None:
        self.name = name
        self.power = Power.UP
        self.incarnation = 0
        self.frozen = False
        self.read_bytes_per_s = inf
        self.read_free_s = 0.0
        self.listeners: dict[int, SimulatedListener] = {}
        # The ends of connections that are here, in the order in which they were made.
        self.ends: dict[SimulatedTransport, None] = {}
        self._loop = loop
        self._next_port = FIRST_PORT
        self._deferred: list[tuple[Context, Callable[..., None], tuple[Any, ...]]] = []
        self._sleepers: list[asyncio.Future[None]] = []

    def free_port(self) -> int:
        """Give a port that nobody listens at: the same one in each run."""
        while self._next_port in self.listeners:
            self._next_port += 1
        self._next_port += 1
        return self._next_port - 1

    def call_soon(self, context: Context, callback: Callable[..., None], *arguments: Any) -> None:
        """Have this host's process called in the next turn, or when it is thawed."""
        if self.frozen:
            self._deferred.append((context, callback, arguments))
        else:
            self._loop.call_soon(callback, *arguments, context=context)

    async def awake(self, incarnation: int) -> None:
        """Return when the process runs; never, if it has died since."""
        while self.frozen or self.incarnation != incarnation:
            sleeper: asyncio.Future[None] = self._loop.create_future()
            self._sleepers.append(sleeper)
            await sleeper

    def thaw(self) -> None:
        """Do what was put off, in its order."""
        self.frozen = False
        deferred, self._deferred = self._deferred, []
        for context, callback, arguments in deferred:
            self._loop.call_soon(callback, *arguments, context=context)
        sleepers, self._sleepers = self._sleepers, []
        for sleeper in sleepers:
            if not sleeper.done():
                sleeper.set_result(None)

    def end_process(self, power: Power) -> None:
        """Forget the process, and what it was to be told. What sleeps in `awake` stays there."""
        self.power = power
        self.incarnation += 1
        self.frozen = False
        self._deferred.clear()
        self.listeners.clear()
        self.ends.clear()
