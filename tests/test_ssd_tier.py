"""The SSD tier: what it holds, what it lets go, what it keeps for later, and whose files it never touches."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
from pathlib import Path

import msgspec
import pytest
import xxhash
from checkpoints import folder_of
from ssd_tiers import (
    CLOCK,
    COARSE,
    FINE,
    MODELS,
    ROOM,
    STOCK,
    TWO_FILES,
    all_files,
    begin,
    held,
    opened,
    pull,
    put,
    sized,
)

from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.checkpoint.verify import verify
from sllm_actor.errors import (
    AlreadyThere,
    CheckpointCorrupt,
    CheckpointInvalid,
    CheckpointTruncated,
    ConfigInvalid,
    Conflict,
    DataFolderInUse,
    Draining,
    InvalidName,
    ModelNotFound,
    ModelTooLarge,
    NoCapacity,
    TargetBusy,
    TargetInvalid,
)
from sllm_actor.loader.chunk_place import ChunkPlace
from sllm_actor.loader.ssd_partial import SsdPartial
from sllm_actor.loader.ssd_record import PlannedFile
from sllm_actor.loader.ssd_tier import SsdTier
from sllm_actor.testing.tier_storm import CHUNK_BYTES, KnownModel, check_model, fill

SIZE = 50_000


async def write(partial: SsdPartial, model: KnownModel, *places: tuple[int, int]) -> None:
    for file, chunk in places:
        await partial.write(file, chunk, memoryview(model.chunk(ChunkPlace(file, chunk))))


@pytest.mark.parametrize("model", [STOCK, TWO_FILES, FINE, COARSE], ids=["stock", "two files", "fine", "coarse"])
async def test_a_model_in_the_tier_is_a_checkpoint_folder_with_its_bytes(tmp_path: Path, model: KnownModel) -> None:
    async with opened(tmp_path / "tier") as tier:
        entry = await pull(tier, model)
        assert entry.model_id == model.model_id and not entry.partial
        assert entry.path == tmp_path / "tier" / "models" / model.model_id
        check_model(entry.path, model)
        assert verify(entry.path).model_id == (model.model_id if model in (FINE, COARSE) else None)
        assert tier.used_bytes == entry.size_bytes == entry.done_bytes == model.size_bytes
        await tier.trash_emptied()
        assert not os.listdir(tmp_path / "tier" / "partial") and not os.listdir(tmp_path / "tier" / "trash")


async def test_the_id_of_a_stock_model_is_the_digest_of_its_content_and_of_nothing_else(tmp_path: Path) -> None:
    files, smalls, raw = sized(1, SIZE)
    content = {
        "format_version": 1, "digest_bytes": 4 * 2**20,
        "files": [{"name": "model.safetensors", "size_bytes": len(raw), "digests": [xxhash.xxh3_128_hexdigest(raw)]}],
        "others": [{
            "name": "config.json", "size_bytes": len(smalls["config.json"]),
            "digest": xxhash.xxh3_128_hexdigest(smalls["config.json"]),
        }],
    }  # fmt: skip
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    async with opened(tmp_path / "tier") as tier:
        for key, chunk_bytes in (("a", 4 * 2**20), ("b", 16 * 2**20)):
            partial = await tier.begin(key, files, smalls, chunk_bytes)
            await partial.write(0, 0, memoryview(raw))
            assert (await partial.publish()).model_id == hashlib.sha256(canonical.encode()).hexdigest()
        # Under two names and through chunks of two sizes: once.
        assert len(held(tier)) == 1 and tier.used_bytes == SIZE


async def test_the_same_bytes_under_two_keys_are_stored_once_also_when_both_end_at_once(tmp_path: Path) -> None:
    async with opened(tmp_path / "tier") as tier:
        partials = [await begin(tier, STOCK, key) for key in ("a", "b", "c")]
        for partial in partials:
            await fill(partial, STOCK, random.Random(1), whole=True)
        assert tier.used_bytes == 3 * STOCK.size_bytes
        entries = await asyncio.gather(*(partial.publish() for partial in partials))
        assert {entry.model_id for entry in entries} == {STOCK.model_id} and len(tier.entries()) == 1
        assert tier.used_bytes == STOCK.size_bytes
        check_model(entries[0].path, STOCK)


async def queued(tier: SsdTier, waiters: int) -> None:
    """Wait until so many wait for their turn to change names on the disk."""
    while len(tier._names._waiters or ()) < waiters:
        await asyncio.sleep(0)


async def test_a_model_that_leaves_while_it_is_published_again_is_there_afterwards(tmp_path: Path) -> None:
    async with opened(tmp_path / "tier") as tier:
        await pull(tier, STOCK, "a")
        partial = await begin(tier, STOCK, "b")
        await fill(partial, STOCK, random.Random(1), whole=True)
        # Both wait for their turn to change names, and the books already have it gone.
        await tier._names.acquire()
        publishing = asyncio.ensure_future(partial.publish())
        await queued(tier, 1)
        evicting = asyncio.ensure_future(tier.evict(STOCK.model_id))
        await queued(tier, 2)
        tier._names.release()
        entry, _ = await asyncio.gather(publishing, evicting)
        assert held(tier) == [entry.model_id] and tier.used_bytes == STOCK.size_bytes
        check_model(entry.path, STOCK)


async def test_a_model_that_comes_and_leaves_while_it_waits_to_be_published_is_there_afterwards(tmp_path: Path) -> None:
    async with opened(tmp_path / "tier") as tier:
        other = await put(tier, 1, SIZE)
        partials = [await begin(tier, STOCK, key) for key in ("a", "b")]
        for partial in partials:
            await fill(partial, STOCK, random.Random(1), whole=True)
        await tier._names.acquire()
        first = asyncio.ensure_future(partials[0].publish())
        await queued(tier, 1)
        pinning = asyncio.ensure_future(tier.pin(other))
        await queued(tier, 2)
        second = asyncio.ensure_future(partials[1].publish())
        await queued(tier, 3)
        tier._names.release()
        # While names belong to the pin, the first comes and goes; the disk learns of that after the turn of the second.
        while STOCK.model_id not in held(tier):
            await asyncio.sleep(0)
        await asyncio.gather(tier.evict(STOCK.model_id), first, pinning, second)
        assert held(tier) == [other, STOCK.model_id] and len(os.listdir(tmp_path / "tier" / "models")) == 2
        check_model(tmp_path / "tier" / "models" / STOCK.model_id, STOCK)


async def test_wrong_bytes_are_refused_when_they_are_written_where_a_manifest_knows_better(tmp_path: Path) -> None:
    async with opened(tmp_path / "tier") as tier:
        partial = await begin(tier, FINE)
        wrong = bytearray(FINE.chunk(ChunkPlace(0, 1)))
        wrong[4096] ^= 1
        with pytest.raises(CheckpointCorrupt, match=r"near:\d+: model.safetensors chunk 3 \(from byte 12288\) has"):
            await partial.write(0, 1, memoryview(wrong))
        assert ChunkPlace(0, 1) in partial.missing() and partial.done_bytes == 0
        await fill(partial, FINE, random.Random(1), whole=True)
        check_model((await partial.publish(FINE.model_id)).path, FINE)


async def test_where_the_manifest_has_larger_chunks_wrong_bytes_are_found_before_anything_is_visible(
    tmp_path: Path,
) -> None:
    places = [ChunkPlace(0, chunk) for chunk in range(-(-len(COARSE.files["model.safetensors"]) // CHUNK_BYTES))]
    async with opened(tmp_path / "tier") as tier:
        partial = await begin(tier, COARSE)
        wrong = bytearray(COARSE.chunk(places[0]))
        wrong[-1] ^= 1
        await partial.write(0, 0, memoryview(wrong))
        await write(partial, COARSE, *places[1:])
        with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors chunk 0 has digest"):
            await partial.publish()
        assert not held(tier)
        # All of the manifest's chunk, and no other, is to be fetched again.
        assert list(partial.missing()) == places[:4]
        await write(partial, COARSE, *places[:4])
        check_model((await partial.publish()).path, COARSE)


async def test_what_is_not_the_model_that_was_meant_or_no_checkpoint_is_not_published(tmp_path: Path) -> None:
    async with opened(tmp_path / "tier") as tier:
        partial = await begin(tier, STOCK)
        await fill(partial, STOCK, random.Random(1), whole=True)
        for model_id in (FINE.model_id, "../../escape", ""):
            with pytest.raises(CheckpointCorrupt, match="and should be"):
                await partial.publish(model_id)
        await partial.publish(STOCK.model_id)
        garbage = await tier.begin("g", [PlannedFile("model.safetensors", 100, "v")], STOCK.smalls, CHUNK_BYTES)
        await garbage.write(0, 0, memoryview(bytes(100)))
        with pytest.raises(CheckpointInvalid):
            await garbage.publish()
        await garbage.drop()
        assert held(tier) == [STOCK.model_id] and tier.used_bytes == STOCK.size_bytes


async def test_a_chunk_is_written_once_and_a_model_published_only_whole(tmp_path: Path) -> None:
    async with opened(tmp_path / "tier") as tier:
        partial = await begin(tier, STOCK)
        data = memoryview(STOCK.chunk(ChunkPlace(0, 0)))
        answers = await asyncio.gather(*(partial.write(0, 0, data) for _ in range(3)), return_exceptions=True)
        assert [type(answer) for answer in answers].count(AlreadyThere) == 2
        with pytest.raises(AlreadyThere):
            await partial.write(0, 0, data)
        with pytest.raises(CheckpointTruncated, match=r"\d+ bytes of near:3 are missing"):
            await partial.publish()
        with pytest.raises(CheckpointTruncated, match=r"chunk 1 of model\.safetensors"):
            await partial.read(0, 1, memoryview(bytearray(CHUNK_BYTES)))
        await partial.discard(0, 0)
        assert partial.done_bytes == 0 and ChunkPlace(0, 0) in partial.missing()
        await fill(partial, STOCK, random.Random(1), whole=True)
        check_model((await partial.publish()).path, STOCK)
        for late in (partial.publish(), partial.discard(0, 0), partial.read(0, 0, memoryview(bytearray(CHUNK_BYTES)))):
            with pytest.raises(TargetBusy):
                await late
        await partial.drop()
        assert held(tier) == [STOCK.model_id]


async def test_memory_that_no_direct_write_takes_is_written_all_the_same(tmp_path: Path) -> None:
    async with opened(tmp_path / "tier") as tier:
        partial = await begin(tier, TWO_FILES)
        for place in list(partial.missing()):
            raw = TWO_FILES.chunk(place)
            await partial.write(*place, memoryview(b"x" + raw)[1:])
        check_model((await partial.publish()).path, TWO_FILES)


async def test_what_is_done_is_kept_over_a_pause_and_a_restart(tmp_path: Path) -> None:
    last = TWO_FILES.chunk(ChunkPlace(1, 1))
    assert 0 < len(last) < CHUNK_BYTES
    async with opened(tmp_path / "tier") as tier:
        partial = await begin(tier, TWO_FILES)
        await write(partial, TWO_FILES, (0, 0), (1, 1))
        await partial.pause()
        await partial.pause()
        (entry,) = tier.entries()
        assert (entry.model_id, entry.partial, entry.done_bytes) == ("near:1", True, CHUNK_BYTES + len(last))
        partial = await begin(tier, TWO_FILES)
        await write(partial, TWO_FILES, (1, 0))
    async with opened(tmp_path / "tier") as tier:
        assert tier.used_bytes == TWO_FILES.size_bytes
        assert [entry.done_bytes for entry in tier.entries()] == [2 * CHUNK_BYTES + len(last)]
        partial = await begin(tier, TWO_FILES)
        assert partial.done_bytes == 2 * CHUNK_BYTES + len(last)
        assert not {(0, 0), (1, 0), (1, 1)} & set(partial.missing())
        into = bytearray(len(last))
        await partial.read(1, 1, memoryview(into))
        assert into == last
        await fill(partial, TWO_FILES, random.Random(1), whole=True)
        check_model((await partial.publish()).path, TWO_FILES)


async def test_what_was_paused_can_be_forgotten_by_its_key(tmp_path: Path) -> None:
    async with opened(tmp_path / "tier") as tier:
        partial = await begin(tier, STOCK)
        with pytest.raises(Conflict, match="near:3 is being written"):
            await tier.forget("near:3")
        await partial.pause()
        await tier.forget("near:3")
        assert tier.entries() == [] and not os.listdir(tmp_path / "tier" / "partial")
        with pytest.raises(ModelNotFound, match="near:3 is not on its way"):
            await tier.forget("near:3")


@pytest.mark.parametrize("change", ["validator", "no validator", "size", "chunk"])
async def test_what_may_be_another_version_is_begun_anew(tmp_path: Path, change: str) -> None:
    files, smalls, raw = sized(1, SIZE)
    if change == "no validator":
        files = [PlannedFile(files[0].name, files[0].size_bytes)]
    async with opened(tmp_path / "tier") as tier:
        partial = await tier.begin("k", files, smalls, CHUNK_BYTES)
        await partial.write(0, 0, memoryview(raw)[:CHUNK_BYTES])
        await partial.pause()
        later = {
            "validator": [PlannedFile(files[0].name, files[0].size_bytes, "other")],
            "size": [PlannedFile(files[0].name, files[0].size_bytes + 1, files[0].validator)],
        }.get(change, files)
        partial = await tier.begin("k", later, smalls, CHUNK_BYTES * (2 if change == "chunk" else 1))
        assert partial.done_bytes == 0 and len(tier.entries()) == 1
        assert tier.used_bytes == SIZE + (change == "size")


async def test_a_manifest_tells_versions_apart_where_no_validator_does(tmp_path: Path) -> None:
    planned = [PlannedFile(file.name, file.size_bytes) for file in FINE.planned]
    async with opened(tmp_path / "tier") as tier:
        partial = await tier.begin("k", planned, FINE.smalls, CHUNK_BYTES)
        await write(partial, FINE, (0, 0))
        await partial.pause()
        partial = await tier.begin("k", planned, FINE.smalls, CHUNK_BYTES)
        assert partial.done_bytes == CHUNK_BYTES


@pytest.mark.parametrize("model", [FINE, COARSE], ids=["fine", "coarse"])
async def test_a_manifest_lets_another_source_go_on_and_wrong_bytes_of_the_first_are_found(
    tmp_path: Path, model: KnownModel
) -> None:
    first = [PlannedFile(file.name, file.size_bytes, "of the first") for file in model.planned]
    second = [PlannedFile(file.name, file.size_bytes, "of the second") for file in model.planned]
    async with opened(tmp_path / "tier") as tier:
        partial = await tier.begin(model.model_id, first, model.smalls, CHUNK_BYTES)
        await write(partial, model, (0, 0))
        if model is COARSE:  # Its digests cover more than a chunk, so that only the whole tells.
            spoiled = bytearray(model.chunk(ChunkPlace(0, 1)))
            spoiled[7] ^= 1
            await partial.write(0, 1, memoryview(spoiled))
        done_bytes = partial.done_bytes
        await partial.pause()
        partial = await tier.begin(model.model_id, second, model.smalls, CHUNK_BYTES)
        assert partial.done_bytes == done_bytes > 0
        assert [file.validator for file in partial.files] == ["of the second"] * len(second)
        await fill(partial, model, random.Random(1), whole=True)
        if model is COARSE:
            with pytest.raises(CheckpointCorrupt):
                await partial.publish()
            await fill(partial, model, random.Random(1), whole=True)
        check_model((await partial.publish()).path, model)


@pytest.mark.parametrize("model", [STOCK, TWO_FILES], ids=["stock", "two files"])
async def test_a_file_that_has_another_sha256_than_its_source_tells_is_fetched_anew(
    tmp_path: Path, model: KnownModel
) -> None:
    files = [
        msgspec.structs.replace(file, sha256=hashlib.sha256(raw).hexdigest())
        for file, raw in zip(model.planned, model.files.values(), strict=True)
    ]
    async with opened(tmp_path / "tier") as tier:
        partial = await tier.begin("k", files, model.smalls, CHUNK_BYTES)
        spoiled = bytearray(model.chunk(ChunkPlace(0, 0)))
        spoiled[-1] ^= 1
        await partial.write(0, 0, memoryview(spoiled))
        await fill(partial, model, random.Random(1), whole=True)
        for asked in (partial.identify, partial.publish):
            with pytest.raises(
                CheckpointCorrupt, match=f"{files[0].name} has SHA-256 .* should have {files[0].sha256}"
            ):
                await asked()
            assert {place.file for place in partial.missing()} == {0}, "all of that file, and nothing else"
            if asked == partial.identify:
                await partial.write(0, 0, memoryview(spoiled))
                await fill(partial, model, random.Random(1), whole=True)
        await fill(partial, model, random.Random(1), whole=True)
        assert await partial.identify() == (await partial.publish()).model_id == model.model_id
        check_model(tier.entries()[0].path, model)


async def test_small_files_are_those_of_the_last_begin(tmp_path: Path) -> None:
    files, smalls, raw = sized(1, SIZE)
    (tmp_path / "merges.txt").write_text("a b")
    async with opened(tmp_path / "tier") as tier:
        partial = await tier.begin("k", files, smalls | {"vocab.json": b"{}"}, 65536)
        await partial.write(0, 0, memoryview(raw))
        await partial.pause()
        partial = await tier.begin("k", files, smalls | {"merges.txt": tmp_path / "merges.txt"}, 65536)
        entry = await partial.publish()
        names = {"config.json", "merges.txt", "model.safetensors", ".sllm-tier.json"}
        assert set(os.listdir(entry.path)) == names
        assert entry.size_bytes == tier.used_bytes == SIZE + 3


@pytest.mark.parametrize("damage", ["bytes", "journal torn", "journal damaged", "journal gone"])
async def test_only_what_the_disk_still_has_is_resumed(tmp_path: Path, damage: str) -> None:
    async with opened(tmp_path / "tier") as tier:
        partial = await begin(tier, STOCK)
        await write(partial, STOCK, (0, 0), (0, 1), (0, 2))
        folder = partial.folder
    entry_bytes = 8 + 16 + 8
    journal = folder / "journal"
    if damage == "bytes":
        with (folder / "model" / "model.safetensors").open("r+b") as file:
            file.seek(CHUNK_BYTES + 5)
            file.write(b"\xff\x00\xff")
    elif damage == "journal torn":
        os.truncate(journal, entry_bytes + 7)
    elif damage == "journal damaged":
        raw = bytearray(journal.read_bytes())
        raw[entry_bytes + 20] ^= 1
        journal.write_bytes(raw)
    else:
        journal.unlink()
    kept = {"bytes": {(0, 0), (0, 2)}, "journal gone": set()}.get(damage, {(0, 0)})
    async with opened(tmp_path / "tier") as tier:
        partial = await begin(tier, STOCK)
        assert {(0, 0), (0, 1), (0, 2)} - set(partial.missing()) == kept
        await fill(partial, STOCK, random.Random(1), whole=True)
        check_model((await partial.publish()).path, STOCK)


async def test_the_least_recently_used_goes_first_and_what_is_leased_or_pinned_stays(tmp_path: Path) -> None:
    async with opened(tmp_path / "tier", 4 * SIZE) as tier:
        a, b, c, d = [await put(tier, number, SIZE) for number in range(4)]
        assert tier.used_bytes == tier.quota_bytes and held(tier) == [a, b, c, d]
        lease = tier.lease(a)
        assert lease is not None and lease.path == tmp_path / "tier" / "models" / a
        await tier.pin(b)
        lease.release()
        e = await put(tier, 4, SIZE)
        assert held(tier) == [b, d, a, e]
        lease = tier.lease(d)
        f = await put(tier, 5, SIZE)
        assert held(tier) == [b, e, d, f]
        assert {entry.model_id: (entry.leases, entry.pinned) for entry in tier.entries()} == {
            b: (0, True), e: (0, False), d: (1, False), f: (0, False),
        }  # fmt: skip
        assert lease is not None
        lease.release()
        lease.release()
        assert all(entry.leases == 0 for entry in tier.entries())
        assert set(os.listdir(tmp_path / "tier" / "models")) == {b, e, d, f}


async def test_last_uses_and_pins_outlive_the_process(tmp_path: Path) -> None:
    async with opened(tmp_path / "tier", 3 * SIZE) as tier:
        a, b, c = [await put(tier, number, SIZE) for number in range(3)]
        lease = tier.lease(a)
        assert lease is not None
        lease.release()
        await tier.pin(b)
        await tier.pin(c)
        await tier.unpin(c)
    async with opened(tmp_path / "tier", 3 * SIZE) as tier:
        assert held(tier) == [b, c, a]
        assert [entry.pinned for entry in tier.entries()] == [True, False, False]
        d = await put(tier, 3, SIZE)
        assert held(tier) == [b, a, d]


async def test_what_no_room_can_be_made_for_is_refused_and_nothing_is_evicted_for_it(tmp_path: Path) -> None:
    async with opened(tmp_path / "tier", 2 * SIZE) as tier:
        a, b = [await put(tier, number, SIZE) for number in range(2)]
        files, smalls, _ = sized(2, 2 * SIZE + 1)
        with pytest.raises(ModelTooLarge, match=r"and the SSD tier's quota is 100\.0 kB"):
            await tier.begin("large", files, smalls, CHUNK_BYTES)
        lease = tier.lease(a)
        assert lease is not None
        files, smalls, _ = sized(2, 2 * SIZE)
        with pytest.raises(NoCapacity, match=r"50\.0 kB of the SSD tier's 100\.0 kB are leased"):
            await tier.begin("large", files, smalls, CHUNK_BYTES)
        assert held(tier) == [b, a] and tier.used_bytes == 2 * SIZE
        lease.release()
        partial = await tier.begin("large", files, smalls, CHUNK_BYTES)
        assert held(tier) == [] and tier.used_bytes == 2 * SIZE
        # What is being written is in nobody's way either; what nobody writes any more is.
        with pytest.raises(NoCapacity):
            await put(tier, 3, SIZE)
        await partial.pause()
        assert [await put(tier, 3, SIZE)] == held(tier) and tier.used_bytes == SIZE


async def test_evicting_is_refused_for_what_is_leased_pinned_or_not_there(tmp_path: Path) -> None:
    async with opened(tmp_path / "tier") as tier:
        a = await put(tier, 1, SIZE)
        lease = tier.lease(a)
        assert lease is not None
        with pytest.raises(Conflict, match="is leased 1 times"):
            await tier.evict(a)
        lease.release()
        await tier.pin(a)
        with pytest.raises(Conflict, match="is pinned"):
            await tier.evict(a)
        await tier.unpin(a)
        await tier.evict(a)
        assert tier.lease(a) is None and tier.used_bytes == 0
        for gone in (tier.evict(a), tier.pin(a), tier.unpin(a)):
            with pytest.raises(ModelNotFound):
                await gone
        await put(tier, 1, SIZE)
        assert held(tier) == [a]


@pytest.mark.parametrize(
    "model_id",
    ["", "..", "/etc", "a" * 63, "a" * 65, "A" * 64, "a" * 64 + "\n", "../" + "a" * 61, "\u0430" * 64],
)
async def test_only_64_hexadecimal_characters_are_a_model_id(tmp_path: Path, model_id: str) -> None:
    async with opened(tmp_path / "tier") as tier:
        with pytest.raises(InvalidName):
            tier.lease(model_id)
        for asked in (tier.evict(model_id), tier.pin(model_id), tier.unpin(model_id)):
            with pytest.raises(InvalidName):
                await asked


@pytest.mark.parametrize(
    "name",
    ["", "..", "a..b", "/etc/passwd", "a/b", ".hidden", "a\0b", "a\nb", "a" * 300, "m\u043edel.safetensors"],
)
async def test_impossible_names_of_files_are_refused_and_leave_nothing(tmp_path: Path, name: str) -> None:
    async with opened(tmp_path / "tier") as tier:
        before = all_files(tmp_path)
        with pytest.raises(InvalidName):
            await tier.begin("k", [PlannedFile(name, 5, "v")], {}, CHUNK_BYTES)
        with pytest.raises(InvalidName):
            await tier.begin("k", [PlannedFile("model.safetensors", 5, "v")], {name: b"x"}, CHUNK_BYTES)
        assert all_files(tmp_path) == before and tier.entries() == []


async def test_a_key_may_be_any_text_and_leads_nowhere(tmp_path: Path) -> None:
    async with opened(tmp_path / "tier") as tier:
        for key in ("../../x", "/etc/passwd", "a\0b", "ä\U0001f600", "x" * 4096):
            partial = await begin(tier, STOCK, key)
            assert partial.folder.parent == tmp_path / "tier" / "partial" and len(partial.folder.name) == 64
            await partial.drop()
        for key in ("", "x" * 4097, "\ud800"):
            with pytest.raises(InvalidName):
                await tier.begin(key, STOCK.planned, STOCK.smalls, CHUNK_BYTES)
        assert {path.name for path in tmp_path.iterdir()} == {"tier"} and tier.used_bytes == 0


@pytest.mark.parametrize(
    ("files", "smalls", "chunk_bytes", "error"),
    [
        ([], {}, CHUNK_BYTES, CheckpointInvalid),
        ([PlannedFile("a", 5)] * 2, {}, CHUNK_BYTES, InvalidName),
        ([PlannedFile("a", 5)], {"a": b""}, CHUNK_BYTES, InvalidName),
        ([PlannedFile("a", 5)], {}, 5000, ConfigInvalid),
        ([PlannedFile("a", 5)], {}, 2048, ConfigInvalid),
        ([PlannedFile("a", -1)], {}, CHUNK_BYTES, CheckpointInvalid),
        ([PlannedFile("a", 2**60)], {}, 2**30, CheckpointInvalid),
        ([PlannedFile("a", 2**34)], {}, 4096, CheckpointInvalid),
        ([PlannedFile("a", 5)], {"config.json": Path("/nowhere")}, CHUNK_BYTES, CheckpointInvalid),
        ([PlannedFile("a", 5)], {"sllm.json": b"{}"}, CHUNK_BYTES, CheckpointInvalid),
        (FINE.planned, FINE.smalls | {"config.json": b"{}"}, CHUNK_BYTES, CheckpointCorrupt),
        (FINE.planned, {"sllm.json": FINE.smalls["sllm.json"]}, CHUNK_BYTES, CheckpointTruncated),
        ([PlannedFile("model.safetensors", 5)], FINE.smalls, CHUNK_BYTES, CheckpointInvalid),
    ],
)
async def test_impossible_plans_are_refused_by_type(
    tmp_path: Path, files: list[PlannedFile], smalls: dict[str, bytes | Path], chunk_bytes: int, error: type[Exception]
) -> None:
    async with opened(tmp_path / "tier") as tier:
        with pytest.raises(error):
            await tier.begin("k", files, smalls, chunk_bytes)
        assert tier.entries() == [] and not os.listdir(tmp_path / "tier" / "partial")


async def test_a_folder_is_held_by_one_tier_at_a_time(tmp_path: Path) -> None:
    async with opened(tmp_path / "tier"):
        with pytest.raises(DataFolderInUse, match="held by another living process"):
            await SsdTier.open(tmp_path / "tier", ROOM, CLOCK)
    async with opened(tmp_path / "tier"):
        pass


async def test_a_folder_that_holds_someone_elses_models_is_refused_and_left_alone(tmp_path: Path) -> None:
    theirs = folder_of(tmp_path / "data" / "models" / "mine", 1000)
    before = all_files(tmp_path)
    with pytest.raises(TargetInvalid, match="no SSD tier has made it"):
        await SsdTier.open(tmp_path / "data", ROOM, CLOCK)
    assert all_files(tmp_path) == before and read_folder(theirs)


async def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    outside = folder_of(tmp_path / "outside", 3000)
    async with opened(tmp_path / "tier") as tier:
        a, b, c = [await put(tier, number, SIZE) for number in range(3)]
    models = tmp_path / "tier" / "models"
    # A whole model that would be good if it were here.
    elsewhere = (models / c).rename(tmp_path / "elsewhere")
    (models / c).symlink_to(elsewhere)
    # A model's file, a whole model, and a partial, replaced by links to what is not ours.
    (models / a / "model.safetensors").unlink()
    (models / a / "model.safetensors").symlink_to(outside / "model.safetensors")
    (models / ("c" * 64)).symlink_to(outside)
    (tmp_path / "tier" / "partial" / ("d" * 64)).symlink_to(outside)
    (tmp_path / "tier" / "trash" / "e").symlink_to(outside)
    async with opened(tmp_path / "tier") as tier:
        assert held(tier) == [b] and os.listdir(models) == [b]
    assert len(os.listdir(elsewhere)) == 3
    assert read_folder(outside).size_bytes == 3000
    (tmp_path / "tier" / "trash").rmdir()
    (tmp_path / "tier" / "trash").symlink_to(outside)
    with pytest.raises(TargetInvalid, match="trash is in the way"):
        await SsdTier.open(tmp_path / "tier", ROOM, CLOCK)
    assert read_folder(outside).size_bytes == 3000


async def test_what_is_neither_whole_nor_resumable_is_reclaimed_and_what_is_not_ours_is_left(tmp_path: Path) -> None:
    async with opened(tmp_path / "tier") as tier:
        a, b, c = [await put(tier, number, SIZE) for number in range(3)]
        for key in ("p", "q", "r"):
            await write(await begin(tier, STOCK, key), STOCK, (0, 0))
        folders = {entry.model_id: entry.path for entry in tier.entries()}
    os.truncate(folders[a] / "model.safetensors", 5)
    record = (folders[b] / ".sllm-tier.json").read_text()
    (folders[b] / ".sllm-tier.json").write_text(record.replace('"size_bytes": 49', '"size_bytes": 48'))
    (folders["p"] / "plan.json").unlink()
    (folders["q"] / "model" / "model.safetensors").unlink()
    (folders["r"] / "plan.json.new").write_text("half")
    (tmp_path / "tier" / "models" / ("0" * 64)).mkdir()
    (tmp_path / "tier" / "trash" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "tier" / "models" / "readme").write_text("not ours")
    async with opened(tmp_path / "tier") as tier:
        assert [(entry.model_id, entry.partial) for entry in tier.entries()] == [(c, False), ("r", True)]
        assert set(os.listdir(tmp_path / "tier" / "models")) == {c, "readme"}
        assert os.listdir(tmp_path / "tier" / "partial") == [folders["r"].name]
        assert set(os.listdir(folders["r"])) == {"plan.json", "journal", "model"}
        assert tier.used_bytes == SIZE + STOCK.size_bytes


async def test_a_smaller_quota_evicts_on_opening_and_keeps_what_is_pinned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path / "tier") as tier:
        a, _, c, d = [await put(tier, number, SIZE) for number in range(4)]
        await tier.pin(a)
        await tier.pin(c)
    async with opened(tmp_path / "tier", 3 * SIZE) as tier:
        assert held(tier) == [a, c, d] and not caplog.messages
    async with opened(tmp_path / "tier", SIZE) as tier:
        assert held(tier) == [a, c] and tier.used_bytes == 2 * SIZE > tier.quota_bytes
        assert "pinned models take 100.0 kB, more than the quota of 50.0 kB" in caplog.text
        with pytest.raises(NoCapacity):
            await put(tier, 5, 1000)
        assert held(tier) == [a, c]


async def test_a_key_is_written_by_one_at_a_time(tmp_path: Path) -> None:
    async with opened(tmp_path / "tier") as tier:
        begun = await asyncio.gather(*(begin(tier, STOCK) for _ in range(3)), return_exceptions=True)
        (partial,) = [one for one in begun if isinstance(one, SsdPartial)]
        assert [type(one) for one in begun].count(TargetBusy) == 2
        with pytest.raises(TargetBusy, match="near:3 is being written already"):
            await begin(tier, STOCK)
        await partial.pause()
        await (await begin(tier, STOCK)).drop()
        assert tier.entries() == [] and not os.listdir(tmp_path / "tier" / "partial")


async def test_each_write_asks_the_gate_first(tmp_path: Path) -> None:
    asked: list[int] = []
    free = asyncio.Event()

    async def gate(size_bytes: int) -> None:
        asked.append(size_bytes)
        await free.wait()

    async with opened(tmp_path / "tier", gate=gate) as tier:
        partial = await begin(tier, STOCK)
        data = memoryview(STOCK.chunk(ChunkPlace(0, 0)))
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(partial.write(0, 0, data), 0)
        waiting = asyncio.gather(partial.write(0, 0, data), return_exceptions=True)
        await asyncio.sleep(0)
        assert asked[-1] == CHUNK_BYTES and partial.done_bytes == 0
        free.set()
        assert (await waiting)[0] is None
        assert partial.done_bytes == CHUNK_BYTES
        free.clear()
        # Who still waits when the partial ends has written nothing.
        waiting = asyncio.gather(partial.write(0, 1, data), return_exceptions=True)
        await asyncio.sleep(0)
        await partial.pause()
        free.set()
        assert [type(answer) for answer in await waiting] == [TargetBusy]


async def test_cancelled_work_is_done_or_undone_and_never_half(tmp_path: Path) -> None:
    async with opened(tmp_path / "tier") as tier:
        for turns in range(12):
            beginning = asyncio.gather(begin(tier, STOCK))
            for _ in range(turns):
                await asyncio.sleep(0)
            beginning.cancel()
            with pytest.raises(asyncio.CancelledError):
                await beginning
        partial = await begin(tier, STOCK)
        for turns, place in enumerate(list(partial.missing())):
            data = bytearray(STOCK.chunk(place))
            writing = asyncio.gather(partial.write(*place, memoryview(data)))
            for _ in range(turns):
                await asyncio.sleep(0)
            writing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await writing
            # Nobody looks at the buffer any more, so what is written is what was in it.
            data[:] = bytes(len(data))
        await fill(partial, STOCK, random.Random(1), whole=True)
        publishing = asyncio.gather(partial.publish())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        publishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await publishing
        check_model(tmp_path / "tier" / "models" / STOCK.model_id, STOCK)
        assert held(tier) == [STOCK.model_id]


async def test_a_cancelled_opening_holds_nothing(tmp_path: Path) -> None:
    for turns in range(6):
        opening = asyncio.gather(SsdTier.open(tmp_path / "tier", ROOM, CLOCK))
        for _ in range(turns):
            await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
    async with opened(tmp_path / "tier"):
        pass


async def test_closing_pauses_what_is_written_and_takes_no_more(tmp_path: Path) -> None:
    async with opened(tmp_path / "tier") as tier:
        a = await put(tier, 1, SIZE)
        partial = await begin(tier, STOCK)
        writing = asyncio.gather(*(write(partial, STOCK, (0, chunk)) for chunk in range(3)))
        await asyncio.sleep(0)
        await asyncio.gather(tier.close(), tier.close())
        await writing
        for late in (begin(tier, STOCK), tier.evict(a), tier.pin(a), partial.discard(0, 0)):
            with pytest.raises((Draining, TargetBusy)):
                await late
        with pytest.raises(Draining):
            tier.lease(a)
    async with opened(tmp_path / "tier") as tier:
        assert [entry.done_bytes for entry in tier.entries() if entry.partial] == [3 * CHUNK_BYTES]


def test_the_known_models_differ() -> None:
    assert len({model.model_id for model in MODELS}) == len(MODELS)
