"""A simulated cluster whose clients ask while everything breaks, and that is looked at when all is mended.

A seed fixes all of it. `run_seed` gives what was found, `check_seed` raises it, and
`python -m sllm_actor.testing.cluster_simulation --seeds 0..999 [--moves N] [--nodes N]` runs many, and shows which
faults have met moving answers at which step; `--hours 24` is a day of each.
Source of the ideas: FoundationDB's simulation tests, TigerBeetle's simulator.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from math import inf
from typing import NamedTuple

import msgspec

from sllm_actor.runtime import SystemClock
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.testing.cluster_faults import ClusterFaults, draw_weather, steady_weather
from sllm_actor.testing.cluster_moves import CELLS, empty_cells, other_counts, table
from sllm_actor.testing.cluster_witness import LogWatch
from sllm_actor.testing.process_loop import ProcessLoop
from sllm_actor.testing.seed_runs import alone_with_log, broke_off, findings, heard_by
from sllm_actor.testing.simulated_cluster import (
    FAULT_EVERY_S,
    LONGEST_STREAM_S,
    MOVING,
    Plan,
    SimulatedCluster,
    hours_of,
)
from sllm_actor.testing.simulated_node import SimulatedNode
from sllm_actor.testing.virtual_loop import LIMIT_S, SimulationError, run_virtual

SETTLE_S = 8.0
# Idle instances leave, their routes with them, and what was lost on the way is told again.
REST_S = 14.0
SAMPLE_S = 0.1
# One that was stopped has heard by then who leads now; until then its epoch fences it.
HEARS_WITHIN_S = 0.05
# From so long on, faults come one by one.
LONG_S = 60.0
# Some ten times what a seed takes, and a second of a long one.
LIMIT_TURNS, LIMIT_TURNS_PER_S = 300_000, 10_000
# Of what operators wish, so much is a drain.
DRAINS = 0.15
SHOWN_LINES = 400


class Outcome(NamedTuple):
    """What one run came to. `digest` is over everything that happened; `lines` are the last of it."""

    seed: int
    plan: Plan
    problems: tuple[str, ...]
    digest: str
    counts: dict[str, int]
    lines: tuple[str, ...]


class SimulationFoundProblems(AssertionError):
    """A promise was broken."""


class Simulation:
    """One run on a virtual loop."""

    def __init__(self, seed: int, plan: Plan) -> None:
        self.cluster = SimulatedCluster(seed, plan)
        self._plan = plan
        self._numbers = 0

    async def run(self) -> None:
        """Begin, break everything, mend it, and look at what is left."""
        cluster, witness, looking = self.cluster, self.cluster.witness, TaskScope("looking")
        await cluster.start_all()
        await cluster.clock.sleep(1.0 + cluster.dice.random())
        looking.spawn(self._look_on(), "leaders")
        faults = ClusterFaults(
            cluster.network, cluster, cluster.names, witness, cluster.dice, cluster.clock, cluster.moves
        )
        span_s = self._plan.span_s
        if span_s > LONG_S:
            weather = steady_weather(span_s, FAULT_EVERY_S)
        else:
            weather = draw_weather(cluster.dice, span_s, moves=self._plan.moves > 0)
        clients = looking.spawn(self._arrivals(), "arrivals")
        operators = looking.spawn(self._wishes(), "wishes")
        await faults.run(weather)
        await faults.end()
        await asyncio.wait([clients, operators])
        await cluster.uncordon_all()
        await self._settle()
        await self._ask_everywhere()
        await cluster.clock.sleep(REST_S)
        await self._end()
        await looking.close()

    async def _look_on(self) -> None:
        deaf_s: dict[str, float] = {}
        while True:
            await self.cluster.clock.sleep(SAMPLE_S)
            # One that is stopped does nothing; and only the store can tell it, or one that is cut from there, that
            # another one leads.
            living, loop = self.cluster.living(), self.cluster.loop
            now_s = loop.now_s
            deaf_s |= {node.process: now_s for node in living if node.way.cut}
            hearing = [node for node in living if now_s - deaf_s.get(node.process, -inf) > SAMPLE_S]
            running = [node for node in hearing if not loop.is_stopped(node.process, within_s=HEARS_WITHIN_S)]
            self.cluster.witness.look_at_leaders(running)

    async def _arrivals(self) -> None:
        cluster, dice = self.cluster, self.cluster.dice
        for _ in range(self._plan.requests):
            await cluster.clock.sleep(dice.expovariate(self._plan.requests / self._plan.span_s))
            living = cluster.living()
            if living:
                self._ask(dice.choice(living), dice.choice(cluster.models).name)

    async def _wishes(self) -> None:
        """Have operators move answers and drain nodes, as often as is planned."""
        cluster, dice, moves = self.cluster, self.cluster.dice, self._plan.moves
        for _ in range(moves):
            await cluster.clock.sleep(dice.expovariate(moves / self._plan.span_s))
            living = cluster.living()
            running = [asked for asked in cluster.witness.asked if asked.taken and not asked.outcome]
            if living and dice.random() < DRAINS:
                cluster.drain(dice.choice(living))
            elif living and running:
                cluster.move(dice.choice(running), dice.choice(living), dice.choice(("", *cluster.names)))

    def _ask(self, node: SimulatedNode, model: str) -> asyncio.Task[None]:
        self._numbers += 1
        return self.cluster.ask(self._numbers, node, model, self.cluster.dice)

    async def _settle(self) -> None:
        """Wait until every stream has ended, and the nodes have found each other again."""
        until_s = self.cluster.clock.monotonic_s() + LONGEST_STREAM_S
        while any(not asked.outcome for asked in self.cluster.witness.asked):
            if self.cluster.clock.monotonic_s() > until_s:
                left = [asked.request.request_id for asked in self.cluster.witness.asked if not asked.outcome]
                self.cluster.witness.problem(f"{left} never end")
                break
            await self.cluster.clock.sleep(0.2)
        await self.cluster.clock.sleep(SETTLE_S)

    async def _ask_everywhere(self) -> None:
        """In peace, every node answers for every model."""
        cluster, first = self.cluster, len(self.cluster.witness.asked)
        if len(cluster.living()) != len(cluster.names):
            cluster.witness.problem(f"only {[node.process for node in cluster.living()]} live in the end")
        for model in cluster.models:
            tasks = [self._ask(node, model.name) for node in cluster.living()]
            await asyncio.wait(tasks)
        for asked in cluster.witness.asked[first:]:
            if asked.outcome != "finished":
                text = f"in peace, {asked.request.request_id} for {asked.request.model} at {asked.process}"
                cluster.witness.problem(f"{text} ends with {asked.outcome}")

    async def _end(self) -> None:
        cluster, witness = self.cluster, self.cluster.witness
        for node in cluster.living():
            witness.look_at_rest(node)
        if sum(node.name == cluster.leader() for node in cluster.living()) != 1:
            witness.problem("nobody leads in the end")
        routes = [fact.key for fact in (await cluster.truth.list("routes/")).facts]
        if routes:
            witness.problem(f"the store still has {routes}")
        members = [fact.key.removeprefix("nodes/") for fact in (await cluster.truth.list("nodes/")).facts]
        if sorted(members) != sorted(node.name for node in cluster.living()):
            witness.problem(f"the members are {members}")
        for node in cluster.living():
            for outcome, count in node.parts.starts.rooms.items():
                witness.counts[f"room {outcome}"] = witness.counts.get(f"room {outcome}", 0) + count
            for outcome, count in node.parts.starts.fetches.items():
                witness.counts[f"fetch {outcome}"] = witness.counts.get(f"fetch {outcome}", 0) + count
            witness.counts["preempted"] = witness.counts.get("preempted", 0) + node.parts.starts.preempted
        for name in list(cluster.nodes):
            await cluster.leave(name)
        left = (await cluster.truth.list("")).facts
        if any(not fact.key.startswith(("models/", "estimates/")) for fact in left):
            witness.problem(f"the store keeps {[fact.key for fact in left]}")
        witness.over = True
        await cluster.bury()
        await cluster.truth.close()


def run_seed(seed: int, plan: Plan = MOVING) -> Outcome:
    """Run the scenario once; whatever the seed finds is in `problems`."""
    lines: list[str] = []
    problems: list[str] = []
    turns = LIMIT_TURNS + int(plan.span_s * LIMIT_TURNS_PER_S)
    # Arrivals and wishes are drawn, and may take longer than is planned.

    async def main() -> Outcome:
        simulation = Simulation(seed, plan)
        witness, trace = simulation.cluster.witness, simulation.cluster.trace
        try:
            with heard_by(logger, LogWatch(witness, trace)):
                await simulation.run()
        finally:
            lines.extend(trace.lines())
            problems.extend(witness.problems)
        return Outcome(seed, plan, tuple(problems), trace.digest(), witness.counts, tuple(lines))

    with alone_with_log(logging.WARNING, f"in seed {seed}; {how_to_run(seed, plan)}") as logger:
        try:
            return run_virtual(lambda: main(), kind=ProcessLoop, limit_s=LIMIT_S + 2 * plan.span_s, limit_turns=turns)
        except SimulationError as error:
            return Outcome(seed, plan, (*problems, broke_off(error)), "", {}, tuple(lines))


def check_seed(seed: int, plan: Plan = MOVING) -> Outcome:
    """Run the scenario once.

    Raises:
        SimulationFoundProblems: a promise was broken; it names the seed, and how to run it again.
    """
    outcome = run_seed(seed, plan)
    if outcome.problems:
        raise SimulationFoundProblems(describe(outcome))
    return outcome


def describe(outcome: Outcome) -> str:
    """Say what a seed has found, and how to see it again."""
    return findings(outcome.seed, outcome.problems, how_to_run(outcome.seed, outcome.plan))


def how_to_run(seed: int, plan: Plan) -> str:
    """Give the command that runs a seed again."""
    given = [f"--seeds {seed}..{seed}"]
    given += [f"--moves {plan.moves}"] if plan.moves != MOVING.moves and plan.span_s <= LONG_S else []
    given += [f"--nodes {plan.nodes}"] if plan.nodes != MOVING.nodes else []
    given += [f"--hours {plan.span_s / 3600:g}"] if plan.span_s != MOVING.span_s else []
    given += [f"--down-after {plan.down_after_s:g}"] if plan.down_after_s != MOVING.down_after_s else []
    return f"again, with what happened: scripts/simulate_faults {' '.join(given)}"


def plan_of(moves: int, nodes: int, down_after_s: float, hours: float = 0.0) -> Plan:
    """Plan a run as the command line does; without moves, answers are short."""
    base = MOVING if moves else Plan()
    plan = msgspec.structs.replace(base, moves=moves, nodes=nodes, down_after_s=down_after_s)
    return hours_of(plan, hours) if hours else plan


def _seeds(text: str) -> range:
    first, _, last = text.partition("..")
    return range(int(first), int(last or first) + 1)


def main() -> None:
    """Run many seeds; exits with 1 if one found something."""
    parser = argparse.ArgumentParser(description="Run a simulated cluster with many seeds of faults.")
    parser.add_argument("--seeds", type=_seeds, default=range(100), metavar="A..B")
    parser.add_argument(
        "--moves", type=int, default=MOVING.moves, help="so often an answer is moved, or a node drained"
    )
    parser.add_argument("--nodes", type=int, default=MOVING.nodes)
    parser.add_argument("--down-after", type=float, default=MOVING.down_after_s, metavar="S")
    parser.add_argument("--hours", type=float, default=0.0, help="so long at low load, not seconds at a high one")
    given = parser.parse_args()
    plan = plan_of(given.moves, given.nodes, given.down_after, given.hours)
    clock = SystemClock()
    began_s, failed, counts = clock.monotonic_s(), 0, dict[str, int]()
    for seed in given.seeds:
        outcome = run_seed(seed, plan)
        for what, count in outcome.counts.items():
            counts[what] = counts.get(what, 0) + count
        if outcome.problems:
            failed += 1
            if len(given.seeds) == 1:
                print(*outcome.lines[-SHOWN_LINES:], sep="\n")
            print(describe(outcome), flush=True)
    took_s = clock.monotonic_s() - began_s
    print(" ".join(f"{what.replace(' ', '-')}={count}" for what, count in sorted(other_counts(counts).items())))
    if plan.moves:
        print(table(counts), f"{len(empty_cells(counts))} of {len(CELLS)} never happened", sep="\n")
    print(f"{len(given.seeds)} seeds in {took_s:.1f} s, {len(given.seeds) / took_s:.1f} seeds/s, {failed} failed")
    sys.exit(min(failed, 1))


if __name__ == "__main__":
    main()
