"""One system in one world, asked as a workload says, on virtual time: what each request met.

Router, Scheduler, ModelManager, workers and their policies are the production classes. The same seed gives the same
run.
"""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple, cast

import msgspec

from sllm_actor.domain import RequestId, Sampling, Timeline
from sllm_actor.domain.tokens import pack_uint32
from sllm_actor.errors import DeadlineExceeded, SllmError
from sllm_actor.loader.libc import gather_heap
from sllm_actor.messages.explanation import Explanation
from sllm_actor.messages.generation import Generate, Tokens
from sllm_actor.metadata import Put, StoreLimits
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.testing.oracle import MeanWaits, mean_waits_s
from sllm_actor.testing.process_loop import ProcessLoop
from sllm_actor.testing.simulated_network import SimulatedNetwork
from sllm_actor.testing.simulated_node import SimulatedNode, registered
from sllm_actor.testing.simulated_store import MemoryStore
from sllm_actor.testing.start_times import StartTimes, start_times
from sllm_actor.testing.trace import NoTrace
from sllm_actor.testing.virtual_loop import VirtualLoop, run_virtual
from sllm_actor.testing.waits import Parts, parts_of
from sllm_actor.testing.workloads import Arrival
from sllm_actor.testing.world import REPORT_EVERY_S, World

LIMIT_TURNS = 2**62
# The cluster finds itself before it is asked: who leads has heard of every node.
SETTLE_S = 1.5 * REPORT_EVERY_S
WARM, JOINED = "running", "another's start"
# Where many are asked, their cluster's memory is gathered at first, and again after so many.
GATHER_EVERY = 100_000
FEW = 5_000


class Seen(NamedTuple):
    """What one request met: its times in seconds from the beginning, and by which tier its model came.

    `error` is empty where it was answered; else the times that never came are 0. Its wait was made of `parts`.
    """

    arrived_s: float
    model: int
    first_token_s: float
    end_s: float
    tier: str
    node: str
    error: str
    parts: Parts = Parts()

    @property
    def wait_s(self) -> float:
        """From its arrival to its first token."""
        return self.first_token_s - self.arrived_s


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One run: what every request met, and what the devices did. `span_s` is from the first arrival to the last end.

    `references` are what its waits are compared with. Of starts the last count that the Scheduler remembers (10,000).
    """

    seen: tuple[Seen, ...]
    span_s: float
    devices: int
    held_s: float
    busy_s: float
    starts: int
    migrations: int
    references: MeanWaits
    start_times: StartTimes

    def waits_s(self) -> list[float]:
        """Give what those waited who were answered, shortest first."""
        return sorted(one.wait_s for one in self.seen if not one.error)

    def times_s(self) -> list[float]:
        """Give how long those took, from arrival to end, shortest first."""
        return sorted(one.end_s - one.arrived_s for one in self.seen if not one.error)

    def tiers(self) -> Counter[str]:
        """Count by which tier their models came."""
        return Counter(one.tier for one in self.seen if not one.error)

    def errors(self) -> Counter[str]:
        """Count what went wrong."""
        return Counter(one.error for one in self.seen if one.error)

    def parts(self) -> dict[str, float]:
        """Give what the mean wait was made of: the mean seconds of each part."""
        answered = [one.parts for one in self.seen if not one.error]
        means = map(statistics.fmean, zip(*answered, strict=True)) if answered else [float("nan")] * len(Parts._fields)
        return {f"wait_{name}": mean_s for name, mean_s in zip(Parts._fields, means, strict=True)}

    def summary(self) -> dict[str, Any]:
        """Give what a table shows."""
        waits, times = self.waits_s() or [float("nan")], self.times_s() or [float("nan")]
        whole_s = max(self.span_s * self.devices, 1e-9)
        tiers = self.tiers()
        answered = max(1, sum(tiers.values()))
        return {
            "requests": len(self.seen),
            "failed": sum(self.errors().values()),
            "wait_mean_s": statistics.fmean(waits),
            "over_least": over(statistics.fmean(waits), self.references.least_s),
            "over_first_come": over(statistics.fmean(waits), self.references.first_come_s),
            "over_on_demand": over(statistics.fmean(waits), self.references.on_demand_s),
            "wait_p50_s": part(waits, 0.5),
            "wait_p95_s": part(waits, 0.95),
            "wait_p99_s": part(waits, 0.99),
            **self.parts(),
            "end_mean_s": statistics.fmean(times),
            "end_p99_s": part(times, 0.99),
            "warm": tiers[WARM] / answered,
            "starts": self.starts,
            "start_mean_s": self.start_times.mean_s,
            "start_over_least": over(self.start_times.mean_s, self.start_times.least_mean_s),
            "migrations": self.migrations,
            "devices_held": self.held_s / whole_s,
            "devices_busy": self.busy_s / whole_s,
        }


def over(mean_s: float, reference_s: float) -> float:
    """Give how many times the one is the other; no number where nothing was asked."""
    return mean_s / reference_s if reference_s else float("nan")


def part(ordered: Sequence[float], share: float) -> float:
    """Give the value below which so much of them is."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


