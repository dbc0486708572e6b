"""Who leads when a machine says that nobody listens: of a process that has ended, or of one behind a firewall."""

from __future__ import annotations

import errno
import ssl
from random import Random
from typing import Any, cast

from sllm_actor.actors.scheduler import Scheduler
from sllm_actor.config import Config
from sllm_actor.errors import NoLeader, SllmError
from sllm_actor.messages.between_nodes import BETWEEN_NODES
from sllm_actor.messages.placement import ListNodes
from sllm_actor.metadata.election import observe
from sllm_actor.node.cluster import ELECTION, Many
from sllm_actor.runtime import Actor, ActorSystem, Security, handles
from sllm_actor.runtime.network import Listener, Network, ProtocolFactory
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.testing.simulated_network import SimulatedNetwork
from sllm_actor.testing.simulated_store import MemoryStore, Way
from sllm_actor.testing.trace import TraceRecorder
from sllm_actor.testing.virtual_loop import VirtualLoop, run_virtual

TTL_S = 10


class Walled:
    """A network behind a firewall that refuses whatever is dialled while it is up."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.refuses = False

    async def listen(self, endpoint: str, factory: ProtocolFactory, tls: ssl.SSLContext | None) -> Listener:
        return await self._network.listen(endpoint, factory, tls)

    async def dial(self, endpoint: str, factory: ProtocolFactory, tls: ssl.SSLContext | None) -> None:
        if self.refuses:
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"nobody listens at {endpoint}")
        await self._network.dial(endpoint, factory, tls)


class Leads(Actor):
    """Stands where the Scheduler would, and says who leads."""

    def __init__(self, name: str) -> None:
        self._name = name

    @handles(ListNodes)
    async def list_nodes(self, _: ListNodes) -> str:
        return self._name


class Pair:
    """Two nodes that may lead, each behind a wall of its own."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.clock = loop.clock
        self.truth = MemoryStore(self.clock)
        self.network = SimulatedNetwork(loop, Random(0), TraceRecorder(self.clock))
        self.walls: dict[str, Walled] = {}
        self.nodes: dict[str, Many] = {}
        self.systems: list[ActorSystem] = []
        self.seats: list[int] = []
        self.tasks = TaskScope("pair")

    async def start(self) -> None:
        self.tasks.spawn(self._watch(), "watch")
        for name in "ab":
            wall = self.walls[name] = Walled(self.network.host(name))
            system = ActorSystem(
                node_id=name, messages=BETWEEN_NODES, security=Security(secret=b"s" * 32), clock=self.clock,
                network=wall, randomness=Random(name).randbytes,
            )  # fmt: skip
            await system.listen(f"tcp://{name}:1")
            config = Config(node_id=name, lease_ttl_s=TTL_S, listen=f"tcp://{name}:1")
            node = self.nodes[name] = Many(Way(self.truth, self.clock), system, self.clock, config)
            await node.join()
            await node.lead(system, lambda *_, name=name: cast(Scheduler, Leads(name)))
            self.systems.append(system)

    async def _watch(self) -> None:
        async for leader in observe(self.truth, ELECTION, self.clock):
            if leader is not None:
                self.seats.append(leader.epoch)

    async def ask(self, name: str) -> Any:
        """Ask whoever leads, as this node sees it, who that is."""
        return await self.nodes[name].way.ask(ListNodes(), timeout_s=3 * TTL_S)

    async def ask_for(self, seconds: float) -> None:
        """Have both nodes ask for a time; that nobody answers is nothing to them."""
        until_s = self.clock.monotonic_s() + seconds
        while self.clock.monotonic_s() < until_s:
            for name in "ab":
                try:
                    await self.nodes[name].way.ask(ListNodes(), timeout_s=0.5)
                except SllmError:
                    await self.clock.sleep(0.1)

    async def close(self) -> None:
        await self.tasks.close()
        for system, node in zip(self.systems, self.nodes.values(), strict=True):
            await node.close()
            await system.close()
        await self.truth.close()


def test_two_that_are_told_that_the_other_is_gone_take_its_seat_once_and_not_for_ever() -> None:
    async def main() -> None:
        pair = Pair(VirtualLoop.running())
        await pair.start()
        assert (await pair.ask("a"), await pair.ask("b")) == ("a", "a")
        for wall in pair.walls.values():
            wall.refuses = True
        pair.network.cut("a", "b")
        await pair.ask_for(10 * TTL_S)
        # a's, the one that b took from it, and the one that a took from b.
        assert len(pair.seats) <= 3
        for wall in pair.walls.values():
            wall.refuses = False
        await pair.ask_for(TTL_S)
        assert await pair.ask("a") == await pair.ask("b")
        await pair.close()

    run_virtual(main)


def test_one_whose_process_has_ended_loses_its_seat_long_before_its_lease_ends() -> None:
    async def main() -> None:
        pair = Pair(VirtualLoop.running())
        await pair.start()
        assert await pair.ask("b") == "a"
        died_s = pair.clock.monotonic_s()
        pair.network.kill("a", silent=False)
        pair.nodes["a"].store.cut = True  # type: ignore[attr-defined]
        while True:
            try:
                if await pair.ask("b") == "b":
                    break
            except NoLeader:
                continue
        assert pair.clock.monotonic_s() - died_s < TTL_S / 2
        await pair.close()

    run_virtual(main)
