"""Five nodes on a bad day: real systems on virtual time, whose actors do everything there is while everything breaks.

A seed fixes all of it. `run_seed` gives what was found, `check_seed` raises it, and
`python -m sllm_actor.testing.chaos --seeds 1000 [--first N] [--jobs 2]` runs many.
Source of the ideas: FoundationDB's simulation tests, Jepsen's checkers beside the system.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import subprocess
import sys
from collections.abc import Callable
from itertools import permutations
from typing import NamedTuple

from sllm_actor.errors import SllmError
from sllm_actor.runtime import ActorRef, ActorSystem, Clock, Limits, Network, Security, Supervision, SystemClock
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.testing.chaos_actors import TABLE, Echo, Worker
from sllm_actor.testing.chaos_drivers import Driver, Plan
from sllm_actor.testing.chaos_faults import Faults, draw_weather
from sllm_actor.testing.chaos_witness import ErrorLog, Witness
from sllm_actor.testing.seed_runs import alone_with_log, broke_off, findings, heard_by
from sllm_actor.testing.simulated_network import SimulatedNetwork
from sllm_actor.testing.trace import TraceRecorder
from sllm_actor.testing.virtual_loop import SimulationError, VirtualLoop, run_virtual

NODES = ["a", "b", "c", "d", "e"]
PORT = 7000
KIB = 1024
# Small, so that bounds are met; and quick, so that little happens beside what is looked at.
LIMITS = Limits(
    mailbox_messages=128, control_messages=16, stream_credit=8, stream_window_bytes=64 * KIB,
    link_buffer_bytes=128 * KIB, link_blob_bytes=512 * KIB, handshake_timeout_s=1.0, heartbeat_s=1.0,
    acceptable_pause_s=1.0, redial_first_s=0.05, redial_last_s=0.4, down_after_s=4.0,
)  # fmt: skip
RESTARTS = Supervision(restarts=1000, window_s=1.0)
SPAN_S = 5.0
# Deadlines are swept this late at most, a rounding apart.
SLACK_S = 0.003
SAMPLE_S = 0.25
SETTLE_S = 20.0
MEET_AGAIN_S = 8.0
QUIET_S = 0.5
# More than the bound itself may wait: the letter that exceeded it, and a parcel that began when nothing waited.
WAITING_SLACK_BYTES = 512 * KIB
SECRET = b"the secret of a simulated cluster"


class ChaosFailed(AssertionError):
    """A promise was broken."""


class Outcome(NamedTuple):
    """What one run came to. `digest` is over everything that happened."""

    seed: int
    problems: tuple[str, ...]
    digest: str
    counts: dict[str, int]


class Cluster:
    """The nodes of one run, each with a worker and a driver; what has ended is kept, to be looked at."""

    def __init__(
        self, witness: Witness, clock: Clock, dice: random.Random, plan: Plan, network: Callable[[str], Network]
    ) -> None:
        self.systems: dict[str, ActorSystem] = {}
        self.drivers: dict[str, Driver] = {}
        self.addresses: dict[str, str] = {}
        self._witness = witness
        self._clock = clock
        self._dice = dice
        self._plan = plan
        self._network = network

    async def start(self, name: str, endpoint: str) -> None:
        """Begin a node, or another incarnation of it."""
        witness = self._witness
        system = ActorSystem(
            node_id=name, messages=TABLE, security=Security(secret=SECRET), limits=LIMITS, clock=self._clock,
            network=self._network(name), randomness=self._dice.randbytes, on_escalation=self._escalated,
        )  # fmt: skip
        witness.systems[system.address.uid] = system
        driver = Driver(witness, self._dice, self._plan)
        await system.spawn(lambda: Worker(witness), "worker", supervision=RESTARTS)
        await system.spawn(driver, "driver")
        self.addresses[name] = await system.listen(endpoint)
        self.systems[name], self.drivers[name] = system, driver

    def _escalated(self, ref: ActorRef, failure: BaseException) -> None:
        self._witness.problem(f"{ref!r} escalates {failure!r}")

    def drive(self, name: str) -> None:
        """Let a node's driver begin."""
        self.drivers[name].begin({other: address for other, address in self.addresses.items() if other != name})

    def look(self) -> None:
        """Check what is bounded."""
        for name, system in self.systems.items():
            seen = system.stats()
            for actor in seen.actors:
                if actor.mailbox_depth > LIMITS.mailbox_messages + LIMITS.control_messages:
                    self._witness.problem(f"{actor.mailbox_depth} messages wait for {actor.name} at {name}")
            for link in seen.links:
                if link.waiting_bytes > LIMITS.link_buffer_bytes + LIMITS.link_blob_bytes + WAITING_SLACK_BYTES:
                    self._witness.problem(f"{link.waiting_bytes} bytes wait at {name} for {link.node}")

    async def settle(self) -> None:
        """Wait until every driver has done what it wanted; each call has an end by then."""
        end_s = self._clock.monotonic_s() + SETTLE_S
        while any(driver.tasks_left for driver in self.drivers.values()):
            if self._clock.monotonic_s() > end_s:
                for driver in self.drivers.values():
                    names = [task.get_name() for task in driver.context.tasks.tasks()]
                    if names:
                        self._witness.problem(f"still running after {SETTLE_S:g} s of peace: {', '.join(names)}")
                return
            await self._clock.sleep(SAMPLE_S / 2)
            self.look()

    async def meet_again(self) -> None:
        """Every two nodes can ask each other again, unless one has declared the other down."""
        pairs = list(permutations(self.systems, 2))
        await asyncio.gather(*(self._meets(self.systems[x], y) for x, y in pairs))

    async def _meets(self, system: ActorSystem, other: str) -> None:
        end_s = self._clock.monotonic_s() + MEET_AGAIN_S
        ref = system.ref("worker", at=self.addresses[other])
        error: SllmError | None = None
        while self._clock.monotonic_s() < end_s:
            there = self.systems[other]
            if declared_down(system, there) or declared_down(there, system):
                return
            try:
                await ref.ask(Echo(token=1), timeout_s=2.0)
                return
            except SllmError as failure:
                error = failure
            await self._clock.sleep(SAMPLE_S)
        self._witness.problem(f"{system.address.node} can't ask {other} again: {error!r}")

    async def quiet(self) -> None:
        """Once nobody wants anything any more, nothing is left of it."""
        # What ended last is still to be heard of; and who was declared down finds out by waiting in vain.
        pairs = permutations(self.systems.values(), 2)
        declared = any(declared_down(here, there) for here, there in pairs)
        await self._clock.sleep(QUIET_S + (LIMITS.down_after_s if declared else 0.0))
        for driver in self.drivers.values():
            driver.stop_watching()
        left: list[str] = []
        end_s = self._clock.monotonic_s() + QUIET_S
        while self._clock.monotonic_s() < end_s:
            await self._clock.sleep(SAMPLE_S / 2)
            left = self._left()
            if not left:
                return
        for line in left:
            self._witness.problem(f"in quiet, {line}")

    def _left(self) -> list[str]:
        left = []
        for name, system in self.systems.items():
            seen = system.stats()
            counts = {"holding handlers": self._witness.holding.get(system.address.uid, 0)}
            for actor in seen.actors:
                counts[f"messages for {actor.name}"] = actor.mailbox_depth
            for link in seen.links:
                counts[f"asks of {link.node}"] = link.waiting_asks
                counts[f"calls for {link.node}"] = link.running_calls
                counts[f"bytes for {link.node}"] = link.waiting_bytes
            left += [f"{name} has {count} {what}" for what, count in counts.items() if count]
        return left

    async def end(self) -> None:
        """Look at what is left once there is peace, and close everything."""
        await self.meet_again()
        await self.quiet()
        self._witness.review()
        await asyncio.gather(*(self.close(name) for name in list(self.systems)))

    async def close(self, name: str, *, drain_s: float = 0.0) -> None:
        """Close a node and take it from the living."""
        system = self.systems.pop(name)
        del self.drivers[name]
        self._witness.gone[system.address.uid] = None
        await system.close(drain_s=drain_s)
        if system.names() or len(system.tasks):
            self._witness.problem(f"{name} leaves {system.names()} and {len(system.tasks)} tasks behind")


