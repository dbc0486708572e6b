"""What earlier releases wrote is read, and what this one writes is what it wrote before, or has a new number."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import golden_files
import golden_frames
import pytest
from converted import stored

from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.checkpoint.verify import verify
from sllm_actor.errors import CheckpointInvalid
from sllm_actor.loader.ssd_tier import SsdTier
from sllm_actor.metadata import SqliteStore
from sllm_actor.runtime import SystemClock
from sllm_actor.runtime.handshake import VERSION_MAX, VERSION_MIN

RELEASES = sorted(path for path in golden_files.GOLDEN.iterdir() if path.is_dir())
PAGE = Path(__file__).parent.parent / "docs/releases.md"
NUMBERED = {
    "protocol between nodes": "protocol", "checkpoint format": "checkpoint", "SSD tier": "ssd_tier",
    "metadata in SQLite": "metadata", "disk profile": "disk_profile", "native library": "native_library",
}  # fmt: skip

releases = pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
kinds = pytest.mark.parametrize("kind", golden_files.KINDS)


def versions(release: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((release / "versions.json").read_text())
    return found


def test_a_release_has_written_what_this_program_writes() -> None:
    assert golden_files.versions() in [versions(release) for release in RELEASES]


def test_the_page_of_releases_has_the_numbers_of_the_program() -> None:
    rows = dict(re.findall(r"^\| ([\w ]+) \| (\d+) \|", PAGE.read_text(), re.MULTILINE))
    assert {NUMBERED[name]: int(number) for name, number in rows.items()} == golden_files.versions()


@releases
def test_messages_that_change_are_a_new_version_of_the_protocol(release: Path) -> None:
    if versions(release)["protocol"] == VERSION_MAX:
        assert (release / "messages.json").read_text() == golden_files.messages(), (
            "a message between nodes has changed: raise VERSION_MAX, or, before this release is out, write it anew"
        )
    assert VERSION_MIN <= VERSION_MAX


@releases
def test_frames_that_change_are_a_new_version_of_the_protocol(release: Path) -> None:
    if versions(release)["protocol"] == VERSION_MAX:
        assert (release / "frames.json").read_text() == golden_frames.written()


@releases
@kinds
def test_checkpoints_of_every_release_are_read_with_every_byte(release: Path, kind: str) -> None:
    folder = release / "checkpoints" / kind
    manifest = read_folder(folder).manifest
    assert manifest is not None and manifest.partition.kind.value == kind
    assert verify(folder).model_id == manifest.model_id
    if kind != "tensor_parallel":
        assert stored(folder) == golden_files.tensors()


@kinds
def test_what_is_converted_now_is_what_this_format_was(tmp_path: Path, kind: str) -> None:
    golden_files.write_checkpoints(tmp_path / "now")
    for release in RELEASES:
        if versions(release)["checkpoint"] == golden_files.versions()["checkpoint"]:
            golden = release / "checkpoints" / kind
            assert {path.name: path.read_bytes() for path in golden.iterdir()} == {
                path.name: path.read_bytes() for path in (tmp_path / "now" / kind).iterdir()
            }


@releases
def test_a_golden_checkpoint_with_one_bit_changed_is_refused(release: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(release / "checkpoints/none", tmp_path / "damaged")
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointInvalid):
        verify(folder)


@releases
async def test_the_ssd_of_every_release_keeps_its_models_and_pins(release: Path, tmp_path: Path) -> None:
    if versions(release)["ssd_tier"] == golden_files.versions()["ssd_tier"]:
        folder = shutil.copytree(release / "ssd", tmp_path / "ssd")
        tier = await SsdTier.open(folder, golden_files.QUOTA_BYTES, SystemClock())
        (entry,) = tier.entries()
        assert entry.pinned and not entry.partial
        manifest = read_folder(release / "checkpoints/none").manifest
        assert manifest is not None and entry.model_id == manifest.model_id
        await tier.close()


@releases
async def test_the_registrations_of_every_release_are_taken_over(release: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "m.db")) as file:
        file.executescript((release / "metadata.sql").read_text())
    store = await SqliteStore.open(tmp_path / "m.db")
    found = (await store.list("")).facts
    assert {fact.key: fact.value for fact in found} == golden_files.FACTS
    await store.close()
