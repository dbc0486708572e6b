"""What every metadata store promises, held by each of them: SQLite, memory, and a real etcd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metadata_stores import LIMITS, UNPACKED, forget_changes, is_compacted, opened, values, watched, wipe

from sllm_actor.errors import Fenced, LeaseLost, MetadataFailed, MetadataInvalid
from sllm_actor.metadata import (
    Absent,
    CreatedAt,
    Delete,
    HasValue,
    Kind,
    LeaseId,
    Present,
    Put,
    Store,
    StoreLimits,
    Unchanged,
)
from sllm_actor.metadata.election import Leader, Seat, campaign, commit_fenced, observe, resign, unseat
from sllm_actor.metadata.follow import View, follow
from sllm_actor.metadata.store import Changes, Condition, Listing, Operation, prefix_end
from sllm_actor.runtime import SystemClock
from sllm_actor.testing.etcd import EtcdCluster, running_etcd
from sllm_actor.testing.simulated_store import MemoryStore

KINDS = ["sqlite", "memory", "etcd"]
CLOCK = SystemClock()


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with running_etcd(tmp_path_factory.mktemp("etcd"), UNPACKED) as cluster:
        yield cluster


@pytest.fixture(params=KINDS)
async def store(request: pytest.FixtureRequest, tmp_path: Path, etcd: EtcdCluster) -> AsyncIterator[Store]:
    async with opened(request.param, tmp_path, etcd) as store:
        yield store


async def test_values_of_any_bytes_are_put_got_and_deleted(store: Store) -> None:
    assert await store.get("a") is None
    every_byte = bytes(range(256)) * 4
    first = await store.put("a", every_byte)
    second = await store.put("empty", b"")
    assert second > first
    found = await store.get("a")
    assert found is not None
    assert (found.key, found.value, found.created, found.changed, found.lease) == ("a", every_byte, first, first, None)
    empty = await store.get("empty")
    assert empty is not None and empty.value == b""
    assert await store.get("A") is None
    assert await store.delete("a")
    assert not await store.delete("a")
    assert await store.get("a") is None


async def test_a_value_that_is_replaced_keeps_its_creation_and_one_that_comes_back_has_a_new_one(store: Store) -> None:
    created = await store.put("a", b"1")
    changed = await store.put("a", b"2")
    fact = await store.get("a")
    assert fact is not None and (fact.created, fact.changed) == (created, changed)
    await store.delete("a")
    again = await store.put("a", b"3")
    fact = await store.get("a")
    assert fact is not None and fact.created == fact.changed == again > changed


async def test_a_listing_has_the_keys_of_a_prefix_in_order_and_no_others(store: Store) -> None:
    keys = ["models/b", "models/a", "models", "models_x", "nodes/a", "models/%", "models/a/c", "Models/a", "models0"]
    for key in keys:
        await store.put(key, key.encode())
    listing = await store.list("models/")
    assert [fact.key for fact in listing.facts] == ["models/%", "models/a", "models/a/c", "models/b"]
    assert [fact.value for fact in listing.facts] == [fact.key.encode() for fact in listing.facts]
    assert [fact.key for fact in (await store.list("models/a")).facts] == ["models/a", "models/a/c"]
    assert (await store.list("%")).facts == (await store.list("model_/")).facts == ()
    assert [fact.key for fact in (await store.list("")).facts] == sorted(keys, key=str.encode)


async def test_prefixes_at_the_end_of_the_alphabet_are_ranges_too(store: Store) -> None:
    last = "\U0010ffff"
    for key in (last, last * 2, "a" + last, "a" + last + "b", "b", "\x7f", "\x80", "\u07ff", "\uffff"):
        await store.put(key, b"")
    assert [fact.key for fact in (await store.list(last)).facts] == [last, last * 2]
    assert [fact.key for fact in (await store.list("a" + last)).facts] == ["a" + last, "a" + last + "b"]
    assert [fact.key for fact in (await store.list("\x7f")).facts] == ["\x7f"]


@given(st.lists(st.binary(max_size=4), max_size=20), st.binary(max_size=3))
def test_the_end_of_a_prefix_parts_what_begins_with_it_from_what_comes_after(keys: list[bytes], prefix: bytes) -> None:
    end = prefix_end(prefix)
    for key in [*keys, prefix, prefix + b"\xff", b"\xff" * 3]:
        assert key.startswith(prefix) == (prefix <= key and (end is None or key < end))


async def test_what_is_out_of_bounds_is_refused_and_the_bound_itself_is_not(store: Store) -> None:
    for key in ("", "a\0b", "\ud800", "a" * (LIMITS.key_bytes + 1), "ä" * (LIMITS.key_bytes // 2 + 1)):
        with pytest.raises(MetadataInvalid):
            await store.put(key, b"")
        with pytest.raises(MetadataInvalid):
            await store.get(key)
    with pytest.raises(MetadataInvalid):
        await store.put("a", bytes(LIMITS.value_bytes + 1))
    many: list[Operation] = [Put(f"k{k}", b"") for k in range(LIMITS.commit_operations + 1)]
    twice: list[Operation] = [Put("a", b""), Delete("a")]
    large: list[Operation] = [Put(f"{k}", bytes(700_000)) for k in range(2)]
    for operations in (many, twice, large):
        with pytest.raises(MetadataInvalid):
            await store.commit([], operations)
    with pytest.raises(MetadataInvalid):
        await store.commit([Absent(f"k{k}") for k in range(LIMITS.commit_operations + 1)], [])
    for ttl_s in (0, -1, LIMITS.lease_ttl_s + 1):
        with pytest.raises(MetadataInvalid):
            await store.grant(ttl_s)
    for revision in (0, -1, 2**63):
        with pytest.raises(MetadataInvalid):
            await anext(store.watch("", revision))
    assert (await store.list("")).facts == ()
    await store.put("a" * LIMITS.key_bytes, bytes(LIMITS.value_bytes))
    conditions = [Absent(f"k{k}") for k in range(LIMITS.commit_operations)]
    assert (await store.commit(conditions, many[:-1])).done
    assert len((await store.list("k")).facts) == LIMITS.commit_operations


async def test_each_condition_holds_when_it_is_true_and_only_then(store: Store) -> None:
    created = await store.put("a", b"1")
    changed = await store.put("a", b"2")
    holding: list[Condition] = [
        Absent("b"), Present("a"), Unchanged("a", changed), CreatedAt("a", created), HasValue("a", b"2"),
    ]  # fmt: skip
    failing: list[Condition] = [
        Absent("a"), Present("b"), Unchanged("a", created), CreatedAt("a", changed), HasValue("a", b"1"),
        Unchanged("b", changed), CreatedAt("b", created), HasValue("b", b""), HasValue("a", b""),
    ]  # fmt: skip
    for condition in holding:
        assert (await store.commit([condition], [Put("done", repr(condition).encode())])).done
    assert (await store.commit(holding, [Delete("done")])).done
    for condition in failing:
        outcome = await store.commit([*holding, condition], [Put("done", b"")])
        assert not outcome.done
        fact = outcome.fact("a")
        assert fact is not None and fact.value == b"2" and outcome.fact("b") is None
    assert await store.get("done") is None


async def test_a_commit_is_one_revision_and_all_or_nothing(store: Store) -> None:
    await store.put("old", b"")
    await store.put("kept", b"")
    before = (await store.list("")).revision
    outcome = await store.commit([Absent("new")], [Put("new", b"1"), Delete("old"), Delete("never"), Put("kept", b"2")])
    assert outcome.done and outcome.revision > before
    facts = (await store.list("")).facts
    assert [(fact.key, fact.value) for fact in facts] == [("kept", b"2"), ("new", b"1")]
    assert {fact.changed for fact in facts} == {outcome.revision}
    assert not (await store.commit([Absent("new")], [Put("kept", b"3"), Delete("new")])).done
    assert (await store.list("")).facts == facts
    (changes,) = await watched(store, "", before + 1, 1)
    assert sorted(values([changes])) == [("kept", b"2"), ("new", b"1"), ("old", None)]
    assert changes.revision == outcome.revision


async def test_what_is_held_under_a_lease_goes_when_its_time_is_over_all_of_it_at_once(store: Store) -> None:
    lease = await store.grant(1)
    assert lease.ttl_s >= 1
    for key in ("b", "a", "replaced"):
        await store.put(key, b"", lease.id)
    await store.put("replaced", b"")
    last = await store.put("free", b"")
    fact = await store.get("a")
    assert fact is not None and fact.lease == lease.id
    (gone,) = await watched(store, "", last + 1, 1)
    assert [(change.kind, change.key) for change in gone.changes] == [(Kind.DELETED, "a"), (Kind.DELETED, "b")]
    assert [fact.key for fact in (await store.list("")).facts] == ["free", "replaced"]
    with pytest.raises(LeaseLost):
        await store.keep_alive(lease.id)


async def test_a_lease_that_has_ended_holds_nothing_more_and_stays_ended(store: Store) -> None:
    lease = await store.grant(60)
    await store.put("a", b"", lease.id)
    await store.keep_alive(lease.id)
    await store.revoke(lease.id)
    assert await store.get("a") is None
    await store.revoke(lease.id)
    with pytest.raises(LeaseLost):
        await store.keep_alive(lease.id)
    with pytest.raises(LeaseLost):
        await store.put("a", b"", lease.id)
    with pytest.raises(LeaseLost):
        await store.commit([], [Put("c", b""), Put("a", b"", lease.id)])
    with pytest.raises(LeaseLost):
        await store.commit([], [Put("a", b"", LeaseId(12345))])
    assert (await store.list("")).facts == ()
    # What others hold is as it was.
    assert await store.put("b", b"")


async def test_a_watch_tells_of_every_change_once_in_order_also_of_past_ones(store: Store) -> None:
    first = await store.put("w/a", b"0")
    await store.put("other", b"")
    await store.put("w/b", b"1")
    live = asyncio.ensure_future(watched(store, "w/", first, 7))
    await store.delete("w/a")
    await store.commit([], [Put("w/a", b"2"), Put("other", b"x"), Put("w/c", b"3")])
    await store.put("w/a", b"2")
    await store.put("w/a", b"2")
    await store.put("w/end", b"")
    found = await live
    assert sorted(values(found[3:4])) == [("w/a", b"2"), ("w/c", b"3")]
    assert values(found[:3] + found[4:]) == [
        ("w/a", b"0"), ("w/b", b"1"), ("w/a", None), ("w/a", b"2"), ("w/a", b"2"), ("w/end", b""),
    ]  # fmt: skip
    revisions = [changes.revision for changes in found]
    assert revisions == sorted(set(revisions))
    assert await watched(store, "w/", revisions[3], 4) == found[3:]


async def test_changes_that_are_no_longer_kept_are_told_of_and_a_listing_goes_on_from_there(
    store: Store, etcd: EtcdCluster
) -> None:
    old = await store.put("a", b"1")
    await forget_changes(store, etcd)
    assert await is_compacted(store, "", old)
    listing = await store.list("")
    await store.put("a", b"2")
    assert values(await watched(store, "", listing.revision + 1, 1)) == [("a", b"2")]


async def test_a_view_stays_true_while_its_facts_come_and_go(store: Store) -> None:
    await store.put("v/a", b"1")
    views = follow(store, "v/", CLOCK)
    assert [fact.value for fact in (await anext(views)).facts.values()] == [b"1"]
    await store.commit([], [Delete("v/a"), Put("v/b", b"2"), Put("other", b"")])
    assert [fact.value for fact in (await anext(views)).facts.values()] == [b"2"]
    await views.aclose()


async def test_who_has_seen_a_view_is_given_what_changes_behind_it(store: Store) -> None:
    await store.put("v/a", b"1")
    await store.put("v/b", b"1")
    listing = await store.list("v/")
    facts = {fact.key: fact for fact in listing.facts}
    await store.commit([], [Delete("v/a"), Put("v/c", b"2")])
    views = follow(store, "v/", CLOCK, View(listing.revision, facts, facts.keys(), True))
    second = await anext(views)
    assert (sorted(second.facts), sorted(second.changed), second.listed) == (["v/b", "v/c"], ["v/a", "v/c"], False)
    assert sorted(facts) == ["v/a", "v/b"], "the view is whoever's it was"
    await views.aclose()


async def test_who_has_seen_a_view_that_is_too_old_is_given_a_new_one() -> None:
    store = MemoryStore(CLOCK, StoreLimits(kept_changes=4))
    await store.put("v/a", b"1")
    seen = View((await store.list("v/")).revision, {}, (), True)
    for number in range(10):
        await store.put("v/b", str(number).encode())
    views = follow(store, "v/", CLOCK, seen)
    first = await anext(views)
    assert (sorted(first.facts), first.listed) == (["v/a", "v/b"], True)
    await views.aclose()
    await store.close()


async def test_a_view_names_what_may_have_changed_in_it_and_whether_it_was_listed_anew(store: Store) -> None:
    await store.put("v/a", b"1")
    await store.put("v/b", b"1")
    views = follow(store, "v/", CLOCK)
    first = await anext(views)
    assert (set(first.changed), first.listed) == ({"v/a", "v/b"}, True)
    await store.commit([], [Delete("v/a"), Put("v/c", b"2"), Put("other", b"")])
    second = await anext(views)
    assert (sorted(second.changed), second.listed) == (["v/a", "v/c"], False)
    await views.aclose()


async def test_who_watches_a_quiet_prefix_hears_of_it_after_more_changes_elsewhere_than_are_kept() -> None:
    store = MemoryStore(CLOCK, StoreLimits(kept_changes=4))
    from_revision = (await store.list("")).revision + 1
    sleeping = asyncio.ensure_future(watched(store, "quiet/", from_revision, 1))
    for number in range(10):
        await store.put("loud", str(number).encode())
    await store.put("quiet/a", b"1")
    assert values(await sleeping) == [("quiet/a", b"1")]
    await store.close()


async def test_of_many_who_count_at_once_nobody_is_lost(store: Store) -> None:
    from_revision = await store.put("counter", b"0")

    async def count_up(times: int) -> None:
        done = 0
        while done < times:
            fact = await store.get("counter")
            assert fact is not None
            put = Put("counter", str(int(fact.value) + 1).encode())
            done += (await store.commit([Unchanged("counter", fact.changed)], [put])).done

    await asyncio.gather(*(count_up(4) for _ in range(8)))
    found = await watched(store, "counter", from_revision, 33)
    assert [int(value or b"") for _, value in values(found)] == list(range(33))


@dataclass(frozen=True)
class Did:
    """One operation of a history: between which moments, and what it has seen or written."""

    begun: int
    ended: int
    wrote: bool
    revision: int
    value: bytes


async def test_a_history_of_reads_and_writes_is_that_of_one_register(store: Store) -> None:
    """Revisions witness the order: every read gives the last write's value, and nothing begins before what ended."""
    moments = iter(range(10**6))
    history: list[Did] = []
    start = await store.put("register", b"start")
    history.append(Did(next(moments), next(moments), True, start, b"start"))

    async def act(who: int) -> None:
        random = Random(who)
        for k in range(12):
            begun = next(moments)
            if random.random() < 0.5:
                fact = await store.get("register")
                assert fact is not None
                history.append(Did(begun, next(moments), False, fact.changed, fact.value))
            else:
                value = f"{who}-{k}".encode()
                known = history[-1].revision
                conditions = [Unchanged("register", known)] if random.random() < 0.5 else []
                outcome = await store.commit(conditions, [Put("register", value)])
                if outcome.done:
                    history.append(Did(begun, next(moments), True, outcome.revision, value))

    await asyncio.gather(*(act(who) for who in range(6)))
    written = {did.revision: did.value for did in history if did.wrote}
    assert len(written) == sum(did.wrote for did in history)
    for did in history:
        assert written[did.revision] == did.value
        for later in history:
            if did.ended < later.begun:
                assert (did.revision < later.revision) if later.wrote else (did.revision <= later.revision)


