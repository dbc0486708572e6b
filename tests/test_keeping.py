"""Pins and evictions by hand: in the tiers, and over a real node's command line and HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from checkpoints import folder_of
from conftest import StartNode
from houses import House, house
from houses import origin as origin
from houses import stock as stock
from loaders import CHUNK, LIMIT_S, checkpoint_of, opened, until
from test_remote_models import ANSWER, QUESTION, load_tiers, pull, stored, tiers, until_stored
from test_remote_models import served as served
from test_tier_races import holding
from web_server import WebServer

from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.domain import TierChoice
from sllm_actor.errors import Conflict, ModelNotFound, NoCapacity
from sllm_actor.loader import keeping
from sllm_actor.loader.keeping import Kept, kept
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.testing.node_process import CLI, NodeProcess

HOST, SSD, ALL = TierChoice.HOST, TierChoice.SSD, TierChoice.ALL


# ---- the tiers ----


async def test_what_is_pinned_in_the_pool_makes_no_room_until_it_is_unpinned(tmp_path: Path) -> None:
    first = checkpoint_of(tmp_path / "first", 3, 1)
    others = [checkpoint_of(tmp_path / f"other-{number}", 3, number) for number in (2, 3)]
    large = checkpoint_of(tmp_path / "large", 6, 4)
    async with opened(chunks=6) as loader:
        (await loader.lease(first)).release()
        loader.pin(first)
        loader.pin(first)
        assert [resident.pinned for resident in loader.residents()] == [True]
        assert loader.fingerprints() == [(first.fingerprint, True)]
        for other in others:
            (await loader.lease(other)).release()
        assert loader.holds(first), "it was used longest ago, and stays"
        assert not loader.holds(others[0])
        with pytest.raises(NoCapacity):
            await loader.lease(large)
        with pytest.raises(Conflict, match="pinned"):
            loader.evict(first)
        loader.pin(first, pinned=False)
        (await loader.lease(large)).release()
        assert not loader.holds(first)


async def test_evicting_from_the_pool_is_refused_for_what_is_leased_or_not_there(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "model", 3)
    async with opened(chunks=6) as loader:
        for asked in (loader.evict, loader.pin):
            with pytest.raises(ModelNotFound, match="not in the host pool"):
                asked(checkpoint)
        lease = await loader.lease(checkpoint)
        lease.is_of("somebody")
        with pytest.raises(Conflict, match="held by somebody"):
            loader.evict(checkpoint)
        assert loader.holds(checkpoint)
        lease.release()
        loader.evict(checkpoint)
        assert not loader.holds(checkpoint)
        assert loader.free_bytes == loader.pool_bytes


def known(node: House) -> Kept:
    return kept("model", node.card)


@pytest.mark.parametrize("kind", ["origin", "stock"])
async def test_a_model_is_pinned_and_evicted_wherever_it_is(request: pytest.FixtureRequest, kind: str) -> None:
    async with house(request.getfixturevalue(kind)) as node:
        for choice in TierChoice:
            with pytest.raises(Conflict, match="model is not"):
                await keeping.pin(node.tiers, known(node), choice)
            assert await keeping.unpin(node.tiers, known(node), choice) == ()
            assert await keeping.evict(node.tiers, known(node), choice) == ()
        await node.tiers.pull(node.card)
        assert await keeping.pin(node.tiers, known(node), ALL) == (SSD,)
        with pytest.raises(Conflict, match="not in host memory"):
            await keeping.pin(node.tiers, known(node), HOST)
        (await node.lease()).release()
        assert await keeping.pin(node.tiers, known(node), ALL) == (HOST, SSD)
        with pytest.raises(Conflict, match="in host memory it is pinned"):
            await keeping.evict(node.tiers, known(node), ALL)
        assert await keeping.unpin(node.tiers, known(node), HOST) == (HOST,)
        with pytest.raises(Conflict, match="on the SSD it is pinned"):
            await keeping.evict(node.tiers, known(node), ALL)
        assert node.tiers.loader.holds(node.card.checkpoint), "all of it or nothing"
        assert await keeping.evict(node.tiers, known(node), HOST) == (HOST,)
        assert await keeping.unpin(node.tiers, known(node), ALL) == (SSD,)
        assert await keeping.evict(node.tiers, known(node), ALL) == (SSD,)
        assert node.tiers.loader.residents() == []
        assert node.tiers.ssd.entries() == []


async def test_what_is_on_its_way_is_not_evicted_and_half_a_download_is(origin: Path) -> None:
    async with house(origin) as node:
        scope, begun, go = TaskScope("test"), asyncio.Event(), asyncio.Event()
        node.source.before = holding(begun, go)
        loading = scope.spawn(node.lease(), "load", on_failure=lambda _: None)
        await begun.wait()
        with pytest.raises(Conflict, match="just being loaded"):
            await keeping.evict(node.tiers, known(node), HOST)
        with pytest.raises(Conflict, match="on the SSD it is held by a download"):
            await keeping.evict(node.tiers, known(node), SSD)
        loading.cancel()
        await asyncio.wait([loading])
        await until(lambda: node.tiers.arriving(node.card) is None)
        assert [entry.partial for entry in node.tiers.ssd.entries()] == [True]
        with pytest.raises(Conflict, match="not in host memory or on the SSD"):
            await keeping.pin(node.tiers, known(node), ALL)
        assert await keeping.evict(node.tiers, known(node), ALL) == (SSD,)
        assert node.tiers.ssd.entries() == []
        await scope.close()


async def test_a_copy_that_is_being_written_says_who_holds_the_memory(origin: Path) -> None:
    async with house(origin) as node:
        go = asyncio.Event()
        node.tiers.ssd._gate = lambda _: go.wait()  # type: ignore[assignment, return-value]
        lease = await node.lease()
        lease.is_of("model-1")
        with pytest.raises(Conflict, match="in host memory it is held by") as refused:
            await keeping.evict(node.tiers, known(node), ALL)
        assert "model-1" in str(refused.value)
        assert "a copy to the SSD" in str(refused.value)
        go.set()
        async with asyncio.timeout(LIMIT_S):
            await node.stored()
        lease.release()
        await until(lambda: not any(resident.holders for resident in node.tiers.loader.residents()))
        assert await keeping.evict(node.tiers, known(node), ALL) == (HOST, SSD)


async def test_a_folder_has_no_copy_on_the_ssd(origin: Path) -> None:
    folder = read_folder(folder_of(origin.parent / "plain", 2 * CHUNK))
    async with house(origin) as node:
        plain = kept("plain", folder)
        (await node.tiers.lease(folder)).release()
        with pytest.raises(Conflict, match="plain is not on the SSD"):
            await keeping.pin(node.tiers, plain, SSD)
        assert await keeping.pin(node.tiers, plain, ALL) == (HOST,)
        assert await keeping.unpin(node.tiers, plain, ALL) == (HOST,)
        assert await keeping.evict(node.tiers, plain, ALL) == (HOST,)


# ---- a node ----


def command(node: NodeProcess, *arguments: str, status: int = 0) -> Any:
    ran = subprocess.run([CLI, *arguments, "--url", node.url, "--json"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == status, ran
    return json.loads(ran.stdout)


def shown(node: NodeProcess, *arguments: str) -> str:
    return subprocess.run(
        [CLI, *arguments, "--url", node.url], capture_output=True, text=True, check=True, timeout=120,
        env=os.environ | {"COLUMNS": "200"},
    ).stdout  # fmt: skip


def test_pins_and_evictions_by_command(web: WebServer, served: Path, start_node: StartNode) -> None:
    with start_node() as node:
        node.deploy(web.url(served.name), "org/demo")
        assert command(node, "pin", "org/demo", status=1)["error"]["code"] == "conflict"
        assert ANSWER in node.chat("org/demo", QUESTION)
        until_stored(node)
        assert command(node, "pin", "org/demo") == {"pinned": "org/demo", "tiers": ["host", "ssd"]}
        (host,), (ssd,) = tiers(node)["host"], tiers(node)["ssd"]
        assert host["pinned"] and ssd["pinned"]
        (holder,) = host["held_by"]
        assert (holder["who"], holder["held_s"] > 0) == ("org/demo-1", True)
        assert "org/demo-1 for" in shown(node, "ps")
        assert command(node, "unpin", "org/demo", "--tier", "host") == {"unpinned": "org/demo", "tiers": ["host"]}
        error = command(node, "evict", "org/demo", "--tier", "host", status=1)["error"]
        assert (error["code"], error["param"]) == ("conflict", "model")
        assert "held by org/demo-1" in error["message"]
        command(node, "stop", "org/demo")
        assert shown(node, "evict", "org/demo", "--tier", "host") == "evicted org/demo in host memory\n"
        assert tiers(node)["host"] == []
    with start_node() as node:
        assert [entry["pinned"] for entry in tiers(node)["ssd"]] == [True], "it is on the disk"
        assert "on the SSD it is pinned" in command(node, "evict", "org/demo", status=1)["error"]["message"]
        assert shown(node, "unpin", "org/demo") == "unpinned org/demo on the SSD\n"
        assert command(node, "evict", "org/demo") == {"evicted": "org/demo", "tiers": ["ssd"]}
        assert "nothing was there" in shown(node, "evict", "org/demo")
        assert node.call("GET", "/admin/models")["models"][0]["state"] == "remote"
        assert ANSWER in node.chat("org/demo", QUESTION)
        assert load_tiers(node) == {"source"}
        assert ANSWER in node.chat("org/demo", QUESTION)
        until_stored(node)
        assert command(node, "rm", "org/demo", "--purge") == {"removed": "org/demo"}
        assert tiers(node)["host"] == tiers(node)["ssd"] == []


def test_a_pin_in_host_memory_ends_with_the_node(web: WebServer, served: Path, start_node: StartNode) -> None:
    with start_node() as node:
        node.deploy(web.url(served.name), "demo")
        node.chat("demo", QUESTION)
        node.call("POST", "/admin/models/demo/pin", {"tier": "host"})
    with start_node() as node:
        node.chat("demo", QUESTION)
        assert [entry["pinned"] for entry in tiers(node)["host"]] == [False] * len(tiers(node)["host"])


def test_what_is_not_registered_any_more_loses_its_pins_and_is_evicted_by_its_id(
    web: WebServer, served: Path, start_node: StartNode
) -> None:
    with start_node() as node:
        for name in ("one", "two"):
            pull(node, web.url(served.name), name)
        node.call("POST", "/admin/models/one/pin")
        node.call("DELETE", "/admin/models/one")
        assert [entry["pinned"] for entry in tiers(node)["ssd"]] == [True], "the other name has it, too"
        node.call("DELETE", "/admin/models/two")
        (entry,) = tiers(node)["ssd"]
        assert (entry["models"], entry["pinned"]) == ([], False)
        assert f"(not registered) {entry['model_id']}" in shown(node, "ps")
        model_id = entry["model_id"]
        assert node.call("POST", f"/admin/models/{model_id}/pin")["tiers"] == ["ssd"]
        assert node.request("POST", f"/admin/models/{model_id}/evict").status == 409
        assert node.call("POST", f"/admin/models/{model_id}/unpin")["tiers"] == ["ssd"]
        assert node.call("POST", f"/admin/models/{model_id}/evict")["tiers"] == ["ssd"]
        assert node.request("POST", f"/admin/models/{model_id}/evict").status == 404


def test_a_model_that_is_replaced_leaves_no_pin_behind(web: WebServer, served: Path, start_node: StartNode) -> None:
    with start_node() as node:
        pull(node, web.url(served.name))
        node.call("POST", "/admin/models/demo/pin")
        node.deploy("builtin:demo", "demo", replace=True)
        assert stored(node) == [True]
        assert [entry["pinned"] for entry in tiers(node)["ssd"]] == [False]


def test_a_pinned_model_keeps_its_room_and_a_start_beyond_it_says_so(
    start_node: StartNode, tmp_path: Path, web: WebServer, served: Path
) -> None:
    with start_node("host_pool_bytes=16MiB", "chunk_bytes=16MiB") as node:  # Room for one.
        node.deploy("builtin:demo", "first")
        node.deploy(web.url(served.name), "second")
        node.chat("first", QUESTION)
        node.call("POST", "/admin/models/first/unload")
        node.call("POST", "/admin/models/first/pin")
        reply = node.request("POST", "/v1/completions", {"model": "second", "prompt": "1"})
        assert (reply.status, reply.json()["error"]["code"]) == (400, "model_too_large")
        assert "other models have 16.8 MB pinned" in reply.json()["error"]["message"]
        assert ANSWER in node.chat("first", QUESTION)
        assert load_tiers(node) == {"host memory"}
        node.call("POST", "/admin/models/first/unpin")
        assert ANSWER in node.chat("second", QUESTION)


@pytest.mark.parametrize("verb", ["pin", "unpin", "evict"])
def test_a_wrong_question_is_refused(node: NodeProcess, verb: str) -> None:
    path = f"/admin/models/demo/{verb}"
    for body, code in (
        ({"tier": "tape"}, "invalid_request"),
        ({"level": "ssd"}, "unsupported_field"),
        (b"[]", "invalid_request"),
    ):
        reply = node.request("POST", path, body)
        assert (reply.status, reply.json()["error"]["code"]) == (400, code)
    for name in ("nobody", "..%2Fup", "a" * 300, "f" * 64):
        reply = node.request("POST", f"/admin/models/{name}/{verb}")
        assert (reply.status, reply.json()["error"]["code"]) == (404, "model_not_found")


def test_a_folder_of_this_machine_is_not_on_the_ssd(node: NodeProcess) -> None:
    reply = node.request("POST", "/admin/models/demo/pin", {"tier": "ssd"})
    assert (reply.status, reply.json()["error"]["code"]) == (409, "conflict")
    assert "demo is not on the SSD" in reply.json()["error"]["message"]
