"""A checkpoint from a source to host memory and to the SSD, and from there again; and what goes wrong on the way."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from pathlib import Path

import pytest
from checkpoints import folder_of
from houses import WEIGHTS, House, house, spoiled
from houses import origin as origin
from houses import stock as stock
from loaders import CHUNK, LIMIT_S, until
from loaders import mover as mover
from scripted_source import ScriptedSource

from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.errors import (
    CheckpointCorrupt,
    ModelTooLarge,
    NoCapacity,
    SllmError,
    SourceChanged,
    SourceInvalid,
    SourceUnreachable,
)
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.sources.source import SourceFile

# ---- up the tiers ----


@pytest.mark.parametrize("kind", ["origin", "stock"])
async def test_a_checkpoint_goes_from_its_source_to_memory_and_the_ssd_and_from_each_again(
    request: pytest.FixtureRequest, kind: str, mover: str
) -> None:
    origin: Path = request.getfixturevalue(kind)
    async with house(origin) as node:
        weights = [(origin / file.name).stat().st_size for file in node.card.checkpoint.files]
        lease = await node.lease()
        assert node.bytes_of(lease) == node.expected()
        assert lease.report.remote_bytes == lease.report.total_bytes == sum(weights)
        asked = len(node.source.reads)
        again = await node.lease()
        assert again.report.pool_bytes == sum(weights)
        await node.stored()
        assert len(node.source.reads) == asked
        lease.release()
        again.release()
    async with house(origin) as node:
        assert node.tiers.is_on_ssd(node.card)
        asked = len(node.source.reads)
        lease = await node.lease()
        assert node.bytes_of(lease) == node.expected()
        assert (lease.report.remote_bytes, lease.report.pool_bytes) == (0, 0)
        assert len(node.source.reads) == asked, "a card and the SSD are enough"


async def test_those_who_want_one_checkpoint_share_one_load(origin: Path) -> None:
    async with house(origin) as node:
        asked = len(node.source.reads)
        places: list[object] = []
        leases = await asyncio.gather(*(node.lease(on_placed=places.append) for _ in range(5)))
        assert len(node.source.reads) - asked == 17
        assert places == [leases[0].files] * 5
        assert all(node.bytes_of(lease) == node.expected() for lease in leases)
        for lease in leases:
            lease.release()
        await until(lambda: [resident.leases for resident in node.tiers.loader.residents()] == [0])
        assert node.tiers.is_on_ssd(node.card)


async def test_the_first_load_does_not_wait_for_the_ssd(origin: Path) -> None:
    async with house(origin) as node:
        held = asyncio.Event()

        async def gate(_: int) -> None:
            await held.wait()

        node.tiers.ssd._gate = gate
        lease = await node.lease()
        assert node.bytes_of(lease) == node.expected()
        assert not node.tiers.is_on_ssd(node.card)
        lease.release()
        assert [resident.leases for resident in node.tiers.loader.residents()] == [1], "what is stored can't be evicted"
        held.set()
        await node.stored()


async def test_two_sources_of_the_same_bytes_are_stored_once(origin: Path) -> None:
    async with house(origin) as node:
        (await node.lease()).release()
        await node.stored()
        shutil.copytree(origin, origin.parent / "other")
        other = ScriptedSource(origin.parent / "other", "test://other")
        node.tiers._open_source = node.tiers._remote._open_source = lambda _: other
        card = await node.tiers.describe("test://other")
        assert card.key != node.card.key
        lease = await node.tiers.lease(card)
        assert lease.report.pool_bytes == lease.report.total_bytes
        lease.release()
        assert len(node.tiers.ssd.entries()) == 1


async def test_a_load_that_nobody_waits_for_ends_and_the_next_goes_on_from_what_it_stored(origin: Path) -> None:
    async with house(origin) as node:
        arrived: list[int] = []
        stop = asyncio.Event()

        async def wait(file: SourceFile, at: int, into: memoryview) -> None:
            if len(arrived) >= 6:
                await stop.wait()

        node.source.before = wait
        scope = TaskScope("test")
        waiting = scope.spawn(node.lease(on_progress=lambda done, _: arrived.append(done)), "load")
        await until(lambda: len(arrived) >= 6 and node.tiers.ssd.entries()[0].done_bytes >= 6 * CHUNK)
        waiting.cancel()
        await asyncio.wait([waiting])
        await until(lambda: node.tiers.loader.free_bytes == node.tiers.loader.pool_bytes)
        assert node.source.under_way == 0
        stop.set()
        lease = await node.lease()
        assert node.bytes_of(lease) == node.expected()
        assert lease.report.ssd_bytes >= 6 * CHUNK - CHUNK
        assert lease.report.remote_bytes + lease.report.ssd_bytes == lease.report.total_bytes
        await scope.close()
        lease.release()
        await node.stored()


# ---- what a source does wrong ----


async def test_a_chunk_that_arrives_damaged_is_fetched_again(origin: Path, mover: str) -> None:
    async with house(origin) as node:
        node.source.after = spoiled(WEIGHTS, 3 * CHUNK, times=2)
        asked = len(node.source.reads)
        lease = await node.lease()
        assert node.bytes_of(lease) == node.expected()
        assert len(node.source.reads) - asked == 17 + 2
        lease.release()
        await node.stored()


async def test_a_chunk_that_always_arrives_damaged_is_named(origin: Path, mover: str) -> None:
    async with house(origin) as node:
        node.source.after = spoiled(WEIGHTS, 3 * CHUNK)
        with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors.*chunk 3"):
            await node.lease()
        await until(lambda: node.tiers.loader.free_bytes == node.tiers.loader.pool_bytes)
        with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors"):
            await node.tiers.pull(node.card)
        assert not node.tiers.is_on_ssd(node.card)
        node.source.after = None
        lease = await node.lease()
        assert lease.report.ssd_bytes > 0
        assert node.bytes_of(lease) == node.expected()
        lease.release()
        await node.stored()


@pytest.mark.parametrize("fault", [SourceChanged("another one"), SourceUnreachable("dead")])
async def test_a_source_that_fails_for_good_gives_its_error_to_all_who_wait(origin: Path, fault: SllmError) -> None:
    async with house(origin) as node:

        async def fail(file: SourceFile, at: int, into: memoryview) -> None:
            if at >= 5 * CHUNK:
                raise fault

        node.source.before = fail
        answers = await asyncio.gather(*(node.lease() for _ in range(3)), return_exceptions=True)
        assert [type(answer) for answer in answers] == [type(fault)] * 3
        assert node.tiers.loader.free_bytes == node.tiers.loader.pool_bytes
        assert [entry.partial for entry in node.tiers.ssd.entries()] == [True]


async def test_what_is_no_checkpoint_gets_no_card(tmp_path: Path) -> None:
    (tmp_path / "origin").mkdir()
    (tmp_path / "origin" / "config.json").write_text("{}")
    with pytest.raises(SourceInvalid, match="no weights"):
        async with house(tmp_path / "origin"):
            pass
    assert not list((tmp_path / "node").glob("cards/*"))


# ---- room ----


async def test_without_room_on_the_ssd_a_checkpoint_is_loaded_all_the_same(origin: Path) -> None:
    async with house(origin, quota_bytes=5 * CHUNK) as node:
        lease = await node.lease()
        assert node.bytes_of(lease) == node.expected()
        lease.release()
        with pytest.raises(ModelTooLarge):
            await node.tiers.pull(node.card)
        assert node.tiers.ssd.entries() == []


async def test_a_checkpoint_that_the_pool_can_t_hold_is_refused(origin: Path) -> None:
    async with house(origin, chunks=9) as node:
        with pytest.raises(ModelTooLarge):
            await node.lease()
        await node.tiers.pull(node.card)
        assert node.tiers.is_on_ssd(node.card)
        with pytest.raises(ModelTooLarge):
            await node.lease()


async def test_what_is_leased_is_not_evicted_for_a_load(origin: Path, tmp_path: Path) -> None:
    async with house(origin, chunks=20) as node:
        lease = await node.lease()
        await node.stored()
        folder_of(tmp_path / "more", 8 * CHUNK)
        more = ScriptedSource(tmp_path / "more", "test://more")
        node.tiers._open_source = node.tiers._remote._open_source = lambda _: more
        card = await node.tiers.describe("test://more")
        with pytest.raises(NoCapacity):
            await node.tiers.lease(card)
        lease.release()
        (await node.tiers.lease(card)).release()
        await until(lambda: node.tiers.is_on_ssd(card))


# ---- pulls ----


async def test_a_pull_goes_on_from_where_it_was_stopped_and_shows_how_far_it_is(origin: Path) -> None:
    async with house(origin) as node:
        steps: list[tuple[int, int]] = []
        async with contextlib.aclosing(node.tiers.pulled(node.card)) as progress:
            async for step in progress:
                steps.append(step)
                if step[0] >= 4 * CHUNK:
                    break
        await until(lambda: node.source.under_way == 0)
        (entry,) = node.tiers.ssd.entries()
        assert entry.partial
        assert 4 * CHUNK <= entry.done_bytes < entry.size_bytes
        asked = len(node.source.reads)
        steps = [step async for step in node.tiers.pulled(node.card)]
        assert steps[-1] == (node.card.checkpoint.size_bytes, node.card.checkpoint.size_bytes)
        assert steps == sorted(steps)
        assert steps[0][0] >= 4 * CHUNK, "what is there is told at once"
        assert len(node.source.reads) - asked <= 17 - 4
        assert node.tiers.is_on_ssd(node.card)
        assert [step async for step in node.tiers.pulled(node.card)][-1] == steps[-1]


@pytest.mark.parametrize(("chunks", "reads"), [(8, 4), (4, 2), (1, 1), (0, 1)])
async def test_pulls_have_no_more_chunks_under_way_than_their_memory_holds(
    origin: Path, chunks: int, reads: int
) -> None:
    async with house(origin, pull_memory_bytes=chunks * CHUNK) as node:
        most = 0

        async def count(*_: object) -> None:
            nonlocal most
            most = max(most, node.source.under_way)
            await asyncio.sleep(0)

        node.source.before = count
        await node.tiers.pull(node.card)
        assert most == reads


async def test_a_load_takes_over_from_a_pull_whose_caller_gets_the_copy_of_the_load(origin: Path) -> None:
    async with house(origin) as node:
        scope, begun, go = TaskScope("test"), asyncio.Event(), asyncio.Event()

        async def wait(file: SourceFile, at: int, into: memoryview) -> None:
            if at >= 4 * CHUNK:
                begun.set()
                await go.wait()

        node.source.before = wait
        pulling = scope.spawn(node.tiers.pull(node.card), "pull")
        await begun.wait()
        loading = scope.spawn(node.lease(), "load")
        await until(lambda: node.tiers.arriving(node.card) is not None)
        go.set()
        async with asyncio.timeout(LIMIT_S):
            lease = await loading
            await pulling
        assert node.tiers.is_on_ssd(node.card)
        assert node.bytes_of(lease) == node.expected()
        lease.release()
        await scope.close()


async def test_pulls_of_one_checkpoint_are_one_and_each_can_leave(origin: Path) -> None:
    async with house(origin) as node:
        scope = TaskScope("test")
        asked = len(node.source.reads)
        pulls = [scope.spawn(node.tiers.pull(node.card), f"pull-{k}") for k in range(3)]
        await until(lambda: node.source.under_way > 0)
        pulls[0].cancel()
        await asyncio.wait(pulls)
        assert [pull.cancelled() for pull in pulls] == [True, False, False]
        assert node.tiers.is_on_ssd(node.card)
        assert len(node.source.reads) - asked < 2 * 17
        await scope.close()


# ---- the SSD's own faults ----


@pytest.fixture
def stored(origin: Path) -> Path:
    """Where the weights are on the SSD of a node that has pulled the checkpoint."""

    async def pull() -> Path:
        async with house(origin) as node:
            await node.tiers.pull(node.card)
            (entry,) = node.tiers.ssd.entries()
            return entry.path

    return asyncio.run(pull())


async def test_a_copy_on_the_ssd_that_is_no_longer_what_it_was_is_given_up_for_the_source(
    origin: Path, stored: Path
) -> None:
    async with house(origin) as node:
        with (stored / WEIGHTS).open("r+b") as file:
            file.seek(3 * CHUNK)
            file.write(b"damage")
        lease = await node.lease(verify=True)
        assert node.bytes_of(lease) == node.expected()
        assert lease.report.remote_bytes == lease.report.total_bytes
        lease.release()
        await node.stored()


async def test_a_copy_on_the_ssd_that_has_lost_a_file_is_given_up_for_the_source(origin: Path, stored: Path) -> None:
    async with house(origin) as node:
        (stored / WEIGHTS).unlink()
        lease = await node.lease()
        assert node.bytes_of(lease) == node.expected()
        lease.release()
        await node.stored()


async def test_a_copy_that_was_evicted_and_fetched_again_is_read(origin: Path) -> None:
    async with house(origin, chunks=20) as node:
        for _ in range(2):
            await node.tiers.pull(node.card)
            lease = await node.lease()
            assert lease.report.remote_bytes == 0
            assert node.bytes_of(lease) == node.expected()
            lease.release()
            # Room for another evicts it from the pool, too.
            (await node.tiers.loader.reserve(read_folder(folder_of(origin.parent / "big", 19 * CHUNK)))).abandon()
            await node.tiers.ssd.evict(node.card.model_id)
            assert not node.tiers.is_on_ssd(node.card)


# ---- several sources ----


def with_mirror(node: House, mirror: ScriptedSource) -> None:
    remote, plain = node.tiers._remote, node.tiers._remote._open_source
    remote._mirrors = lambda model_id: [f"test://mirror/{model_id}"]
    remote._open_source = lambda url: mirror if url == f"test://mirror/{node.card.model_id}" else plain(url)


async def test_a_mirror_takes_over_from_a_source_that_dies_in_the_middle(origin: Path) -> None:
    shutil.copytree(origin, origin.parent / "mirror")
    async with house(origin) as node:
        mirror = ScriptedSource(origin.parent / "mirror", "test://mirror")
        with_mirror(node, mirror)
        asked = len(node.source.reads)

        async def die(file: SourceFile, at: int, into: memoryview) -> None:
            if len(node.source.reads) - asked >= 3:
                raise SourceChanged("dead")

        node.source.before = die
        lease = await node.lease()
        assert node.bytes_of(lease) == node.expected()
        assert len(node.source.reads) - asked == 3
        assert len(mirror.reads) == 17 - 3, "what has arrived is not fetched again"
        assert mirror.closed == 1
        lease.release()
        await node.stored()


async def test_a_mirror_of_other_bytes_does_no_harm(origin: Path) -> None:
    shutil.copytree(origin, origin.parent / "mirror")
    async with house(origin) as node:
        mirror = ScriptedSource(origin.parent / "mirror", "test://mirror")

        async def lie(file: SourceFile, at: int, into: memoryview) -> None:
            into[0] ^= 1

        mirror.after = lie
        with_mirror(node, mirror)
        lease = await node.lease()
        assert node.bytes_of(lease) == node.expected()
        # Each of those who fetch may have had a chunk of its in hand when the third wrong one was found out; of 17.
        assert len(mirror.reads) <= 2 + mirror.parallel + node.source.parallel
        lease.release()
        await node.stored()


async def test_a_mirror_is_not_asked_where_no_digests_would_tell(stock: Path) -> None:
    shutil.copytree(stock, stock.parent / "mirror")
    async with house(stock) as node:
        mirror = ScriptedSource(stock.parent / "mirror", "test://mirror")
        with_mirror(node, mirror)
        (await node.lease()).release()
        assert mirror.reads == []
        await node.stored()
