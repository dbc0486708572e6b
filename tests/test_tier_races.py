"""Loads, pulls and cards that cross each other, and sources that lie about what is small."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from checkpoints import folder_of
from houses import WEIGHTS, House, house
from houses import origin as origin
from houses import stock as stock
from loaders import CHUNK, LIMIT_S, until
from scripted_source import ScriptedSource

from sllm_actor.checkpoint.convert import convert
from sllm_actor.errors import NoCapacity, SourceInvalid, WriteFailed
from sllm_actor.loader import cards
from sllm_actor.loader.lease import HostLease
from sllm_actor.loader.ssd_partial import SsdPartial
from sllm_actor.loader.ssd_quota import SsdEntry
from sllm_actor.loader.ssd_record import Record
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.sources.source import SourceFile


def holding(begun: asyncio.Event, go: asyncio.Event, after: int = 4 * CHUNK) -> Any:
    """Have reads from byte `after` of a weight file on wait until told."""

    async def wait(file: SourceFile, at: int, into: memoryview) -> None:
        if at >= after:
            begun.set()
            await go.wait()

    return wait


def quiet(node: House) -> bool:
    """Nothing is leased that nobody has, and nothing is missing from the books."""
    held = node.tiers.loader.residents()
    chunks = sum(-(-file.size_bytes // CHUNK) for file in node.card.checkpoint.files) if held else 0
    free = node.tiers.loader.free_bytes == node.tiers.loader.pool_bytes - chunks * CHUNK
    return free and all(resident.leases == 0 for resident in held)


async def test_a_load_that_waited_takes_what_has_come_meanwhile(origin: Path) -> None:
    async with house(origin) as node, contextlib.AsyncExitStack() as stack:
        scope = TaskScope("test")
        for _ in range(4):  # All turns of fetches are taken.
            await stack.enter_async_context(node.tiers._remote_queue.turn(1))
        begun, go = asyncio.Event(), asyncio.Event()
        node.source.before = holding(begun, go)
        pulling = scope.spawn(node.tiers.pull(node.card), "pull")
        await begun.wait()
        waiting = scope.spawn(node.lease(), "load")
        await until(lambda: node.tiers._remote_queue.waiting == 1)
        go.set()
        await pulling
        other = await node.lease()
        assert other.report.remote_bytes == 0
        asked = len(node.source.reads)
        await stack.aclose()
        lease: HostLease = await waiting
        assert len(node.source.reads) == asked
        assert node.bytes_of(lease) == node.expected()
        for held in (lease, other):
            held.release()
        assert quiet(node)
        await scope.close()


async def test_a_pull_whose_copy_can_t_be_published_can_be_tried_again(
    origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(origin) as node:

        async def refuse(partial: SsdPartial, model_id: str | None = None) -> None:
            raise WriteFailed("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(SsdPartial, "publish", refuse)
            with pytest.raises(WriteFailed):
                await node.tiers.pull(node.card)
        asked = len(node.source.reads)
        await node.tiers.pull(node.card)
        assert len(node.source.reads) == asked, "every chunk was there already"
        assert node.tiers.is_on_ssd(node.card)


async def test_who_leaves_while_the_source_is_closed_leaves_no_lease(origin: Path) -> None:
    async with house(origin) as node:
        closing, go, scope = asyncio.Event(), asyncio.Event(), TaskScope("test")
        plain = node.source.close

        async def slowly() -> None:
            closing.set()
            await go.wait()
            await plain()

        node.source.close = slowly  # type: ignore[method-assign]
        closed = node.source.closed
        waiting = scope.spawn(node.lease(), "load")
        await closing.wait()
        waiting.cancel()
        await asyncio.wait([waiting])
        go.set()
        await until(lambda: quiet(node))
        assert node.source.closed == closed + 1, "it was closed to the end"
        await scope.close()


async def test_two_registrations_of_one_source_have_one_card_and_one_download(stock: Path) -> None:
    async with house(stock) as node:
        first, second = await asyncio.gather(node.tiers.describe("test://model"), node.tiers.describe("test://model"))
        assert first is second is node.card
        asked = len(node.source.reads)
        await asyncio.gather(node.tiers.pull(first), node.tiers.pull(await node.tiers.describe("test://model")))
        assert len(node.source.reads) - asked == 18
        assert node.tiers.is_on_ssd(node.card)


async def test_a_pull_goes_on_by_itself_when_the_load_that_took_over_is_given_up(origin: Path) -> None:
    async with house(origin) as node:
        begun, go, scope = asyncio.Event(), asyncio.Event(), TaskScope("test")
        node.source.before = holding(begun, go)
        pulling = scope.spawn(node.tiers.pull(node.card), "pull")
        await begun.wait()
        loading = scope.spawn(node.lease(), "load")
        await until(lambda: node.tiers.arriving(node.card) is not None)
        loading.cancel()
        go.set()
        async with asyncio.timeout(LIMIT_S):
            await pulling
        assert node.tiers.is_on_ssd(node.card)
        await scope.close()


async def test_one_of_two_who_pull_leaves_and_the_other_gets_all_of_it(origin: Path) -> None:
    async with house(origin) as node:
        begun, go, scope = asyncio.Event(), asyncio.Event(), TaskScope("test")
        node.source.before = holding(begun, go)
        asked, told = len(node.source.reads), []
        first = scope.spawn(node.tiers.pull(node.card), "first")
        second = scope.spawn(node.tiers.pull(node.card, lambda done, _: told.append(done)), "second")
        await begun.wait()
        first.cancel()
        await asyncio.wait([first])
        go.set()
        await second
        assert len(node.source.reads) - asked == 17, "nothing was begun anew"
        assert told[-1] == node.card.checkpoint.size_bytes
        await scope.close()


async def test_an_ssd_that_fails_costs_a_resumed_load_its_copy_alone(
    origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(origin) as node:
        async with contextlib.aclosing(node.tiers.pulled(node.card)) as progress:
            async for done, _ in progress:
                if done >= 3 * CHUNK:
                    break

        async def fail(*_: object) -> None:
            raise WriteFailed("a read-only file system")

        monkeypatch.setattr(SsdPartial, "read", fail)
        monkeypatch.setattr(SsdPartial, "discard", fail)
        lease = await node.lease()
        assert node.bytes_of(lease) == node.expected()
        lease.release()
        monkeypatch.undo()


async def test_room_that_a_copy_keeps_is_waited_for(origin: Path, tmp_path: Path) -> None:
    async with house(origin, chunks=20) as node:
        go, scope = asyncio.Event(), TaskScope("test")

        async def gate(_: int) -> None:
            await go.wait()

        node.tiers.ssd._gate = gate
        (await node.lease()).release()
        more = ScriptedSource(folder_of(tmp_path / "more", 8 * CHUNK), "test://more")
        node.tiers._open_source = node.tiers._remote._open_source = lambda _: more
        card = await node.tiers.describe("test://more")
        waiting = scope.spawn(node.tiers.lease(card), "load")
        await until(lambda: more.closed >= 2)  # It has found no room.
        assert not waiting.done()
        go.set()
        (await waiting).release()
        await until(lambda: node.tiers.is_on_ssd(card))
        await scope.close()


# ---- cards ----


async def test_a_small_file_that_arrives_damaged_is_fetched_again(origin: Path) -> None:
    (origin.parent / "stock" / "tokenizer.json").write_text('{"a tokenizer": 1}')
    convert(origin.parent / "stock", origin, chunk_bytes=CHUNK // 4, replace=True)
    spoiled: list[str] = []

    async def spoil(file: SourceFile, at: int, into: memoryview) -> None:
        if file.name in ("tokenizer.json", WEIGHTS) and spoiled.count(file.name) < 1 and len(into) > 8:
            spoiled.append(file.name)
            into[-1] ^= 1

    async with house(origin) as node:
        node.source.after = spoil
        node.source.url = "test://again"
        card = await node.tiers.describe("test://again")
        assert sorted(spoiled) == [WEIGHTS, "tokenizer.json"]
        for name, path in card.small_paths().items():
            assert path.read_bytes() == (origin / name).read_bytes()


async def test_weights_that_the_checkpoint_does_not_use_are_neither_stored_nor_given_away(stock: Path) -> None:
    shutil.copy(stock / "model-00001-of-00002.safetensors", stock / "consolidated.safetensors")
    async with house(stock) as node:
        await node.tiers.pull(node.card)
        (entry,) = node.tiers.ssd.entries()
        assert "consolidated.safetensors" not in os.listdir(entry.path)


async def test_a_source_that_tells_no_versions_is_refused_unless_digests_do(stock: Path, origin: Path) -> None:
    class Mute(ScriptedSource):
        async def files(self) -> tuple[SourceFile, ...]:
            return tuple(SourceFile(file.name, file.size_bytes) for file in await super().files())

    async with house(origin) as node:
        node.tiers._open_source = lambda _: Mute(stock, "test://mute")
        with pytest.raises(SourceInvalid, match="tells no version"):
            await node.tiers.describe("test://mute")
        node.tiers._open_source = lambda _: Mute(origin, "test://mute")
        assert (await node.tiers.describe("test://mute")).model_id == node.card.model_id


async def test_what_is_small_is_bounded_in_sum_before_it_is_fetched(
    stock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "MAX_SMALL_BYTES", 10_000)
    for number in range(3):
        (stock / f"tokenizer_{number}.json").write_text(json.dumps("x" * 4000))
    with pytest.raises(SourceInvalid, match=r"in all"):
        async with house(stock):
            pass


async def test_what_a_killed_process_left_of_a_card_is_removed(origin: Path) -> None:
    async with house(origin) as node:
        folder = node.card.checkpoint.path.parent
        left = folder / f".{node.card.key}.sllm-partial"
        left.mkdir()
        (left / "config.json").write_text("{}")
        await node.tiers.recover()
        assert [path.name for path in folder.iterdir()] == [node.card.key]
        await node.tiers.keep_cards(lambda key: False)
        assert list(folder.iterdir()) == []


async def test_a_pool_too_full_says_so(origin: Path) -> None:
    async with house(origin, chunks=20) as node:
        reserved = await node.tiers.loader.reserve(node.card.checkpoint)
        with pytest.raises(NoCapacity):
            await node.lease()
        reserved.abandon()
        (await node.lease()).release()
        await node.stored()


async def test_a_card_knows_its_copy_before_it_is_visible(stock: Path) -> None:
    async with house(stock) as node:
        seen = []
        settle = node.tiers.ssd.settle

        async def settled(partial: SsdPartial, record: Record) -> SsdEntry:
            seen.append((node.card.model_id, node.tiers.is_on_ssd(node.card)))
            return await settle(partial, record)

        node.tiers.ssd.settle = settled  # type: ignore[method-assign]
        await node.tiers.pull(node.card)
        assert seen == [(node.card.model_id, False)]
        assert node.tiers.is_on_ssd(node.card)


async def test_half_a_note_that_a_killed_process_left_in_a_card_is_removed(origin: Path) -> None:
    async with house(origin) as node:
        left = node.card.checkpoint.path / f"{cards.RECORD_NAME}.new"
        left.write_bytes(b"{")
        await node.tiers.recover()
        assert not left.exists()
        assert (await node.tiers.card(node.card.key)).model_id == node.card.model_id


async def test_a_download_of_the_same_model_goes_on_from_another_source(origin: Path) -> None:
    mirror = shutil.copytree(origin, origin.parent / "mirror")
    for path in mirror.iterdir():
        os.utime(path, (1, 1))  # Validators of its own.
    async with house(origin) as node:
        begun, go, scope = asyncio.Event(), asyncio.Event(), TaskScope("test")
        node.source.before = holding(begun, go, after=6 * CHUNK)
        pulling = scope.spawn(node.tiers.pull(node.card), "pull")
        await until(lambda: any(entry.done_bytes >= 4 * CHUNK for entry in node.tiers.ssd.entries()))
        pulling.cancel()
        await asyncio.wait([pulling])
        (entry,) = node.tiers.ssd.entries()
        key, done_bytes = node.card.key, entry.done_bytes
        node.source.before = None
    async with house(mirror) as node:
        assert node.card.key != key
        asked = len(node.source.reads)
        await node.tiers.pull(node.card)
        assert node.tiers.is_on_ssd(node.card)
        assert len(node.source.reads) - asked == 17 - done_bytes // CHUNK


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
async def test_a_copy_without_the_sha256_that_its_source_tells_is_given_up_and_so_is_what_is_in_memory(
    stock: Path, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ScriptedSource.files

    async def with_sha256(source: ScriptedSource) -> tuple[SourceFile, ...]:
        return tuple(
            msgspec.structs.replace(file, sha256=hashlib.sha256((source.folder / file.name).read_bytes()).hexdigest())
            if file.name.endswith(".safetensors")
            else file
            for file in await files(source)
        )

    monkeypatch.setattr(ScriptedSource, "files", with_sha256)
    async with house(stock) as node:

        async def spoil(file: SourceFile, at: int, into: memoryview) -> None:
            if wrong and len(into) == CHUNK and at == CHUNK:
                into[9] ^= 1

        node.source.after = spoil
        (await node.lease()).release()
        await until(lambda: not node.tiers._remote.copies())
        assert node.tiers.is_on_ssd(node.card) is not wrong
        assert node.tiers.loader.holds(node.card.checkpoint) is not wrong
        node.source.after = None
        lease = await node.lease()
        assert node.bytes_of(lease) == node.expected()
        assert (lease.report.remote_bytes > 0) is wrong
        lease.release()
        await node.stored()