KEYS = st.sampled_from(["a", "b", "a/b", "\u00e9"])
VALUES = st.binary(max_size=3)
CONDITIONS = st.one_of(KEYS.map(Absent), KEYS.map(Present), st.builds(HasValue, KEYS, VALUES))
OPERATIONS = st.lists(st.one_of(st.builds(Put, KEYS, VALUES), KEYS.map(Delete)), max_size=3, unique_by=lambda o: o.key)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(commits=st.lists(st.tuples(st.lists(CONDITIONS, max_size=2), OPERATIONS), max_size=8))
async def test_any_commits_do_what_they_do_to_a_dict(
    kind: str,
    tmp_path_factory: pytest.TempPathFactory,
    etcd: EtcdCluster,
    commits: list[tuple[list[Absent | Present | HasValue], list[Put | Delete]]],
) -> None:
    known: dict[str, bytes] = {}

    def holds(condition: Absent | Present | HasValue) -> bool:
        if isinstance(condition, HasValue):
            return known.get(condition.key) == condition.value
        return (condition.key in known) is isinstance(condition, Present)

    async with opened(kind, tmp_path_factory.mktemp("store"), etcd) as store:
        for conditions, operations in commits:
            outcome = await store.commit(conditions, operations)
            assert outcome.done == all(holds(condition) for condition in conditions)
            for operation in operations if outcome.done else ():
                if isinstance(operation, Put):
                    known[operation.key] = operation.value
                else:
                    known.pop(operation.key, None)
            facts = (await store.list("")).facts
            assert [(fact.key, fact.value) for fact in facts] == sorted(
                known.items(), key=lambda item: item[0].encode()
            )


