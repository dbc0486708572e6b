"""What a node knows of the registrations that all share: no removed name comes back, and none stays in memory."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from test_heartbeats import model

from sllm_actor.actors.shared_models import MODELS, SharedModels
from sllm_actor.domain import ModelName
from sllm_actor.errors import Conflict
from sllm_actor.metadata import Put, SqliteStore

M = ModelName("m")


def remembered(models: SharedModels) -> int:
    return sum(len(kept) for kept in vars(models).values() if isinstance(kept, dict))


@pytest.mark.parametrize("followed", [False, True])
def test_names_that_come_and_go_leave_nothing_behind(tmp_path: Path, followed: bool) -> None:
    async def scenario() -> None:
        store = await SqliteStore.open(tmp_path / "m.db")
        models = SharedModels(store, followed=followed)
        for number in range(5):
            await models.put(model(f"m{number}"))
            await models.delete(ModelName(f"m{number}"))
            if followed:
                assert models.newer(await models.load()) == {}
        assert remembered(models) == 0
        await store.close()

    asyncio.run(scenario())


def test_a_view_from_before_a_removal_does_not_bring_the_name_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = await SqliteStore.open(tmp_path / "m.db")
        models = SharedModels(store, followed=True)
        await models.put(model("m"))
        before = await models.load()
        await models.delete(M)
        assert models.newer(before) == {}
        assert models.newer(await models.load()) == {}
        await store.close()

    asyncio.run(scenario())


def test_what_was_removed_by_another_node_before_this_one_knew_that_it_had_put_it_is_gone_with_the_next_view(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        store = await SqliteStore.open(tmp_path / "m.db")
        here, there = SharedModels(store, followed=True), SharedModels(store, followed=True)
        await here.put(model("m"))
        assert set(there.newer(await there.load())) == {M}
        await there.delete(M)
        # As a watch gives it that had the removal before `put` was answered.
        view = (await here.load())._replace(listed=False)
        assert here.newer(view) == {M: None} and here.newer(view) == {}
        await store.close()

    asyncio.run(scenario())


def test_what_another_node_has_removed_is_told_once_and_forgotten(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = await SqliteStore.open(tmp_path / "m.db")
        here, there = SharedModels(store, followed=True), SharedModels(store, followed=True)
        await there.put(model("m"))
        with pytest.raises(Conflict):
            await here.put(model("m"))
        assert set(here.newer(await here.load())) == {M}
        await there.delete(M)
        assert here.newer(await here.load()) == {M: None}
        assert here.newer(await here.load()) == {}
        assert remembered(here) == 0
        await store.close()

    asyncio.run(scenario())


def test_what_is_no_registration_of_the_model_that_its_key_names_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        store = await SqliteStore.open(tmp_path / "m.db")
        models = SharedModels(store, followed=False)
        for key, value in (("other", msgspec.msgpack.encode(model("m"))), ("newer", b"\xc1")):
            await store.commit([], [Put(MODELS + key, value)])
        await models.put(model("m"))
        fresh = SharedModels(store, followed=False)
        assert set(fresh.newer(await fresh.load())) == {M}
        await store.close()

    asyncio.run(scenario())
    assert "models/other is no registration of that model, but of m" in caplog.text
    assert "models/newer is no registration that this version knows" in caplog.text
