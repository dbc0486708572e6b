"""A cluster of production actors on virtual time: its nodes, in whichever life they are, and its clients."""

from __future__ import annotations

import asyncio
import math
import random
from contextlib import aclosing
from functools import partial
from typing import cast

import msgspec

from sllm_actor.actors.node_keeper import NODE_KEEPER
from sllm_actor.domain import ModelName, NodeId, RequestId, Sampling
from sllm_actor.domain.tokens import pack_uint32
from sllm_actor.errors import SllmError
from sllm_actor.messages.generation import Generate
from sllm_actor.messages.migration import MigrateRequest
from sllm_actor.messages.operations import CordonNode, DrainNode
from sllm_actor.metadata import Put
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.testing.cluster_moves import MoveWatch
from sllm_actor.testing.cluster_witness import Asked, Witness
from sllm_actor.testing.process_loop import ProcessLoop
from sllm_actor.testing.simulated_network import SimulatedNetwork
from sllm_actor.testing.simulated_node import LIMITS, MIB, Home, Means, SimulatedNode, config_of, model_of, registered
from sllm_actor.testing.simulated_store import MemoryStore
from sllm_actor.testing.simulated_tiers import SimulatedCard
from sllm_actor.testing.trace import TraceRecorder
from sllm_actor.testing.virtual_loop import VirtualLoop

KEEP_ALIVE_S = 2.0
# Every stream ends within this time, whatever breaks.
LONGEST_STREAM_S = 90.0
# A node that could not start is started again after this time; a lease that ends in vain takes longer.
RESTART_S = 0.5
MEND_S = 60.0