OnAnswered = Callable[[int], None]


def evaluate(world: World, arrivals: Sequence[Arrival], seed: int, on_answered: OnAnswered = lambda _: None) -> Run:
    """Run it. `on_answered` is told how many requests have ended.

    Raises:
        SimulationError: the cluster itself does what none may.
    """
    span_s = arrivals[-1].at_s if arrivals else 0.0
    limit_s = span_s + 10 * world.description.timeout_s + 3600.0

    async def main() -> Run:
        return await _Evaluation(world, arrivals, seed, on_answered).run()

    return run_virtual(main, kind=ProcessLoop, limit_s=limit_s, limit_turns=LIMIT_TURNS)


class _Evaluation:
    def __init__(self, world: World, arrivals: Sequence[Arrival], seed: int, on_answered: OnAnswered) -> None:
        self._world = world
        self._arrivals = arrivals
        self._on_answered = on_answered
        self._loop = cast(ProcessLoop, VirtualLoop.running())
        self._clock = self._loop.clock
        self._dice = random.Random(seed)
        self._truth = MemoryStore(self._clock)
        self._nodes: list[SimulatedNode] = []
        self._problems: list[str] = []
        self._seen: list[Seen] = []
        # What all prompts go on with, each as far as it is long.
        self._prompt = pack_uint32(range(1, max((arrival.prompt_tokens for arrival in arrivals), default=1)))
        self._begin_s = 0.0

    async def run(self) -> Run:
        facts, at_once = registered(self._world.models), StoreLimits().commit_operations
        for begin in range(0, len(facts), at_once):
            await self._truth.commit([], [Put(key, value) for key, value in facts[begin : begin + at_once]])
        network = SimulatedNetwork(self._loop, self._dice, NoTrace(self._clock), torn=False)
        for name in self._world.names:
            self._nodes.append(self._node(name, network))
        starting = TaskScope("start")
        for node in self._nodes:
            starting.spawn(node.start(), node.name, context=node.context.copy())
        await asyncio.gather(*starting.tasks())
        await self._clock.sleep(SETTLE_S)
        # What was made so far is old: the search for cycles at the end is to go through what comes from now on.
        gc.freeze()
        gc.unfreeze()
        self._begin_s = self._clock.monotonic_s()
        await self._ask_all()
        span_s = self._clock.monotonic_s() - self._begin_s
        run = self._run(span_s)
        assert not self._problems, self._problems[:3]
        closing = TaskScope("close")
        for node in self._nodes:
            closing.spawn(node.close(), node.name, context=node.context.copy())
        await asyncio.gather(*closing.tasks())
        await self._truth.close()
        return run

    def _node(self, name: str, network: SimulatedNetwork) -> SimulatedNode:
        return SimulatedNode(
            name, 1, truth=self._truth, cards=self._world.cards, stored=self._world.stored(name), clock=self._clock,
            network=network.host(name), dice=self._dice, problem=self._problems.append,
            moves=lambda *_: None, means=self._world.means(),
        )  # fmt: skip

    async def _ask_all(self) -> None:
        clients, gathers = TaskScope("clients"), len(self._arrivals) > FEW
        gateways = self._nodes[: len(self._world.gateways)]
        for number, arrival in enumerate(self._arrivals):
            if gathers and number % GATHER_EVERY == 0:
                gather_heap()
            await self._clock.sleep(max(0.0, self._begin_s + arrival.at_s - self._clock.monotonic_s()))
            node = self._dice.choice(gateways)
            clients.spawn(self._client(number, arrival, node), f"client-{number}", context=node.context.copy())
        if tasks := clients.tasks():
            await asyncio.wait(tasks)

    async def _client(self, number: int, arrival: Arrival, node: SimulatedNode) -> None:
        request_id = RequestId(f"r{number}")
        begin_s, first_s, error = self._now_s(), 0.0, ""
        arrived_s = self._clock.monotonic_s()
        await node.accept()
        request = Generate(
            request_id=request_id,
            model=self._world.models[arrival.model].name,
            # Prompts that begin differently, so that none is computed already.
            prompt=pack_uint32([number]) + self._prompt[: 4 * max(0, arrival.prompt_tokens - 1)],
            sampling=Sampling(max_tokens=arrival.new_tokens, temperature=1.0, top_p=1.0, seed=number, ignore_eos=True),
            arrived_s=arrived_s,
        )
        try:
            async with (
                asyncio.timeout(self._world.description.timeout_s) as limit,
                aclosing(node.router.stream(request)) as items,
            ):
                async for item in items:
                    if isinstance(item, Tokens) and not first_s:
                        first_s = self._now_s()
                        limit.reschedule(None)
        except SllmError as failure:
            error = failure.code
        except TimeoutError:
            error = DeadlineExceeded.code
        timeline: Timeline = node.actor("router")._log.timeline(request_id)
        tiers = [span.tier for span in timeline.spans if span.name == "load"]
        tier = (tiers[-1] if tiers else JOINED) if timeline.cold else WARM
        parts = Parts()
        if first_s:
            parts = parts_of(timeline, begin_s + self._begin_s, first_s + self._begin_s)
        self._seen.append(Seen(begin_s, arrival.model, first_s, self._now_s(), tier, timeline.node, error, parts))
        self._on_answered(len(self._seen))

    def _now_s(self) -> float:
        return self._clock.monotonic_s() - self._begin_s

    def _run(self, span_s: float) -> Run:
        engines = [process for node in self._nodes for process in node.processes if process.attached_s]
        now_s = self._clock.monotonic_s()
        each = self._world.devices_each
        return Run(
            seen=tuple(sorted(self._seen)),
            span_s=span_s,
            devices=len(self._nodes) * self._world.machine.devices,
            held_s=sum((process.ended_s or now_s) - process.mapped_s for process in engines) * each,
            busy_s=sum(process.busy_s for process in engines) * each,
            starts=len(engines),
            references=mean_waits_s(self._world, self._arrivals),
            start_times=start_times(self._decisions(), self._world),
            migrations=sum(node.parts.migrations.observe()["outcomes"]["moved"] for node in self._nodes),
        )

    def _decisions(self) -> Iterator[Explanation]:
        """Give those that the Scheduler remembers of starts that requests have begun, not it itself."""
        requests = {f"r{number}" for number in range(len(self._arrivals))}
        schedulers = [
            node.actor(name) for node in self._nodes for name in node.system.cells if name.startswith("scheduler-")
        ]
        for scheduler in schedulers:
            yield from (one for one in scheduler._decisions if one.request_id in requests)
