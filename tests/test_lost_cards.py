"""Cards whose folder is lost: whatever needs one next brings it back, once."""

from __future__ import annotations

import asyncio
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import StartNode
from fault_proxy import FaultProxy
from houses import house
from houses import origin as origin
from houses import stock as stock
from test_remote_models import ANSWER, QUESTION, WEIGHTS, pull, stored, until_stored
from test_remote_models import served as served
from web_server import WebServer

from sllm_actor.checkpoint.manifest import MANIFEST_NAME
from sllm_actor.testing.node_process import NodeProcess


def cards(tmp_path: Path) -> Path:
    return tmp_path / "data" / "cards"


def is_whole(tmp_path: Path) -> bool:
    (card,) = cards(tmp_path).iterdir()
    return {WEIGHTS, "config.json", "tokenizer.json", MANIFEST_NAME} <= {path.name for path in card.iterdir()}


def test_a_prompt_brings_a_lost_card_back_once_for_all_who_ask(
    web: WebServer, served: Path, start_node: StartNode, tmp_path: Path
) -> None:
    asked: list[str] = []
    lock = threading.Lock()

    def note(request: Any) -> None:
        with lock:
            asked.append(request.path.rpartition("/")[2])

    with FaultProxy(web.port, choose=note) as proxy:
        url = f"{proxy.url}/ranges/{served.name}/"
        with start_node() as node:
            pull(node, url)
        shutil.rmtree(cards(tmp_path))
        asked.clear()
        # Nothing of it is in this node's memory: the first question needs the tokenizer before anything starts.
        with start_node() as node, ThreadPoolExecutor(6) as clients:
            answers = list(clients.map(lambda _: node.chat("demo", QUESTION), range(6)))
            assert all(ANSWER in answer for answer in answers)
            assert is_whole(tmp_path)
            assert asked.count("tokenizer.json") == 1 + 1, "once to see its size, once to fetch it"
            assert stored(node) == [True], "the SSD's copy is still the model's"


def test_a_card_that_is_lost_under_a_running_node_is_brought_back_by_a_start(
    web: WebServer, served: Path, start_node: StartNode, tmp_path: Path
) -> None:
    with start_node() as node:
        node.deploy(web.url(served.name), "demo")
        shutil.rmtree(cards(tmp_path))
        assert ANSWER in node.chat("demo", QUESTION)
        assert is_whole(tmp_path)
        until_stored(node)
        # One file is enough.
        node.call("POST", "/admin/models/demo/unload")
        next(cards(tmp_path).iterdir()).joinpath("config.json").unlink()
        assert ANSWER in node.chat("demo", QUESTION)
        assert is_whole(tmp_path)


def refusal(node: NodeProcess) -> str:
    body = {"model": "demo", "messages": [{"role": "user", "content": QUESTION}]}
    code: str = node.request("POST", "/v1/chat/completions", body).json()["error"]["code"]
    return code


def test_a_lost_card_whose_source_is_gone_is_that_error_until_it_is_back(
    web: WebServer, served: Path, start_node: StartNode, tmp_path: Path
) -> None:
    with start_node() as node:
        node.deploy(web.url(served.name), "demo")
    shutil.rmtree(cards(tmp_path))
    away = served.with_name(f"{served.name}-away")
    served.rename(away)
    with start_node() as node:
        assert refusal(node) == "source_missing"
        away.rename(served)
        assert ANSWER in node.chat("demo", QUESTION)


@pytest.mark.parametrize("kind", ["origin", "stock"])
async def test_a_card_that_is_made_anew_still_knows_the_ssds_copy(request: pytest.FixtureRequest, kind: str) -> None:
    async with house(request.getfixturevalue(kind)) as node:
        await node.tiers.pull(node.card)
        shutil.rmtree(node.card.checkpoint.path)
        assert not await node.card.is_whole()
        again = await node.tiers.describe(node.source.url)
        assert await again.is_whole()
        assert (again.model_id, again.checkpoint.identity) == (node.card.model_id, node.card.checkpoint.identity)
        assert node.tiers.is_on_ssd(again)
        asked = len(node.source.reads)
        async with asyncio.timeout(60):
            (await node.tiers.lease(again)).release()
        assert len(node.source.reads) == asked
