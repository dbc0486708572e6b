"""Starts that are cut short, and registrations that change under them: no lease is left, no weights are mistaken."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from loaders import CHUNK, checkpoint_of, opened

from sllm_actor.actors import registry
from sllm_actor.actors.instance_starter import InstanceStarter
from sllm_actor.actors.model_manager import ModelManager
from sllm_actor.actors.place import Place
from sllm_actor.actors.registry import Registry
from sllm_actor.actors.scheduler_way import SchedulerWay
from sllm_actor.actors.start_counts import StartCounts
from sllm_actor.actors.waiting_room import WaitingRoom
from sllm_actor.checkpoint.folder import Checkpoint
from sllm_actor.config import Config
from sllm_actor.domain import Backend, EngineLimits, Model, ModelName, NodeId
from sllm_actor.errors import Conflict, EngineDied
from sllm_actor.loader.cards import Cards
from sllm_actor.loader.loader import Loader
from sllm_actor.loader.tiers import Tiers
from sllm_actor.messages.instances import StartInstance
from sllm_actor.messages.models import RegisterModel
from sllm_actor.metadata.store import Fact, Listing, Outcome
from sllm_actor.node.making import manager_limits_of
from sllm_actor.runtime import ActorSystem
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.sources.source import Source

LIMITS = manager_limits_of(
    Config(
        max_instances=1,
        max_requests_per_instance=1,
        max_adapters_per_instance=1,
        drain_timeout_s=1.0,
        engine_stop_timeout_s=1.0,
    )
)


def model_of(checkpoint: Checkpoint) -> Model:
    return Model(
        name=ModelName("m"),
        path=str(checkpoint.path),
        fingerprint=checkpoint.fingerprint,
        architecture="OPTForCausalLM",
        dtype="F32",
        size_bytes=checkpoint.size_bytes,
        host_bytes=CHUNK,
        context_tokens=8,
        vocabulary_tokens=8,
        eos_token_ids=(),
        default_temperature=1.0,
        default_top_p=1.0,
        chat=False,
        keep_alive_s=10.0,
        registered_wall_s=1.0,
    )


class DyingEngine:
    """One that has died when its weights are to be attached, and whose process takes its time to be gone."""

    def __init__(self) -> None:
        self.leaving = asyncio.Event()

    def prepare(self, message: object) -> None: ...

    def place(self, chunk_bytes: int, files: object) -> None: ...

    async def attach(self, limits: EngineLimits) -> None:
        raise EngineDied("it is gone")

    def kill(self) -> None: ...

    async def leave(self, timeout_s: float) -> None:
        self.leaving.set()
        await asyncio.Event().wait()


class NoSsd:
    """An SSD tier that has nothing and is never asked to keep anything."""

    quota_bytes = used_bytes = 0
    given_up = ()

    def whole(self) -> tuple[tuple[str, ...], int]:
        return (), 0

    def holds(self, model_id: str) -> bool:
        return False


def over(loader: Loader, folder: Path) -> Tiers:
    """Tiers above a loader for folders alone."""

    def no_source(url: str) -> Source:
        raise AssertionError(url)

    return Tiers(loader, cast(Any, NoSsd()), Cards(folder / "cards"), no_source, SystemClock(), lambda: 0.0)


class OneEngine:
    def __init__(self, engine: DyingEngine) -> None:
        self._engine = engine

    async def take(self) -> DyingEngine:
        return self._engine


async def test_a_start_cancelled_while_it_cleans_up_keeps_no_lease(tmp_path: Path) -> None:
    checkpoint, engine, scope = checkpoint_of(tmp_path, chunks=4), DyingEngine(), TaskScope("start")
    async with opened() as loader:
        starter = InstanceStarter(
            over(loader, tmp_path),
            {Backend.SLLM: cast(Any, OneEngine(engine))},
            SystemClock(),
            chunk_bytes=CHUNK,
            map_in_place=False,
            verify=False,
            stop_timeout_s=5,
            limits=EngineLimits(slots=1, kv_cache_bytes=1024, prefill_chunk_tokens=16),
            max_instances=1,
        )
        starting = scope.spawn(starter.start(model_of(checkpoint), checkpoint), "start")
        await engine.leaving.wait()
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert [resident.leases for resident in loader.residents()] == [0]


class OneModel:
    """A store that remembers one registration from before the node was started."""

    def __init__(self, model: Model) -> None:
        self._value = msgspec.msgpack.encode(model)

    async def list(self, prefix: str) -> Listing:
        return Listing((Fact(f"{prefix}m", self._value, 1, 1, None),), 1)

    async def commit(self, conditions: object, operations: object) -> Outcome:
        return Outcome(True, 2)


class Registering:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    async def examine(self, message: object, now_s: float, find_base: object) -> tuple[Model, Checkpoint]:
        return model_of(self._checkpoint), self._checkpoint


class Asked:
    """A starter that only notes what it is asked to start."""

    def __init__(self) -> None:
        self.starts: list[tuple[str, Path]] = []

    async def start(self, model: Model, checkpoint: Checkpoint, on_progress: object) -> None:
        self.starts.append((model.path, checkpoint.path))
        raise Conflict("that was all")


async def test_a_model_registered_anew_while_it_starts_is_not_given_its_old_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = checkpoint_of(tmp_path / "old"), checkpoint_of(tmp_path / "new", seed=1)
    asked, reading, go_on, scope = Asked(), asyncio.Event(), asyncio.Event(), TaskScope("asks")

    async def slowly(path: Path) -> Checkpoint:
        reading.set()
        await go_on.wait()
        return old if path == old.path else new

    monkeypatch.setattr(registry, "read_off_loop", slowly)
    async with opened() as loader:
        system, tiers = ActorSystem(), over(loader, tmp_path)
        store, examiner = cast(Any, OneModel(model_of(old))), cast(Any, Registering(new))
        manager = ModelManager(
            Place(NodeId("n")),
            SchedulerWay(SystemClock(), 0.0),
            Registry(store, examiner, tiers, SystemClock()),
            tiers,
            cast(Any, asked),
            SystemClock(),
            LIMITS,
            WaitingRoom(SystemClock(), max_in_all=1, max_per_model=1),
            StartCounts(),
        )
        ref = await system.spawn(manager, "model-manager")

        async def start() -> None:
            with pytest.raises(Conflict):
                await anext(ref.stream(StartInstance(placement_id="1", model=ModelName("m"))))

        first = scope.spawn(start(), "start")
        await reading.wait()
        await ref.ask(
            RegisterModel(name=ModelName("m"), source=str(new.path), keep_alive_s=None, replace=True), timeout_s=60
        )
        go_on.set()
        await first
        await start()
        await system.close()
    assert asked.starts == [(str(old.path), old.path), (str(new.path), new.path)]


async def test_a_model_that_no_longer_fits_the_pool_is_warned_of_when_the_node_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(checkpoint_of(tmp_path / "checkpoint"))
    async with opened() as loader:
        for chunks in (0, 1):
            larger = msgspec.structs.replace(model, host_bytes=loader.pool_bytes + chunks * CHUNK)
            known = Registry(cast(Any, OneModel(larger)), cast(Any, None), over(loader, tmp_path), SystemClock())
            await known.open()
            assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["m can't start"] * chunks
            await known.close()
