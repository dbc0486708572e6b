"""When requests would begin if whoever starts instances knew when each place will be free. Pure.

This is no bound from below, as `oracle` has one, but a schedule by the rules that all systems here keep: requests are
taken as they come, an instance is started for one that is there, and leaves when it has been idle for its keep-alive.
Each request begins where it does so soonest, at an instance or by a start, and all ends are known beforehand. Decisions
and leaving take no time; bytes come at full bandwidth from the fastest tier of the node that has them, the next model's
behind them, while a place is still busy, too; what was loaded stays in host memory, the least recently used goes first.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import inf

from sllm_actor.testing.workloads import Arrival
from sllm_actor.testing.world import World


class _Place:
    """Devices for one instance: its model, when each slot that is taken ends, and when the last of them does."""

    __slots__ = ("ends_s", "last_s", "model", "node")

    def __init__(self, node: _Node) -> None:
        self.node = node
        self.model = -1
        self.ends_s: list[float] = []
        self.last_s = -inf

    def free_s(self, now_s: float, slots: int) -> float:
        """Tell when a slot of its instance is free."""
        while self.ends_s and self.ends_s[0] <= now_s:
            heapq.heappop(self.ends_s)
        return now_s if len(self.ends_s) < slots else self.ends_s[0]


class _Node:
    """Places, and since when each model is in host memory, the least recently used first."""

    def __init__(self, number: int, places: int, stored: set[int]) -> None:
        self.number = number
        self.places = [_Place(self) for _ in range(places)]
        self.host: dict[int, float] = {}
        self.host_bytes = 0
        self.ssd = stored
        # When the disk and the network have nothing more to bring.
        self.disk_s = self.remote_s = -inf
        self.rank = (-inf, number)

    def soonest(self) -> _Place:
        """Give the place that is free first."""
        best = self.places[0]
        for place in self.places:
            if place.last_s < best.last_s:
                best = place
        return best


def on_demand_begins_s(world: World, arrivals: Sequence[Arrival]) -> Iterator[float]:
    """Give the moment at which each request begins, of which none comes before the one before it."""
    served = _Served(world)
    for arrival in arrivals:
        yield served.begin_s(arrival)


class _Served:
    def __init__(self, world: World) -> None:
        self._world = world
        self._slots = world.description.concurrency
        numbers = {model.card: number for number, model in enumerate(world.models)}
        nodes = [
            _Node(number, world.instances, {numbers[card] for card in world.dealt[name]})
            for number, name in enumerate(world.names)
        ]
        # Which nodes have each model's bytes, and which places its instances.
        self._holders: dict[int, dict[int, _Node]] = defaultdict(dict)
        self._running: dict[int, list[_Place]] = defaultdict(list)
        for node in nodes:
            for model in node.ssd:
                self._holders[model][node.number] = node
        self._nodes = nodes
        # By when they have a place, and nothing more to fetch.
        self._ranks = [node.rank for node in nodes]

    def begin_s(self, arrival: Arrival) -> float:
        """Serve one request; tell when its prompt is begun."""
        now_s, model, speed = arrival.at_s, arrival.model, self._world.speed(arrival.model)
        begin_s, place = self._at_an_instance(now_s, model)
        if begin_s > now_s:
            for node in self._candidates(model, now_s):
                at = node.soonest()
                start_s = max(max(now_s, at.last_s) + speed.copy_s, self._bytes_s(node, model, now_s)) + speed.attach_s
                if start_s < begin_s:
                    begin_s, place = start_s, at
        assert place is not None, "every node has a place"
        length_s = speed.prompts_s(arrival.prompt_tokens)
        length_s += (speed.step_s + speed.row_s) * (arrival.new_tokens - 1)
        if place.model != model or place.last_s + self._keep_alive_s(model) < now_s:
            self._start(place, model, begin_s, self._bytes_s(place.node, model, now_s))
        elif len(place.ends_s) == self._slots:
            heapq.heappop(place.ends_s)
        heapq.heappush(place.ends_s, begin_s + length_s)
        place.last_s = max(place.last_s, begin_s + length_s)
        self._rank(place.node)
        return begin_s

    def _at_an_instance(self, now_s: float, model: int) -> tuple[float, _Place | None]:
        """Find the instance that has a slot soonest, of those that have not left."""
        best_s, best = inf, None
        since_s = now_s - self._keep_alive_s(model)
        for place in self._running[model]:
            free_s = place.free_s(now_s, self._slots) if place.last_s >= since_s else inf
            if free_s < best_s:
                best_s, best = free_s, place
        return best_s, best

    def _candidates(self, model: int, now_s: float) -> Iterator[_Node]:
        """Give the nodes that have the bytes, and of the others one that can begin to fetch them for a place at once.

        Where there is none, all of them.
        """
        holders = self._holders[model]
        yield from holders.values()
        for rank_s, number in self._ranks:
            if number not in holders:
                yield self._nodes[number]
                if rank_s <= now_s:
                    return

    def _bytes_s(self, node: _Node, model: int, now_s: float) -> float:
        """Tell when a node has the bytes in host memory."""
        if model in node.host:
            return node.host[model]
        machine, size_bytes = self._world.machine, self._world.models[model].size_bytes
        if model in node.ssd:
            return max(now_s, node.disk_s) + size_bytes / machine.ssd_bytes_per_s
        return max(now_s, node.remote_s) + size_bytes / machine.remote_bytes_per_s

    def _start(self, place: _Place, model: int, begin_s: float, bytes_s: float) -> None:
        node = place.node
        if place.model >= 0:
            self._running[place.model].remove(place)
        self._running[model].append(place)
        # Nobody has its other slots before it has started.
        place.model, place.last_s, place.ends_s = model, begin_s, [begin_s] * (self._slots - 1)
        if model not in node.host:
            if model in node.ssd:
                node.disk_s = bytes_s
            else:
                node.remote_s = bytes_s
                node.ssd.add(model)
            node.host_bytes += self._world.models[model].size_bytes
        node.host.pop(model, None)
        node.host[model] = bytes_s
        self._holders[model][node.number] = node
        while node.host_bytes > self._world.machine.host_pool_bytes:
            gone = next(iter(node.host))
            del node.host[gone]
            node.host_bytes -= self._world.models[gone].size_bytes

    def _rank(self, node: _Node) -> None:
        rank = (max(node.soonest().last_s, node.remote_s), node.number)
        if rank != node.rank:
            del self._ranks[bisect_left(self._ranks, node.rank)]
            insort(self._ranks, rank)
            node.rank = rank

    def _keep_alive_s(self, model: int) -> float:
        return self._world.models[model].keep_alive_s
