"""What waits in an instance for requests of others gives everything back, whenever it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, cast

import pytest
from test_supervision import virtual_system, virtually

from sllm_actor.actors.prepared import PreparedRequests
from sllm_actor.actors.slots import Slots
from sllm_actor.config import Config
from sllm_actor.domain import ModelName, RequestId, Sampling
from sllm_actor.errors import MigrationFailed
from sllm_actor.messages.generation import Generate
from sllm_actor.messages.migration import ExtendPrepared, Prepare
from sllm_actor.node.making import manager_limits_of
from sllm_actor.runtime.tasks import TaskScope

SAMPLING = Sampling(max_tokens=1, temperature=0.0, top_p=1.0, seed=0)


class SlowEngine:
    """Holds what it is given, and never gets anywhere."""

    handed_over = False

    @contextmanager
    def park(self, _: Generate) -> Iterator[SlowEngine]:
        yield self

    async def reached(self) -> int:
        return await asyncio.Future()


@virtually
async def test_one_whose_source_leaves_at_any_moment_gives_its_slot_back() -> None:
    for turns in (0, 1, 5):
        await leave_after(turns)


async def leave_after(turns: int) -> None:
    visitors: list[str] = []

    @asynccontextmanager
    async def held(request: Generate) -> AsyncIterator[tuple[Generate, object]]:
        yield request, None

    made, slots, scope = virtual_system(), Slots(1), TaskScope("test")
    requests = PreparedRequests(
        cast(Any, SlowEngine()), slots, made.clock, held, manager_limits_of(Config()).migration,
        lambda name, _: visitors.append(name), visitors.remove,
    )  # fmt: skip
    request = Generate(request_id=RequestId("r"), model=ModelName("m"), prompt=b"", sampling=SAMPLING)
    steps = requests.prepare(Prepare(migration_id="m1", request=request), scope)
    waiting = asyncio.ensure_future(anext(steps))
    await asyncio.sleep(0)
    assert (slots.take_now(), visitors) == (False, ["m1"])
    for _ in range(turns):
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    for _ in range(5):
        await asyncio.sleep(0)
    assert (slots.take_now(), visitors) == (True, [])
    with pytest.raises(MigrationFailed):
        requests.extend(ExtendPrepared(migration_id="m1", token_ids=b"", last=True), scope)
    await scope.close()
    await made.close()
