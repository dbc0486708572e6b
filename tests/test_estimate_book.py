"""What one Scheduler has learned of starts is what the next one begins with."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import SMALL
from test_supervision import virtual_system, virtually

from sllm_actor.actors.estimate_book import ESTIMATES, MAX_AT_ONCE, WRITE_EVERY_S, EstimateBook
from sllm_actor.domain import NodeId
from sllm_actor.errors import Fenced
from sllm_actor.metadata import Outcome, SqliteStore
from sllm_actor.metadata.store import Condition, Operation
from sllm_actor.policy.estimator import HOST, Estimator
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.testing.node_process import running_node

A = NodeId("a")


def taught(*nodes: str) -> Estimator:
    estimator = Estimator()
    for node in nodes:
        estimator.learn_start(NodeId(node), HOST, "x", 100, 0.5)
    return estimator


def test_what_was_written_is_begun_with_and_what_is_unreadable_passed_over(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = await SqliteStore.open(tmp_path / "m.db")
        book = EstimateBook(store, store.commit, SystemClock())
        await book.write(taught("a"))
        await store.put(ESTIMATES + "b", b"of another version")
        successor = Estimator()
        keeping = asyncio.ensure_future(book.keep(successor))
        while not successor.starts(A, HOST, "x"):
            await asyncio.sleep(0)
        assert successor.constant_s(A, HOST, "x", 100, 0.0) == 0.5
        assert successor.changed == set()
        keeping.cancel()
        await asyncio.wait([keeping])
        await store.close()

    asyncio.run(scenario())


@virtually
async def test_it_is_written_in_batches_now_and_then_and_by_who_leads_alone() -> None:
    made, written, leads = virtual_system(), list[int](), False

    async def commit(_: Sequence[Condition], operations: Sequence[Operation]) -> Outcome:
        if not leads:
            raise Fenced("another one leads")
        written.append(len(operations))
        return Outcome(done=True, revision=1)

    estimator = taught(*(f"n{number}" for number in range(MAX_AT_ONCE + 4)))
    book = EstimateBook(Nothing(), commit, made.clock)  # type: ignore[arg-type]
    keeping = asyncio.ensure_future(book.keep(estimator))
    await made.clock.sleep(1.5 * WRITE_EVERY_S)
    assert (written, len(estimator.changed)) == ([], MAX_AT_ONCE + 4)
    leads = True
    await made.clock.sleep(3 * WRITE_EVERY_S)
    assert (written, estimator.changed) == ([MAX_AT_ONCE, 4], set())
    keeping.cancel()
    await asyncio.wait([keeping])
    await made.close()


class Nothing:
    """A store with nothing in it."""

    async def list(self, _: str) -> Nothing:
        return self

    facts = ()


@pytest.mark.usefixtures("warm_starts")
def test_a_node_that_is_started_again_knows_what_its_starts_took(tmp_path: Path) -> None:
    seen: list[float] = []
    for _ in range(2):
        with running_node(tmp_path, *SMALL) as node:
            if not seen:
                node.deploy("builtin:demo", "demo")
            reply = node.request(
                "POST",
                "/v1/completions",
                {"model": "demo", "prompt": "1 + 1", "max_tokens": 1},
                {"X-Request-Id": "first"},
            )
            assert reply.status == 200
            chosen = node.call("GET", "/admin/explain/first")["decision"]["chosen"]
            seen.append(next(term for term in chosen["terms"] if term["name"] == "engine")["inputs"]["starts_seen"])
            node.stop()
    assert seen == [0, 1]