async def test_candidates_lead_one_at_a_time_in_the_order_in_which_they_came(store: Store) -> None:
    leases = [await store.grant(60) for _ in range(3)]
    first = await campaign(store, "e", leases[0].id, b"first")
    waiting = []
    for number, lease in enumerate(leases[1:], 1):
        waiting.append(asyncio.ensure_future(campaign(store, "e", lease.id, b"later")))
        while len((await store.list("elections/e/")).facts) <= number:
            await asyncio.sleep(0)
    assert (await campaign(store, "e", leases[0].id, b"again")) == first
    assert not any(candidate.done() for candidate in waiting)
    await resign(store, first)
    second = await waiting[0]
    assert not waiting[1].done()
    # The end of a lease is as good as a resignation.
    await store.revoke(leases[1].id)
    third = await waiting[1]
    assert first.epoch < second.epoch < third.epoch


async def test_a_candidate_that_is_cancelled_is_one_no_more_and_one_without_a_lease_is_none(store: Store) -> None:
    leases = [await store.grant(60) for _ in range(3)]
    first = await campaign(store, "e", leases[0].id, b"")
    second = asyncio.ensure_future(campaign(store, "e", leases[1].id, b""))
    while len((await store.list("elections/e/")).facts) < 2:
        await asyncio.sleep(0)
    second.cancel()
    await asyncio.wait([second])
    assert second.cancelled()
    assert [fact.created for fact in (await store.list("elections/e/")).facts] == [first.epoch]
    third = asyncio.ensure_future(campaign(store, "e", leases[2].id, b""))
    while len((await store.list("elections/e/")).facts) < 2:
        await asyncio.sleep(0)
    await store.revoke(leases[2].id)
    with pytest.raises(LeaseLost):
        await third
    with pytest.raises(LeaseLost):
        await campaign(store, "e", leases[2].id, b"")