def declared_down(here: ActorSystem, there: ActorSystem) -> bool:
    """Tell whether a system has declared the incarnation that another is down."""
    return here._remotes.peer(there.address).is_down(there.address.uid)


class Simulation:
    """One run on a virtual loop."""

    def __init__(self, seed: int, plan: Plan) -> None:
        loop = VirtualLoop.running()
        self.trace = TraceRecorder(loop.clock)
        self.witness = Witness(loop.clock, self.trace, slack_s=SLACK_S, stream_credit=LIMITS.stream_credit)
        self._loop = loop
        self._dice = random.Random(seed)
        self._network = SimulatedNetwork(loop, self._dice, self.trace)
        self._cluster = Cluster(self.witness, loop.clock, self._dice, plan, self._network.host)
        self._faults = Faults(self._network, self, NODES, self._dice, loop.clock)
        self.witness.may_be_down = self._may_be_down

    def _may_be_down(self, watcher: int, watched: int) -> bool:
        here, there = self.witness.systems[watcher], self.witness.systems[watched]
        nodes = here.address.node, there.address.node
        return declared_down(there, here) or self._faults.may_be_down(*nodes, LIMITS.down_after_s)

    # What faults do to nodes.

    async def kill(self, name: str, *, silent: bool) -> None:
        self._network.kill(name, silent=silent)
        await self._cluster.close(name)

    async def leave(self, name: str) -> None:
        await self._cluster.close(name, drain_s=self._dice.choice((0.0, 0.2)))

    async def start(self, name: str) -> None:
        await self._cluster.start(name, f"tcp://{name}:{PORT}")
        self._cluster.drive(name)

    async def run(self) -> None:
        """Begin, break everything, mend it, and look at what is left."""
        cluster, sampling = self._cluster, TaskScope("sampling")
        for name in NODES:
            await cluster.start(name, f"tcp://{name}:{PORT}")
        for name in NODES:
            cluster.drive(name)
        sampling.spawn(self._look_on(), "look")
        await self._faults.run(draw_weather(self._dice, SPAN_S, LIMITS.down_after_s))
        await self._faults.end()
        await cluster.settle()
        await sampling.close()
        await cluster.end()
        left = [task.get_name() for task in self._loop.pending_tasks() if task is not asyncio.current_task()]
        if left:
            self.witness.problem(f"tasks are left: {left}")

    async def _look_on(self) -> None:
        while True:
            await self._loop.clock.sleep(SAMPLE_S)
            self._cluster.look()