# Of answers that are to be moved, so many are long, and the long ones so long at least.
LONG_ONES = 0.6
LONG_TOKENS = 50
MOVE_TIMEOUT_S = 30.0
DRAIN_TIMEOUT_S = 20.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much is asked of how many nodes, which give each other up for good after `down_after_s` without a link.

    Requests draw their priority where there are several. What no disk has comes at `remote_bytes_per_s`,
    before a device where that takes longer than `bytes_first_s`. So many times
    (`moves`) an operator has an answer moved, or a node drained; then some answers are long. All of that, and the
    faults, are spread over `span_s`.
    """

    nodes: int = 3
    models: int = 3
    requests: int = 14
    max_tokens: int = 30
    down_after_s: float = 30.0
    moves: int = 0
    slots: int = 2
    placement_policy: str = "startup_time"
    priorities: tuple[int, ...] = ()
    span_s: float = 8.0
    remote_bytes_per_s: float = 100e6
    bytes_first_s: float = 3.0


MOVING = Plan(moves=12, max_tokens=150)
# Of a long time: a request a minute, a move or a drain every five, and a fault every two minutes.
REQUEST_EVERY_S, MOVE_EVERY_S, FAULT_EVERY_S = 60.0, 300.0, 120.0


def hours_of(plan: Plan, hours: float) -> Plan:
    """Plan as much time, at low load."""
    span_s = hours * 3600
    requests, moves = math.ceil(span_s / REQUEST_EVERY_S), math.ceil(span_s / MOVE_EVERY_S)
    return msgspec.structs.replace(plan, span_s=span_s, requests=requests, moves=moves)


class SimulatedCluster:
    """The nodes of one run, in whichever life they are; faults break them by their names."""

    def __init__(self, seed: int, plan: Plan) -> None:
        self.loop = cast(ProcessLoop, VirtualLoop.running())
        self.clock = self.loop.clock
        self.dice = random.Random(seed)
        self.trace = TraceRecorder(self.clock)
        self.witness = Witness(self.clock, self.trace)
        self.network = SimulatedNetwork(self.loop, self.dice, self.trace)
        self.moves = MoveWatch(self.witness, self.leader)
        self.names = [f"n{number}" for number in range(1, plan.nodes + 1)]
        self.plan = plan
        self._means = Means(
            config_of=partial(
                config_of, slots=plan.slots, placement_policy=plan.placement_policy, bytes_first_s=plan.bytes_first_s
            ),
            limits=msgspec.structs.replace(LIMITS, down_after_s=plan.down_after_s), echoes=plan.moves > 0,
            remote_bytes_per_s=plan.remote_bytes_per_s,
        )  # fmt: skip
        self.truth = MemoryStore(self.clock)
        self.nodes: dict[str, SimulatedNode] = {}
        self._lives: dict[str, int] = {}
        self._down: set[str] = set()
        self._crashed: list[SimulatedNode] = []
        self._scope = TaskScope("cluster")
        self._drains: dict[str, asyncio.Task[None]] = {}
        sizes = [self.dice.choice((20, 60, 120)) * MIB for _ in range(plan.models)]
        self.models = [model_of(f"m{number}", size, KEEP_ALIVE_S) for number, size in enumerate(sizes, 1)]
        self.cards = {model.card: SimulatedCard(model.card, model.size_bytes) for model in self.models}
        # What its disk has survives a node.
        self.stored = {name: [model.card for model in self.models if self.dice.random() < 0.6] for name in self.names}

    async def start_all(self) -> None:
        """Register the models, and start every node."""
        await self.truth.commit([], [Put(key, value) for key, value in registered(self.models)])
        await asyncio.gather(*(self.restart(name) for name in self.names))

    def living(self) -> list[SimulatedNode]:
        """Give the nodes that run and answer."""
        return [node for node in self.nodes.values() if node.ready]

    # What faults do to nodes.

    def leader(self) -> str | None:
        """Name the node that leads now."""
        for node in self.living():
            leadership = node.cluster._leadership
            if leadership is not None and leadership.seat is not None:
                return node.name
        return None

    async def restart(self, name: str) -> None:
        """Start another life of a node, as often as it takes."""
        until_s = self.clock.monotonic_s() + MEND_S
        if name in self._down:
            self._down.discard(name)
            self.network.revive(name)
        while True:
            self._lives[name] = self._lives.get(name, 0) + 1
            node = SimulatedNode(
                name, self._lives[name], truth=self.truth, cards=self.cards, stored=self.stored[name],
                clock=self.clock, network=self.network.host(name), dice=self.dice, problem=self.witness.problem,
                moves=self.moves.hears, means=self._means,
            )  # fmt: skip
            try:
                await self._in(node, node.start(), "start")
            except SllmError as error:
                self.witness.saw(node.process, "does not start", error.code)
                if self.clock.monotonic_s() > until_s:
                    self.witness.problem(f"{name} can't be started: {error.code}: {error.message}")
                    return
                await self.clock.sleep(RESTART_S)
                continue
            self.nodes[name] = node
            self.witness.look_at_epochs(node)
            self.witness.saw(node.process, "is ready")
            return

    async def _in(self, node: SimulatedNode, work: object, name: str) -> None:
        """Have a node do something itself."""
        task = self._scope.spawn(work, name, on_failure=lambda _: None, context=node.context.copy())  # type: ignore[arg-type]
        await asyncio.wait([task])
        task.result()

    def crash(self, name: str, *, silent: bool) -> None:
        """End a node at this moment, its engines with it."""
        node = self.nodes.pop(name)
        self.network.kill(name, silent=silent)
        self.loop.stop_process(node.process)
        node.ready, node.way.cut = False, True
        for process in node.processes:
            process.kill()
        for asked in self.witness.asked:
            if asked.process == node.process and not asked.outcome:
                asked.outcome = "its gateway is gone"
        self.stored[name] = sorted(node.tiers.ssd.stored)
        self._down.add(name)
        self._crashed.append(node)

    async def bury(self) -> None:
        """Let crashed nodes end, which nobody can tell any more, so that the loop can."""
        for node in self._crashed:
            node.way.patience_s = 0.0
            self.loop.continue_process(node.process)
        await self._scope.close()
        self._scope = TaskScope("burial")
        for node in self._crashed:
            await self._in(node, node.abandon(), "abandon")
        await self._scope.close()

    async def leave(self, name: str) -> None:
        """Stop a node as an operator does."""
        node = self.nodes.pop(name)
        self.stored[name] = sorted(node.tiers.ssd.stored)
        await self._in(node, node.close(), "close")
        self.look_at_end(node)

    def kill_engine(self, name: str, dice: random.Random) -> bool:
        """Kill one engine of a node, if it has any."""
        node = self.nodes.get(name)
        if node is None or not node.engines:
            return False
        dice.choice(node.engines).kill()
        return True

    def kill_engine_of(self, home: Home) -> bool:
        """Kill an engine, if it and its node live still."""
        node = self.nodes.get(home.node)
        engines = [one for one in node.engines if one.pid == home.pid] if node is not None else []
        if node is None or node.process != home.process or not engines:
            return False
        engines[0].kill()
        return True

    def pause(self, name: str) -> None:
        """Stop a node's process."""
        self.network.freeze(name)
        self.loop.stop_process(self.nodes[name].process)

    def go_on(self, name: str) -> None:
        """Let it go on."""
        self.loop.continue_process(self.nodes[name].process)
        self.network.thaw(name)

    def cut_store(self, name: str, cut: bool, *, loses_answers: bool) -> None:
        """Cut a node from the store, or connect it again."""
        way = self.nodes[name].way
        way.cut, way.loses_answers = cut, loses_answers

    # Clients.

    def ask(self, number: int, node: SimulatedNode, model: str, dice: random.Random) -> asyncio.Task[None]:
        """Have a client ask, as a gateway does: in the node's own process."""
        is_long = self.plan.moves > 0 and dice.random() < LONG_ONES
        while True:
            prompt = pack_uint32(dice.randrange(50_000) for _ in range(dice.choice((3, 20, 200))))
            sampling = Sampling(
                max_tokens=dice.randrange(1, self.plan.max_tokens), temperature=1.0, top_p=1.0,
                seed=dice.getrandbits(32),
            )  # fmt: skip
            priority = dice.choice(self.plan.priorities) if self.plan.priorities else 0
            request = Generate(
                request_id=RequestId(f"r{number}"), model=ModelName(model), prompt=prompt, sampling=sampling,
                priority=priority,
            )  # fmt: skip
            asked = Asked(request, node.process, self.clock.monotonic_s())
            if not is_long or len(asked.right) >= LONG_TOKENS:
                break
        self.witness.asks(asked)
        self.moves.asks(asked)
        return self._scope.spawn(self._client(asked, node), f"client-{number}", context=node.context.copy())

    async def _client(self, asked: Asked, node: SimulatedNode) -> None:
        try:
            async with asyncio.timeout(LONGEST_STREAM_S), aclosing(node.router.stream(asked.request)) as items:
                async for item in items:
                    self.witness.takes(asked, item)
                    self.moves.given(asked)
        except SllmError as error:
            self.witness.fails(asked, error)
        except TimeoutError:
            self.witness.problem(f"{asked.request.request_id} at {node.process} does not end")
            asked.outcome = "endless"
        else:
            if not asked.outcome:
                self.witness.problem(f"{asked.request.request_id} at {node.process} ends without a word")
        self.moves.over(asked)

    # Operators.

    def move(self, asked: Asked, node: SimulatedNode, to: str) -> None:
        """Have an operator ask a node to move an answer; refusals do no harm."""
        self._scope.spawn(self._move(asked, node, to), "move", context=node.context.copy())

    async def _move(self, asked: Asked, node: SimulatedNode, to: str) -> None:
        request_id = asked.request.request_id
        self.moves.begins(asked, node.name, to)
        message = MigrateRequest(request_id=request_id, to=NodeId(to))
        try:
            await node.actors.coordinator.ask(message, timeout_s=MOVE_TIMEOUT_S)
            self.witness.saw(node.process, "moved", request_id)
        except SllmError as error:
            self.witness.saw(node.process, f"not moved: {error.code}", request_id)
            self.moves.refused(asked)

    def drain(self, node: SimulatedNode) -> None:
        """Have an operator drain a node, and let it serve again; not two at once."""
        if any(not task.done() and self.nodes.get(name) for name, task in self._drains.items()):
            return
        self._drains[node.name] = self._scope.spawn(self._drain(node), "drain", context=node.context.copy())

    async def _drain(self, node: SimulatedNode) -> None:
        keeper = node.system.ref(NODE_KEEPER)
        self.witness.saw(node.process, "drains")
        self.moves.drains(node.name)
        try:
            await keeper.ask(DrainNode(), timeout_s=DRAIN_TIMEOUT_S)
            self.witness.saw(node.process, "drained")
            await keeper.ask(CordonNode(cordoned=False), timeout_s=DRAIN_TIMEOUT_S)
        except SllmError as error:
            self.witness.saw(node.process, "not drained", error.code)

    async def uncordon_all(self) -> None:
        """Let every node serve again that an operator has drained, whatever came between."""
        until_s = self.clock.monotonic_s() + MEND_S
        for name in self._drains:
            while self.clock.monotonic_s() < until_s:
                node = self.nodes.get(name)
                if node is not None and node.ready:
                    asking = node.system.ref(NODE_KEEPER).ask(CordonNode(cordoned=False), timeout_s=DRAIN_TIMEOUT_S)
                    try:
                        await self._in(node, asking, "uncordon")
                        break
                    except SllmError:
                        pass  # The store, or a drain that still runs: once more.
                await self.clock.sleep(RESTART_S)
            else:
                self.witness.problem(f"{name} can't be uncordoned")

    def look_at_end(self, node: SimulatedNode) -> None:
        """Judge what a node has left behind."""
        left = [*node.system.names(), *(task.get_name() for task in node.system.tasks.tasks())]
        left += [f"engine {process.pid}" for process in node.engines]
        if not node.tiers.loader.is_idle:
            left.append("leases")
        if left:
            self.witness.problem(f"{node.process} leaves behind {left}")