async def test_a_former_leader_can_not_write_and_its_successor_can(store: Store) -> None:
    leases = [await store.grant(60) for _ in range(2)]
    first = await campaign(store, "e", leases[0].id, b"")
    assert (await commit_fenced(store, first, [], [Put("owned", b"1")])).done
    assert not (await commit_fenced(store, first, [Absent("owned")], [Put("owned", b"2")])).done
    await store.revoke(leases[0].id)
    second = await campaign(store, "e", leases[1].id, b"")
    with pytest.raises(Fenced):
        await commit_fenced(store, first, [], [Put("owned", b"late")])
    with pytest.raises(Fenced):
        await commit_fenced(store, Seat(second.key, first.epoch), [], [Put("owned", b"late")])
    assert (await commit_fenced(store, second, [], [Put("owned", b"3")])).done


async def test_who_leads_is_told_at_once_and_whenever_it_changes(store: Store) -> None:
    leaders = observe(store, "e", CLOCK)
    assert await anext(leaders) is None
    leases = [await store.grant(60) for _ in range(2)]
    first = await campaign(store, "e", leases[0].id, b"one")
    assert await anext(leaders) == Leader(b"one", first.key, first.epoch)
    second = asyncio.ensure_future(campaign(store, "e", leases[1].id, b"two"))
    while len((await store.list("elections/e/")).facts) < 2:
        await asyncio.sleep(0)
    await resign(store, first)
    assert await anext(leaders) == Leader(b"two", (await second).key, (await second).epoch)
    await store.revoke(leases[1].id)
    assert await anext(leaders) is None
    await leaders.aclose()
    await wipe(store)