def run_seed(seed: int, plan: Plan | None = None) -> Outcome:
    """Run the scenario once; whatever the seed finds is in `problems`."""

    async def main() -> Outcome:
        simulation = Simulation(seed, plan or Plan())
        witness, trace = simulation.witness, simulation.trace
        with heard_by(logger, ErrorLog(witness)):
            await simulation.run()
        return Outcome(seed, tuple(witness.problems), trace.digest(), witness.counts)

    with alone_with_log(logging.ERROR, f"in seed {seed}; {how_to_run(seed)}") as logger:
        try:
            return run_virtual(main)
        except SimulationError as error:
            return Outcome(seed, (broke_off(error),), "", {})


def check_seed(seed: int) -> Outcome:
    """Run the scenario once.

    Raises:
        ChaosFailed: a promise was broken; it names the seed, and how to run it again.
    """
    outcome = run_seed(seed)
    if outcome.problems:
        raise ChaosFailed(describe(outcome))
    return outcome


def describe(outcome: Outcome) -> str:
    """Say what a seed has found, and how to see it again."""
    return findings(outcome.seed, outcome.problems, how_to_run(outcome.seed))


def how_to_run(seed: int) -> str:
    """Give the command that runs a seed again."""
    return f"again: scripts/chaos --first {seed} --seeds 1"


def run_many(first: int, seeds: int, stride: int = 1) -> int:
    """Run seeds, and print those that found something; give how many did."""
    failed = 0
    for seed in range(first, first + seeds, stride):
        outcome = run_seed(seed)
        if outcome.problems:
            failed += 1
            print(describe(outcome), flush=True)
    return failed


def main() -> None:
    """Run many seeds in several processes; exits with 1 if one found something."""
    parser = argparse.ArgumentParser(description="Run the chaos scenario with many seeds.")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--stride", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stride:
        sys.exit(min(run_many(given.first, given.seeds, given.stride), 1))
    clock = SystemClock()
    began_s = clock.monotonic_s()
    jobs = max(1, min(given.jobs, given.seeds))
    command = [sys.executable, "-m", "sllm_actor.testing.chaos", "--stride", str(jobs)]
    runs = [
        subprocess.Popen([*command, "--first", str(given.first + job), "--seeds", str(given.seeds - job)])
        for job in range(jobs)
    ]
    codes = [run.wait() for run in runs]
    failed = any(codes)
    took_s = clock.monotonic_s() - began_s
    print(f"{given.seeds} seeds in {took_s:.1f} s, {given.seeds / took_s:.1f} seeds/s: {'FAILED' if failed else 'ok'}")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
