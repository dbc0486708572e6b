"""The source's side of a move: what its reader still has, and when it stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest
from test_supervision import now_s, turn, virtually

from sllm_actor.actors.handing_over import HandingOver, Live
from sllm_actor.actors.prepared import MigrationLimits
from sllm_actor.domain import FinishReason, ModelName, NodeId, RequestId, Sampling
from sllm_actor.domain.tokens import pack_uint32
from sllm_actor.errors import MigrationFailed
from sllm_actor.messages.generation import Finished, Generate, Migrated, Tokens
from sllm_actor.messages.migration import ExtendPrepared, HandedOver, MigrateOut, Prepare, Prepared
from sllm_actor.runtime import ActorRef
from sllm_actor.testing.virtual_loop import VirtualLoop

ID = RequestId("r")
PATIENCE_S = 5.0
LIMITS = MigrationLimits(
    max_rounds=8, threshold_tokens=1, round_timeout_s=60.0, hand_over_timeout_s=PATIENCE_S, take_over_timeout_s=10.0
)


class Destination:
    """Is as far as it can be at once, but as often as it is told to wait, and notes what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[bytes, bool]] = []
        self.news = asyncio.Event()
        self.news.set()

    async def stream(self, _: Prepare) -> AsyncGenerator[Prepared, None]:
        while True:
            await self.news.wait()
            self.news.clear()
            yield Prepared(known_tokens=0)

    async def ask(self, message: ExtendPrepared, *, timeout_s: float) -> None:
        self.heard.append((message.token_ids, message.last))
        self.news.set()


class Source:
    """An answer with some tokens, on its way to a destination."""

    def __init__(self) -> None:
        sampling = Sampling(max_tokens=100, temperature=0.0, top_p=1.0, seed=0)
        self.live = Live(Generate(request_id=ID, model=ModelName("m"), prompt=pack_uint32([1]), sampling=sampling))
        self.destination = Destination()
        for _ in range(3):
            self.generates()
        message = MigrateOut(
            request_id=ID, migration_id="m1", instance_id="i2", model=ModelName("m"), node=NodeId("n2"), worker="w",
            address="",
        )  # fmt: skip
        target = cast(ActorRef, self.destination)
        handing = HandingOver(self.live, message, target, LIMITS, VirtualLoop.running().clock)
        self.move = asyncio.ensure_future(handing.run())

    def generates(self) -> None:
        index = len(self.live.stream.token_ids)
        self.live.stream.put(Tokens(request_id=ID, index=index, token_ids=(10 + index,)))

    async def given(self) -> list[Any]:
        """Take what the reader finds up to the hand-over: tokens, and how it goes on."""
        found: list[Any] = []
        while not found or not isinstance(found[-1], Migrated):
            item = await self.live.stream.get()
            found += item.token_ids if isinstance(item, Tokens) else [item]
        return found

    async def moved(self) -> HandedOver:
        return await self.move


@virtually
async def test_the_reader_has_the_token_that_was_being_computed_and_the_destination_only_hears_that_no_more_come() -> (
    None
):
    source = Source()
    await turn()
    assert source.destination.heard == [], "nothing is said before that token comes"
    source.generates()
    source.generates()  # It came before the source's loop had its turn.
    assert (await source.moved()).rounds == 1
    assert source.destination.heard == [(b"", True)]
    assert (await source.given())[:-1] == [10, 11, 12, 13, 14]


@virtually
async def test_what_comes_while_the_destination_is_told_is_not_given() -> None:
    source = Source()
    await turn()
    source.generates()
    while not source.destination.heard:
        await asyncio.sleep(0)
    source.generates()
    await source.moved()
    assert (await source.given())[:-1] == [10, 11, 12, 13]


@virtually
async def test_tokens_of_a_round_are_sent_as_long_as_there_are_many() -> None:
    source = Source()
    source.destination.news.clear()
    await turn()
    source.generates()
    source.generates()
    source.destination.news.set()
    await turn()
    source.generates()
    assert (await source.moved()).rounds == 2
    assert source.destination.heard == [(pack_uint32([13, 14]), False), (b"", True)]


@virtually
async def test_an_answer_whose_next_token_does_not_come_is_handed_over_without() -> None:
    begun_s, source = now_s(), Source()
    await source.moved()
    assert now_s() - begun_s == pytest.approx(PATIENCE_S)
    assert (await source.given())[:-1] == [10, 11, 12]


@pytest.mark.parametrize("ends", ["finished", "reader left"])
def test_one_that_ends_instead_is_not_handed_over(ends: str) -> None:
    @virtually
    async def test() -> None:
        source = Source()
        await turn()
        if ends == "finished":
            reason = FinishReason.STOP
            source.live.stream.put(Finished(request_id=ID, reason=reason, prompt_tokens=1, generated_tokens=3))
        else:
            source.live.stream.leave()
        with pytest.raises(MigrationFailed, match="ended before"):
            await source.moved()
        assert (source.destination.heard, source.live.moving) == ([], None)

    test()