async def test_a_leader_that_is_unseated_is_fenced_and_followed_though_its_lease_lives(store: Store) -> None:
    leases = [await store.grant(3600) for _ in range(2)]
    first = await campaign(store, "e", leases[0].id, b"one")
    second = asyncio.ensure_future(campaign(store, "e", leases[1].id, b"two"))
    one = Leader(b"one", first.key, first.epoch)
    assert not await unseat(store, replace(one, epoch=first.epoch + 1))
    assert await unseat(store, one)
    assert (await second).epoch > first.epoch
    assert not await unseat(store, one)
    with pytest.raises(Fenced):
        await commit_fenced(store, first, [], [Put("owned", b"late")])
    assert (await commit_fenced(store, await second, [], [])).done
    await wipe(store)


class Failing:
    """A store that fails its first listing and its first watch in a way that nobody has foreseen."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._wrong = [MetadataFailed("as never before"), MetadataFailed("nor this")]

    async def list(self, prefix: str) -> Listing:
        if len(self._wrong) == 2:
            raise self._wrong.pop()
        return await self._store.list(prefix)

    async def watch(self, prefix: str, from_revision: int) -> AsyncGenerator[Changes, None]:
        if self._wrong:
            raise self._wrong.pop()
        async with aclosing(self._store.watch(prefix, from_revision)) as changes:
            async for change in changes:
                yield change


async def test_who_follows_goes_on_whatever_the_store_says_meanwhile(store: Store) -> None:
    await store.put("v/a", b"1")
    failing = Failing(store)
    views = follow(cast(Any, failing), "v/", CLOCK)
    assert list((await anext(views)).facts) == ["v/a"]
    await store.put("v/b", b"2")
    while "v/b" not in (await anext(views)).facts:
        pass
    assert failing._wrong == []
    await views.aclose()
