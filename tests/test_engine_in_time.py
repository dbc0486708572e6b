"""A start from elsewhere takes its engine when the bytes are nearly there; one from this node takes it at once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from device_houses import Held
from houses import House, house
from houses import origin as origin
from loaders import CHUNK, until
from test_instance_faults import model_of

from sllm_actor.actors.instance_starter import InstanceStarter
from sllm_actor.checkpoint.folder import Checkpoint
from sllm_actor.domain import Backend, EngineLimits
from sllm_actor.errors import EngineStartFailed, SourceRefused
from sllm_actor.loader.cards import Card
from sllm_actor.loader.tiers import _disk_way
from sllm_actor.messages.engine import EngineReady
from sllm_actor.policy.nearing import is_near
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.units import MIB


class ListeningEngine:
    """One that does nothing, and remembers what it was told, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def prepare(self, message: object) -> None:
        self.told.append("prepare")

    def place(self, chunk_bytes: int, files: object) -> None:
        self.told.append("place")

    async def attach(self, limits: EngineLimits) -> EngineReady:
        self.told.append("attach")
        return EngineReady(spans=(), late_imports=())

    def kill(self) -> None:
        self.told.append("kill")

    async def leave(self, timeout_s: float) -> None:
        self.told.append("leave")


class Engines:
    def __init__(self, *, refuses: bool = False) -> None:
        self.taken: list[ListeningEngine] = []
        self._refuses = refuses

    async def take(self) -> ListeningEngine:
        if self._refuses:
            raise EngineStartFailed("no more processes")
        self.taken.append(ListeningEngine())
        return self.taken[-1]


def starter(node: House, engines: Engines, chunk_bytes: int = CHUNK) -> InstanceStarter:
    return InstanceStarter(
        node.tiers,
        {Backend.SLLM: cast(Any, engines)},
        SystemClock(),
        chunk_bytes=chunk_bytes,
        map_in_place=False,
        verify=False,
        stop_timeout_s=5,
        limits=EngineLimits(slots=1, kv_cache_bytes=1024, prefill_chunk_tokens=16),
        max_instances=1,
    )


def start(node: House, engines: Engines, wanted: Checkpoint | Card | None = None, chunk_bytes: int = CHUNK) -> Any:
    model = msgspec.structs.replace(model_of(node.card.checkpoint), card=node.card.key)
    return starter(node, engines, chunk_bytes).start(model, wanted or node.card)


@pytest.fixture
def slow_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Believe that nothing comes fast, so that a small checkpoint is a long download."""
    monkeypatch.setattr("sllm_actor.actors.instance_starter.FIRST_REMOTE_BYTES_PER_S", 1.0)
    monkeypatch.setattr("sllm_actor.actors.engine_in_time.AHEAD_S", 0.0)


@pytest.mark.usefixtures("slow_line")
async def test_a_long_download_takes_no_engine_before_it_is_nearly_there(origin: Path) -> None:
    async with house(origin) as node:
        engines, source, scope = Engines(), Held(node, 2 * CHUNK), TaskScope("test")
        starting = scope.spawn(start(node, engines), "start")
        await until(lambda: (node.tiers.arriving(node.card) or (0, 0))[0] > 0)
        assert engines.taken == []
        source.give(9 * CHUNK)
        # Of 17 chunks eight may be under way: the rest has come, and an engine builds meanwhile.
        await until(lambda: engines.taken != [])
        assert not starting.done()
        source.give()
        started = await starting
        assert engines.taken[0].told == ["prepare", "place", "attach"]
        assert len(engines.taken) == 1
        started.lease.release()
        await node.stored()


async def test_a_short_download_takes_its_engine_at_once(origin: Path) -> None:
    async with house(origin) as node:
        engines, source, scope = Engines(), Held(node, 0), TaskScope("test")
        starting = scope.spawn(start(node, engines), "start")
        await until(lambda: engines.taken != [])
        assert node.tiers.arriving(node.card) == (0, node.card.checkpoint.size_bytes)
        source.give()
        (await starting).lease.release()
        await node.stored()


@pytest.mark.usefixtures("slow_line")
async def test_what_this_node_has_takes_its_engine_before_it_is_read(origin: Path) -> None:
    async with house(origin) as node:
        await node.tiers.pull(node.card)
        engines = Engines()
        async with node.tiers._local_queue.turn(1, ways=frozenset(_ways(node))):
            scope = TaskScope("test")
            starting = scope.spawn(start(node, engines), "start")
            await until(lambda: node.tiers._local_queue.waiting == 1)
            assert [engine.told for engine in engines.taken] == [["prepare"]]
        (await starting).lease.release()


def _ways(node: House) -> list[str]:
    (entry,) = node.tiers.ssd.entries()
    return [_disk_way(entry.path.stat().st_dev)]


@pytest.mark.usefixtures("slow_line")
async def test_a_download_that_fails_or_is_left_before_its_end_has_taken_none(origin: Path) -> None:
    async with house(origin) as node:
        engines, scope = Engines(), TaskScope("test")
        Held(node, 2 * CHUNK)
        starting = scope.spawn(start(node, engines), "start")
        await until(lambda: (node.tiers.arriving(node.card) or (0, 0))[0] > 0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

        async def refuse(*_: object) -> None:
            raise SourceRefused("no")

        node.source.before = refuse
        with pytest.raises(SourceRefused):
            await start(node, engines)
        assert engines.taken == []


@pytest.mark.parametrize("slow", [True, False])
async def test_an_engine_that_can_t_be_had_fails_the_start_and_holds_nothing(
    origin: Path, slow: bool, request: pytest.FixtureRequest
) -> None:
    if slow:
        request.getfixturevalue("slow_line")
    async with house(origin) as node:
        with pytest.raises(EngineStartFailed):
            await start(node, Engines(refuses=True))
        await node.stored()
        await until(lambda: [resident.leases for resident in node.tiers.loader.residents()] == [0])


def test_it_is_near_the_end_by_what_was_seen_and_before_that_by_what_is_believed() -> None:
    def near(left_mib: int, arrived_mib: int, elapsed_s: float) -> bool:
        return is_near(
            left_mib * MIB,
            arrived_mib * MIB,
            elapsed_s,
            under_way_bytes=128 * MIB,
            bytes_per_s=100.0 * MIB,
            ahead_s=3.0,
        )

    assert near(428, 0, 0.0) and not near(429, 0, 0.0)
    assert near(728, 200, 1.0) and not near(729, 200, 1.0)
    assert near(131, 10, 10.0) and not near(132, 10, 10.0)
