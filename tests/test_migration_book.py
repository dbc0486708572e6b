"""Migrations in the metadata store: there while they are under way, and not after their coordinator."""

from __future__ import annotations

from test_membership import House, Node, in_a_house

from sllm_actor.actors.leased_facts import LeasedFacts
from sllm_actor.actors.migration_book import MIGRATIONS, SharedBook, under_way
from sllm_actor.domain import ModelName, NodeId, RequestId
from sllm_actor.domain.migration import MigrationRecord

RECORD = MigrationRecord(
    migration_id="a-1", request_id=RequestId("r"), model=ModelName("m"), source=NodeId("b"), destination=NodeId(""),
    coordinator=NodeId("a"), state="placing",
)  # fmt: skip


def book_of(house: House, node: Node) -> tuple[SharedBook, LeasedFacts]:
    facts = LeasedFacts(node.way, node.membership, house.clock, "migrations")
    facts.start()
    return SharedBook(facts), facts


async def listed(house: House, count: int) -> tuple[MigrationRecord, ...]:
    while len(found := await under_way(house.truth)) != count:
        await house.clock.sleep(0.01)
    return found


@in_a_house
async def test_a_migration_is_listed_for_everybody_until_it_ends(house: House) -> None:
    node = await house.node("a").start()
    book, facts = book_of(house, node)
    book.note(RECORD)
    assert await listed(house, 1) == (RECORD,)
    book.forget(RECORD)
    assert await listed(house, 0) == ()
    await facts.stop()
    await node.stop()


@in_a_house
async def test_the_migrations_of_a_coordinator_that_dies_are_cancelled_with_its_lease(house: House) -> None:
    node = await house.node("a").start()
    book, facts = book_of(house, node)
    book.note(RECORD)
    await listed(house, 1)
    node.way.cut = True
    assert await listed(house, 0) == ()
    await facts.stop()
    await node.stop()


@in_a_house
async def test_one_that_ended_while_the_store_was_out_of_reach_is_not_listed_when_it_is_back(house: House) -> None:
    node = await house.node("a").start()
    book, facts = book_of(house, node)
    book.note(RECORD)
    await listed(house, 1)
    node.way.cut = True
    book.forget(RECORD)
    await listed(house, 0)
    node.way.cut = False
    await house.until(lambda: node.membership.standing is not None)
    await house.clock.sleep(5)
    assert await under_way(house.truth) == ()
    await facts.stop()
    await node.stop()


@in_a_house
async def test_what_a_later_version_wrote_is_passed_over(house: House) -> None:
    await house.truth.put(f"{MIGRATIONS}z-1", b"\xc1")
    assert await under_way(house.truth) == ()
