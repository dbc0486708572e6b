"""The one file below a checkpoint's folder, how a sentence model pools: from every source, converted, up the tiers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from checkpoints import folder_of
from houses import URL, tiers_at
from pooling_places import KINDS, OpenPlace, opener, written
from reading import refused, whole
from ssd_tiers import opened
from test_peer_source import Liar, folders, listed, model, two
from test_s3_source import server as server
from test_s3_source import settings_of_s3 as settings_of_s3

from sllm_actor.checkpoint.convert import convert
from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.checkpoint.manifest import OtherRecord, encode, model_id, parse_manifest
from sllm_actor.checkpoint.sentence_layout import read_sentence_layout
from sllm_actor.checkpoint.verify import verify
from sllm_actor.errors import (
    CheckpointConfigInvalid,
    CheckpointCorrupt,
    CheckpointInvalid,
    InvalidName,
    SourceInvalid,
    SourceMissing,
    TargetInvalid,
)
from sllm_actor.loader.ssd_record import PlannedFile
from sllm_actor.sources.listing import sizes_in_manifest
from sllm_actor.sources.local import FolderSource
from sllm_actor.sources.source import SourceFile
from sllm_actor.testing.tier_storm import CHUNK_BYTES

NESTED = "1_Pooling/config.json"
MEAN = b'{"pooling_mode": "mean"}'
TRANSFORMER = {"path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
DENSE = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}


def modules(path: str = "1_Pooling", *more: dict[str, Any]) -> bytes:
    return json.dumps([TRANSFORMER, POOLING | {"path": path}, *more]).encode()


def checkpoint(**more: bytes) -> dict[str, bytes]:
    """Everything that a source asks for, and `more` by names in which `__` is a slash and `_dot_` a dot."""
    files = {"config.json": b"{}", "model.safetensors": b"weights", "modules.json": modules()}
    return files | {name.replace("__", "/").replace("_dot_", "."): content for name, content in more.items()}


STOCK = ["config.json", "model.safetensors", "modules.json"]


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenPlace:
    """Open a checkpoint in a place of each kind."""
    return opener(request.param, request, tmp_path, monkeypatch)


# ---- sources ----


@pytest.mark.parametrize("folder", ["1_Pooling", "3_TheirOwn"])
async def test_every_source_lists_and_reads_the_pooling_that_modules_name(place: OpenPlace, folder: str) -> None:
    files = checkpoint() | {"modules.json": modules(folder, NORMALIZE), f"{folder}/config.json": MEAN}
    lengths = {f"sentence_{family}_config.json": b"{}" for family in ("bert", "xlm-roberta")}
    async with place(files | lengths) as source:
        found = {file.name: file for file in await source.files()}
        assert list(found) == sorted([*STOCK, *lengths, f"{folder}/config.json"])
        assert await whole(source, found[f"{folder}/config.json"]) == MEAN


@pytest.mark.parametrize(
    "named",
    [
        modules("1_Pooling/../x"), modules("../x"), modules("/x"), modules("onnx/deep"), modules(""), modules(".x"),
        modules("x" * 65), modules("x\u0301"), modules("1_Pooling", DENSE), b"{", b"[" * 50_000, b"[]", b"\xff",
        modules("x").ljust(100_001), json.dumps([POOLING, TRANSFORMER]).encode(),
        json.dumps([TRANSFORMER | {"path": "0_Transformer"}, POOLING]).encode(),
    ],
)  # fmt: skip
async def test_what_modules_do_not_rightly_name_is_no_part_of_it(place: OpenPlace, named: bytes) -> None:
    files = checkpoint() | {"modules.json": named}
    below = dict.fromkeys((NESTED, "x/config.json", "onnx/config.json", "onnx/deep/config.json", "2_Dense/config.json"))
    async with place(files | dict.fromkeys(below, MEAN)) as source:
        assert [file.name for file in await source.files()] == STOCK


async def test_other_files_below_a_folder_stay_where_they_are(place: OpenPlace) -> None:
    others = (
        "1_Pooling/model.safetensors", "1_Pooling/config.py", "1_Pooling/tokenizer.json", "2_Dense/config.json",
        "onnx/config.json", "1_Pooling/deep/config.json",
    )  # fmt: skip
    async with place(checkpoint() | {NESTED: MEAN} | dict.fromkeys(others, b"x")) as source:
        assert [file.name for file in await source.files()] == [NESTED, *STOCK]


async def test_a_file_where_the_folder_should_be_and_none_at_all_are_no_pooling(place: OpenPlace) -> None:
    async with place(checkpoint() | {"1_Pooling": b"a file"}) as source:
        assert [file.name for file in await source.files()] == STOCK


async def test_without_modules_nothing_below_the_folder_is_listed(place: OpenPlace) -> None:
    files = checkpoint() | {NESTED: MEAN}
    del files["modules.json"]
    async with place(files) as source:
        assert [file.name for file in await source.files()] == STOCK[:2]


async def test_a_folder_gives_no_other_file_below_it_to_who_knows_its_name(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", checkpoint() | {NESTED: MEAN, "onnx/config.json": b"x", "x": b"x"})
    source = FolderSource(folder)
    assert await whole(source, await source.find(NESTED)) == MEAN
    for name in ("onnx/config.json", "1_Pooling/../x", "1_Pooling/../config.json", "./config.json", f"{folder}/x"):
        await refused(SourceMissing, source.find(name))
        await refused(SourceInvalid, whole(source, SourceFile(name, 1, "1-1-1")))
    async with two(folders(model=folder)) as (peer, _):
        known = {file.name: file for file in await peer.files()}[NESTED]
        assert await whole(peer, known) == MEAN
        for name in ("1_Pooling/../x", "1_Pooling/../config.json", "1_Pooling/x.json"):
            await refused(SourceMissing, whole(peer, SourceFile(name, 1, known.validator)))
        await refused(SourceInvalid, whole(peer, SourceFile("onnx/config.json", 1, known.validator)))


@pytest.mark.parametrize("linked", ["1_Pooling", NESTED])
async def test_a_link_out_of_the_folder_is_refused_by_name(tmp_path: Path, linked: str) -> None:
    folder = written(tmp_path / "model", checkpoint() | {"3_Own/config.json": MEAN, NESTED: MEAN})
    outside = written(tmp_path / "outside", {"config.json": b"secret"})
    source = FolderSource(folder)
    before = await source.find(NESTED)
    (folder / NESTED).unlink()
    if linked == "1_Pooling":
        (folder / linked).rmdir()
        (folder / linked).symlink_to(outside)
    else:
        (folder / linked).symlink_to(outside / "config.json")
    for asked in (source.files(), source.find(NESTED), whole(source, before)):
        assert "out of the folder" in (await refused(SourceInvalid, asked)).message
    # One that stays inside is followed, as for other files.
    (folder / linked).unlink()
    (folder / linked).symlink_to("3_Own" if linked == "1_Pooling" else "../3_Own/config.json")
    assert await whole(source, await source.find(NESTED)) == MEAN


async def test_the_pooling_of_a_hugging_face_cache_is_read_through_its_link(tmp_path: Path) -> None:
    snapshot = written(tmp_path / "models--org--m" / "snapshots" / "abc", checkpoint())
    written(tmp_path / "models--org--m" / "blobs", {"1d": MEAN})
    (snapshot / "1_Pooling").mkdir()
    (snapshot / NESTED).symlink_to("../../../blobs/1d")
    source = FolderSource(snapshot)
    assert await whole(source, await source.find(NESTED)) == MEAN


@pytest.mark.parametrize(
    "names",
    [
        (NESTED,), (NESTED, "modules.json", "2_Pooling/config.json"), ("1_Pooling/../x", "modules.json"),
        ("1_Pooling/x.json", "modules.json"), ("a/b/config.json", "modules.json"),
        ("vocab", "vocab/config.json", "modules.json"),
    ],
)  # fmt: skip
async def test_a_peer_that_lists_what_no_modules_could_name_is_refused(names: tuple[str, ...]) -> None:
    peer = Liar((model(len(names)), *map(listed, names)), lambda _: None)
    async with two(peer) as (source, _):
        await refused(SourceInvalid, source.files())


@pytest.mark.parametrize(
    "below",
    [
        (NESTED,), ("1_Pooling/../x", "modules.json"), ("/config.json", "modules.json"),
        ("a/b/config.json", "modules.json"), (NESTED, "2_Pooling/config.json", "modules.json"),
        ("1_Pooling/x.json", "modules.json"), ("vocab", "vocab/config.json", "modules.json"),
    ],
)  # fmt: skip
def test_a_manifest_that_lists_what_no_modules_could_name_is_refused(sentences: Path, below: tuple[str, ...]) -> None:
    manifest = convert(sentences, sentences.with_name("out")).manifest
    assert NESTED in sizes_in_manifest(encode(manifest), "sllm.json")
    others = tuple(OtherRecord(name, 1, "0" * 32) for name in sorted(("config.json", *below)))
    lie = msgspec.structs.replace(manifest, others=others)
    raw = encode(msgspec.structs.replace(lie, model_id=model_id(lie)))
    with pytest.raises(CheckpointInvalid):
        parse_manifest(raw)
    with pytest.raises(SourceInvalid, match="can't be part of a checkpoint"):
        sizes_in_manifest(raw, "sllm.json")


# ---- converted ----


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    """A stock checkpoint in the layout of sentence-transformers."""
    folder = folder_of(tmp_path / "stock", 40_000)
    return written(folder, {
        "modules.json": modules("1_Pooling", NORMALIZE), NESTED: MEAN,
        "sentence_bert_config.json": b'{"max_seq_length": 16}',
        "config_sentence_transformers.json": b"{}", "onnx/config.json": b"x", "2_Normalize/config.json": b"{}",
    })  # fmt: skip


def test_a_converted_copy_has_the_layout_and_digests_of_it(sentences: Path, tmp_path: Path) -> None:
    done = convert(sentences, tmp_path / "out")
    beside = {"modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", NESTED}
    assert beside | {"config.json"} == {other.name for other in done.manifest.others}
    assert read_sentence_layout(done.path) == read_sentence_layout(sentences)
    assert [path.name for path in (done.path / "1_Pooling").iterdir()] == ["config.json"]
    assert sorted(path.name for path in done.path.iterdir() if path.is_dir()) == ["1_Pooling"]
    assert verify(done.path).model_id == done.manifest.model_id
    # And so has a copy of the copy, which is the same checkpoint.
    assert convert(done.path, tmp_path / "again").manifest.model_id == done.manifest.model_id
    (done.path / NESTED).write_bytes(MEAN.replace(b"mean", b"last"))
    with pytest.raises(CheckpointCorrupt, match=NESTED):
        verify(done.path)


def test_the_pooling_is_part_of_what_a_model_id_tells(sentences: Path, tmp_path: Path) -> None:
    before = convert(sentences, tmp_path / "a").manifest.model_id
    (sentences / NESTED).write_bytes(b'{"pooling_mode": "max"}')
    assert convert(sentences, tmp_path / "b").manifest.model_id != before


def test_a_converted_folder_that_differs_from_its_manifest_below_it_is_refused(sentences: Path, tmp_path: Path) -> None:
    folder = convert(sentences, tmp_path / "out").path
    for content, said in ((MEAN + b" ", "bytes and should have"), (None, "listed and missing")):
        (folder / NESTED).unlink()
        if content is not None:
            (folder / NESTED).write_bytes(content)
        with pytest.raises(CheckpointInvalid, match=f"{NESTED} .*{said}|{NESTED} is {said}"):
            read_folder(folder)
    (folder / "1_Pooling").rmdir()
    (folder / "1_Pooling").write_text("a file")
    with pytest.raises(CheckpointInvalid, match=f"{NESTED} is listed and missing"):
        read_folder(folder)


def test_a_pooling_that_came_later_or_that_modules_do_not_name_is_refused(sentences: Path, tmp_path: Path) -> None:
    shutil.rmtree(sentences / "1_Pooling")
    folder = convert(sentences, tmp_path / "out").path
    assert read_folder(folder).manifest is not None
    written(folder, {NESTED: MEAN})
    with pytest.raises(CheckpointInvalid, match=f"{NESTED} is in the folder and not listed"):
        read_folder(folder)
    whole_one = convert(written(sentences, {NESTED: MEAN}), tmp_path / "whole").path
    written(whole_one, {"modules.json": (whole_one / "modules.json").read_bytes().replace(b"1_P", b"3_P")})
    with pytest.raises(CheckpointInvalid, match=f"{NESTED} is listed, and modules.json does not name it"):
        read_folder(whole_one)


def test_a_pooling_that_is_too_long_is_not_converted(sentences: Path, tmp_path: Path) -> None:
    (sentences / NESTED).write_bytes(MEAN.ljust(100_001))
    with pytest.raises(CheckpointInvalid, match="too long for what it is"):
        convert(sentences, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pooling_that_is_a_link_into_the_replaced_target_is_refused(sentences: Path, tmp_path: Path) -> None:
    target = convert(sentences, tmp_path / "out").path
    (sentences / NESTED).unlink()
    (sentences / NESTED).symlink_to(target / NESTED)
    with pytest.raises(TargetInvalid, match="is a link into"):
        convert(sentences, target, replace=True)


# ---- up the tiers ----


@pytest.fixture(params=["stock", "converted"])
def origin_folder(request: pytest.FixtureRequest, sentences: Path, tmp_path: Path) -> Path:
    return sentences if request.param == "stock" else convert(sentences, tmp_path / "origin").path


async def test_the_pooling_is_in_the_card_and_on_the_ssd(origin_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "node"
    async with tiers_at(data, lambda _: FolderSource(origin_folder)) as tiers:
        card = await tiers.describe(URL)
        assert read_sentence_layout(card.checkpoint.path) == read_sentence_layout(origin_folder)
        await tiers.pull(card, None)
        stored = tiers.ssd.lease(card.model_id, "test")
        assert stored is not None
        place = stored.path
        assert (place / NESTED).read_bytes() == MEAN
        assert read_sentence_layout(read_folder(place).path) == read_sentence_layout(origin_folder)
        stored.release()
    # Found again by the next process; one whose folder has become a link to elsewhere is not.
    async with tiers_at(data, lambda _: FolderSource(origin_folder)) as tiers:
        assert tiers.is_on_ssd(await tiers.describe(URL))
    (place / "1_Pooling").rename(tmp_path / "elsewhere")
    (place / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    async with tiers_at(data, lambda _: FolderSource(origin_folder)) as tiers:
        assert not tiers.is_on_ssd(await tiers.describe(URL))
    assert (tmp_path / "elsewhere" / "config.json").read_bytes() == MEAN


async def test_a_pooling_that_is_too_long_or_missing_makes_no_card(sentences: Path, tmp_path: Path) -> None:
    async with tiers_at(tmp_path / "node", lambda _: FolderSource(sentences)) as tiers:
        (sentences / NESTED).write_bytes(MEAN.ljust(100_001))
        assert NESTED in (await refused(SourceInvalid, tiers.describe(URL))).message
        (sentences / NESTED).unlink()
        with pytest.raises(CheckpointConfigInvalid, match="deploy the folder as it was published"):
            read_sentence_layout((await tiers.describe(URL)).checkpoint.path)


@pytest.mark.parametrize(
    "names",
    [
        (NESTED,), (NESTED, "modules.json", "2_Pooling/config.json"), ("1_Pooling/../x", "modules.json"),
        ("1_Pooling/x.json", "modules.json"), ("vocab", "vocab/config.json", "modules.json"),
    ],
)  # fmt: skip
async def test_the_ssd_takes_no_other_file_below_a_model(tmp_path: Path, names: tuple[str, ...]) -> None:
    async with opened(tmp_path / "tier") as tier:
        with pytest.raises(InvalidName):
            await tier.begin("k", [PlannedFile("model.safetensors", 5, "v")], dict.fromkeys(names, b"x"), CHUNK_BYTES)
        with pytest.raises(InvalidName):
            await tier.begin("k", [PlannedFile(NESTED, 5, "v")], {"config.json": b"{}"}, CHUNK_BYTES)
