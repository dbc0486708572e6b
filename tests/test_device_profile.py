"""The profile of a disk: what is stored, what is believed, and what the node makes of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest
from conftest import StartNode
from hypothesis import given
from hypothesis import strategies as st

from sllm_actor.config import Config
from sllm_actor.errors import ConfigInvalid, WriteFailed
from sllm_actor.loader import device_profile
from sllm_actor.loader.calibration import best_threads
from sllm_actor.loader.device_profile import (
    MAX_FILE_BYTES,
    NAME,
    Alone,
    DeviceProfile,
    Together,
    device_of,
    read_profile,
    write_profile,
)
from sllm_actor.loader.loader import Loader
from sllm_actor.loader.write_gate import allowed_bytes_per_s
from sllm_actor.node import Node


def profile_of(folder: Path, threads: int = 3) -> DeviceProfile:
    return DeviceProfile(
        device=device_of(folder),
        reader="io_uring",
        direct=True,
        chunk_bytes=2**24,
        reads=(Alone(1, 1e9), Alone(threads, 2e9)),
        writes=(Alone(1, 4e8), Alone(2, 6e8)),
        together=(Together(threads, 1, 1.5e9, 5e8),),
        reading_threads=threads,
        measured_at=datetime(2026, 1, 1, tzinfo=UTC),
        package_version="0.1.0",
    )


def stored(folder: Path, **changes: Any) -> Path:
    """Store a profile with some of its fields changed, as whoever edits it by hand might."""
    path = write_profile(folder, profile_of(folder))
    built = msgspec.json.decode(path.read_bytes())
    path.write_bytes(msgspec.json.encode(built | changes))
    return path


def test_a_profile_that_was_stored_is_read_as_it_was(tmp_path: Path) -> None:
    assert read_profile(tmp_path) is None
    first, second = profile_of(tmp_path), profile_of(tmp_path, threads=8)
    for profile in (first, second):
        assert write_profile(tmp_path, profile) == tmp_path / NAME
        assert read_profile(tmp_path) == profile
    assert os.listdir(tmp_path) == [NAME]
    assert (first.read_bytes_per_s, first.write_bytes_per_s) == (2e9, 6e8)
    assert first.together[0].write_share == 0.25
    assert allowed_bytes_per_s(first, 5) == 3e7


def test_its_age_is_not_negative_where_the_clock_was_set_back(tmp_path: Path) -> None:
    profile = profile_of(tmp_path)
    measured_s = profile.measured_at.timestamp()
    assert profile.age_s(measured_s + 5) == 5
    assert profile.age_s(measured_s - 5) == 0


def write_raw(raw: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (write_raw(b""), "is damaged"),
        (write_raw(b"\0" * 100), "is damaged"),
        (write_raw(b"[]"), "is damaged"),
        (write_raw(b'{"version": 1}'), "is damaged"),
        (write_raw(b'{"version": 2, "more": []}'), "is of format 2"),
        (write_raw(b"[" * 50_000), "is damaged"),
        (write_raw(b" " * (MAX_FILE_BYTES + 1)), "is longer than"),
        (os.mkfifo, "is damaged"),
        (os.mkdir, "can't be read"),
        (lambda path: path.symlink_to(path), "can't be read"),
        (lambda path: path.symlink_to("/dev/zero"), "is longer than"),
    ],
)
def test_what_is_no_profile_is_refused_and_named(tmp_path: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(tmp_path / NAME)
    with pytest.raises(ConfigInvalid, match=said) as caught:
        read_profile(tmp_path)
    assert str(tmp_path / NAME) in caught.value.message


@pytest.mark.parametrize(
    "changes",
    [
        {"reading_threads": 0}, {"reading_threads": 65}, {"reading_threads": "4"}, {"reads": []}, {"writes": []},
        {"reads": [{"threads": 1, "bytes_per_s": 0}]}, {"writes": [{"threads": 1, "bytes_per_s": -1.0}]},
        {"writes": [{"threads": 1, "bytes_per_s": 1e300}]}, {"reads": [{"threads": 1, "bytes_per_s": 1.0}] * 65},
        {"measured_at": "yesterday"}, {"measured_at": "2026-01-01T00:00:00"}, {"chunk_bytes": 0}, {"more": 1},
        {"reader": "x" * 300},
    ],
)  # fmt: skip
def test_a_profile_out_of_bounds_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    stored(tmp_path, **changes)
    with pytest.raises(ConfigInvalid, match="is damaged"):
        read_profile(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"filesystem_id": 1}, {"source": "/dev/other"}, {"size_bytes": 512}, {"kind": "other"}]
)
def test_a_profile_of_another_device_is_not_believed(tmp_path: Path, changes: dict[str, Any]) -> None:
    device = msgspec.to_builtins(device_of(tmp_path))
    stored(tmp_path, device=device | changes)
    with pytest.raises(ConfigInvalid, match="was measured on another device"):
        read_profile(tmp_path)


@given(st.binary(max_size=200))
def test_no_bytes_at_all_do_more_than_to_be_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / NAME).write_bytes(raw)
    with pytest.raises(ConfigInvalid):
        read_profile(folder)


def test_a_profile_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = write_profile(tmp_path, profile_of(tmp_path))
    raw = path.read_bytes().rstrip()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(ConfigInvalid):
            read_profile(tmp_path)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f".{NAME}.partial").write_bytes(b"of a killed process")
    first = profile_of(tmp_path)
    write_profile(tmp_path, first)

    def full(*_: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    for name in ("write", "fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, full)
            with pytest.raises(WriteFailed, match="No space left"):
                write_profile(tmp_path, profile_of(tmp_path, threads=8))
        assert os.listdir(tmp_path) == [NAME]
        assert read_profile(tmp_path) == first


def test_a_device_is_told_by_the_mount_that_its_folder_lies_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = os.path.realpath(tmp_path)
    spaced = tmp_path / "a b"
    (spaced / "deeper").mkdir(parents=True)
    (tmp_path / "a").mkdir()
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"2 1 8:2 / {here}/a\\040b rw shared:1 - xfs /dev/with\\040space rw\n"
        f"3 1 8:3 / {here}/a rw - tmpfs hidden rw\n"
        f"4 1 8:3 / {here}/a rw - tmpfs on\\134top rw,size=1k\n"
    )
    monkeypatch.setattr(device_profile, "_MOUNTS", mounts)
    found = {folder: device_of(folder) for folder in (tmp_path, spaced / "deeper", tmp_path / "a")}
    assert [(each.kind, each.source) for each in found.values()] == [
        ("ext4", "/dev/sda1"), ("xfs", "/dev/with space"), ("tmpfs", "on\\top"),
    ]  # fmt: skip


def test_a_folder_that_is_not_there_has_no_device(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="can't be examined"):
        device_of(tmp_path / "absent")


@pytest.mark.parametrize(
    ("reads", "best"),
    [
        ({1: 1.0, 2: 2.0, 4: 3.9, 8: 4.0, 16: 3.0}, 4),
        ({1: 1.0, 2: 1.0, 4: 1.0}, 1),
        ({1: 4.0, 2: 3.0, 4: 2.0}, 1),
        ({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0, 16: 16.0}, 16),
    ],
)
def test_the_fewest_threads_that_read_nearly_as_fast_as_any_are_best(reads: dict[int, float], best: int) -> None:
    assert best_threads(reads) == best


class _Enough(Exception):
    """The loader was asked for, and a node need not start any further."""


@pytest.mark.parametrize(
    ("set_threads", "prepare", "threads", "warning"),
    [
        (0, lambda folder: None, 4, ""),
        (0, lambda folder: stored(folder), 3, ""),
        (7, lambda folder: stored(folder), 7, ""),
        (0, lambda folder: (folder / NAME).write_bytes(b"{"), 4, "is damaged"),
        (0, lambda folder: stored(folder, version=9), 4, "is of format 9"),
        (0, lambda folder: stored(folder, device=msgspec.to_builtins(device_of(Path("/proc")))), 4, "another device"),
    ],
    ids=["none", "the profile's", "set", "damaged", "of another format", "of another device"],
)
async def test_a_node_reads_with_the_threads_of_the_profile_unless_they_are_set(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    set_threads: int,
    prepare: Callable[[Path], object],
    threads: int,
    warning: str,
) -> None:
    asked: dict[str, Any] = {}

    async def remember(**options: Any) -> NoReturn:
        asked.update(options)
        raise _Enough

    monkeypatch.setattr(Loader, "open", remember)
    prepare(tmp_path)
    with caplog.at_level(logging.WARNING), pytest.raises(_Enough):
        await Node(Config(data_dir=str(tmp_path), port=0, reading_threads=set_threads)).__aenter__()
    assert asked["reading_threads"] == threads
    said = [record.message for record in caplog.records if NAME in record.message]
    assert len(said) == bool(warning)
    assert all(warning in message and "sllm-node calibrate" in message for message in said)


def test_a_running_node_has_as_many_threads_and_shows_its_gate(tmp_path: Path, start_node: StartNode) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_profile(folder, profile_of(folder))
    with start_node() as node:
        tasks = Path(f"/proc/{node.process.pid}/task").glob("*/comm")
        assert [task.read_text().strip() for task in tasks].count("sllm-reader") == 3
        writes = node.call("GET", "/admin/runtime")["writes"]
        assert writes == {"holding": False, "bytes_per_s": 3e7, "passed_bytes": 0, "held_s": 0.0}
