"""Conversion under fire: kills at any moment, full disks, cancellation, two at once. Old or new, never half."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import noise
from converted import Described, leftovers, stock_folder, stored

from sllm_actor.checkpoint import staging
from sllm_actor.checkpoint.convert import convert
from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.checkpoint.verify import verify
from sllm_actor.errors import CheckpointChanged, TargetBusy, TargetExists, WriteFailed

OLD: dict[str, Described] = {"old": ("U8", [100], noise(100, 1))}
NEW: dict[str, Described] = {f"layers.{k}.w": ("U8", [40_001], noise(40_001, k)) for k in range(6)}

# Kills itself before the n-th call that changes the file system, or reports how many there were.
KILLER = """
import ctypes, os, signal, sys
from pathlib import Path
from sllm_actor.checkpoint import staging
from sllm_actor.checkpoint.convert import convert
at, seen = int(sys.argv[3]), 0
def counted(call):
    def wrapped(*args, **kwargs):
        global seen
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1
        return call(*args, **kwargs)
    return wrapped
staging.shutil.rmtree = counted(staging.shutil.rmtree)
staging._rename = (lambda *args: False) if sys.argv[4] == 'plain' else counted(staging._rename)
for name in ('write', 'fsync', 'rename', 'mkdir', 'unlink', 'rmdir', 'close'):
    setattr(os, name, counted(getattr(os, name)))
convert(Path(sys.argv[1]), Path(sys.argv[2]), partitions=2, replace=True, chunk_bytes=4096)
print(seen)
"""


def run_killer(source: Path, target: Path, at: int, renames: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", KILLER, str(source), str(target), str(at), renames],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stock_folder(tmp_path_factory.mktemp("source") / "a", NEW)


@pytest.mark.parametrize("renames", ["exchange", "plain"])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_conversion_killed_anywhere_leaves_the_old_or_the_new_and_nothing_for_the_next(
    tmp_path: Path, source: Path, replacing: bool, renames: str
) -> None:
    old = stock_folder(tmp_path / "old", OLD)
    target = tmp_path / "b"

    def prepare() -> None:
        if replacing:
            convert(old, target, replace=True)
        elif target.exists():
            shutil.rmtree(target)

    prepare()
    whole = run_killer(source, target, -1, renames)
    assert whole.returncode == 0, whole.stderr
    calls = int(whole.stdout)
    draw = random.Random(f"{replacing} {renames}")
    # Every moment of the ending, where the folder changes its name, and some of the writing.
    points = sorted({*range(calls - 9, calls), *draw.sample(range(calls - 9), 4)})
    seen = set()
    for at in points:
        prepare()
        killed = run_killer(source, target, at, renames)
        assert killed.returncode == -signal.SIGKILL, f"at {at} of {calls}: {killed.stderr}"
        if target.exists():
            state = stored(target)
            assert verify(target).model_id
            assert state in (OLD, NEW)
            seen.add("new" if state == NEW else "old")
        else:
            # Only where the file system can't exchange may a killed replacement leave none for a moment.
            assert not replacing or renames == "plain"
            seen.add("none")
        if replacing:
            # The next conversion puts back what there was and clears up, also where it may not go on.
            with pytest.raises(TargetExists):
                convert(old, target)
            assert stored(target) in (OLD, NEW) and leftovers(tmp_path) == []
        convert(source, target, replace=True)
        assert stored(target) == NEW and leftovers(tmp_path) == []
    assert {"new", "old" if replacing else "none"} <= seen


@pytest.mark.parametrize("replacing", [False, True])
def test_everything_is_on_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, source: Path, replacing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill can't show and a power cut would: the order of syncs and renames."""
    target = tmp_path / "b"
    if replacing:
        convert(stock_folder(tmp_path / "old", OLD), target)
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, staging._rename

    def synced(fd: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{fd}")).name))
        fsync(fd)

    def renamed(old: Path, new: Path, flags: int) -> bool:
        events.append(("rename", new.name))
        return rename(old, new, flags)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(staging, "_rename", renamed)
    convert(source, target, partitions=2, replace=replacing)
    at = events.index(("rename", "b"))
    assert {name for _, name in events[: at - 1]} == {path.name for path in target.iterdir()}
    assert events[at - 1] == ("sync", ".b.sllm-partial")
    assert events[at + 1 :] == [("sync", tmp_path.name)]


def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path: Path, source: Path) -> None:
    stage = tmp_path / ".b.sllm-partial"
    (stage / "deep").mkdir(parents=True)
    (stage / "deep" / "file").write_text("x")
    (stage / "model.safetensors").write_text("half")
    convert(source, tmp_path / "b")
    assert leftovers(tmp_path) == [] and stored(tmp_path / "b") == NEW
    assert not (tmp_path / "b" / "deep").exists()


def test_two_conversions_into_one_place_do_not_meet(tmp_path: Path, source: Path) -> None:
    met: list[bool] = []

    def second(done_bytes: int, total_bytes: int) -> None:
        if not met:
            with pytest.raises(TargetBusy, match="another process"):
                convert(source, tmp_path / "b")
            convert(source, tmp_path / "other")
            met.append(True)

    convert(source, tmp_path / "b", on_progress=second)
    assert met and stored(tmp_path / "b") == stored(tmp_path / "other") == NEW and leftovers(tmp_path) == []


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path: Path, source: Path) -> None:
    def appear(done_bytes: int, total_bytes: int) -> None:
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / "letter").write_text("dear")

    for replace in (False, True):
        with pytest.raises(TargetExists):
            convert(source, tmp_path / "b", on_progress=appear, replace=replace)
        assert [path.name for path in (tmp_path / "b").iterdir()] == ["letter"] and leftovers(tmp_path) == []


class Cancelled(OSError):
    """One that must not be taken for a fault of the disk."""


@pytest.mark.parametrize("how", [Cancelled, KeyboardInterrupt])
@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_cancelling_leaves_what_was_there(
    tmp_path: Path, source: Path, replacing: bool, share: float, how: type[BaseException]
) -> None:
    if replacing:
        convert(stock_folder(tmp_path / "old", OLD), tmp_path / "b")

    def cancel(done_bytes: int, total_bytes: int) -> None:
        if done_bytes >= share * total_bytes:
            raise how

    with pytest.raises(how):
        convert(source, tmp_path / "b", replace=replacing, on_progress=cancel)
    assert leftovers(tmp_path) == []
    assert stored(tmp_path / "b") == (OLD if replacing else {})
    assert (tmp_path / "b").exists() is replacing


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    own = stock_folder(tmp_path / "a", NEW)
    with pytest.raises(CheckpointChanged):
        convert(own, tmp_path / "b", on_progress=lambda done, total: os.utime(own / "model.safetensors", ns=(1, done)))
    with pytest.raises(CheckpointChanged, match="shorter"):
        convert(own, tmp_path / "b", on_progress=lambda done, total: os.truncate(own / "model.safetensors", 1000))
    assert not (tmp_path / "b").exists() and leftovers(tmp_path) == []


def test_a_file_larger_than_the_disk_takes_is_a_typed_error_and_nothing_is_left(tmp_path: Path, source: Path) -> None:
    convert(stock_folder(tmp_path / "old", OLD), tmp_path / "b")
    program = (
        "import resource, sys; from pathlib import Path; from sllm_actor.checkpoint.convert import convert\n"
        "from sllm_actor.errors import WriteFailed\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: convert(Path(sys.argv[1]), Path(sys.argv[2]), replace=True)\n"
        "except WriteFailed as error: print(error.message)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(source), str(tmp_path / "b")], capture_output=True, text=True, check=True
    )
    assert "model.safetensors can't be written: File too large" in ran.stdout
    assert stored(tmp_path / "b") == OLD and leftovers(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own of 256 KiB, where this process may mount one."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = tmp_path / "disk"
    place.mkdir()
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, b"size=256k") != 0:
        pytest.skip(f"no tmpfs can be mounted: {os.strerror(ctypes.get_errno())}")
    yield place
    libc.umount2(os.fsencode(place), 2)


def test_a_disk_without_room_is_refused_before_the_first_byte(small_disk: Path, tmp_path: Path) -> None:
    large = stock_folder(tmp_path / "a", {"x": ("U8", [400_000], noise(400_000, 1))})
    begun: list[int] = []
    with pytest.raises(WriteFailed, match=r"262\.1 kB free and 40\d\.\d kB are to be written"):
        convert(large, small_disk / "b", on_progress=lambda done, total: begun.append(done))
    assert begun == [] and list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_keeps_the_old_checkpoint(small_disk: Path, tmp_path: Path) -> None:
    convert(stock_folder(tmp_path / "old", OLD), small_disk / "b")
    new = stock_folder(tmp_path / "a", {f"layers.{k}.w": ("U8", [10_000], noise(10_000, k)) for k in range(6)})

    def fill(done_bytes: int, total_bytes: int) -> None:
        with (small_disk / "other").open("ab", buffering=0) as opened, contextlib.suppress(OSError):
            opened.write(bytes(300_000))

    with pytest.raises(WriteFailed, match="No space left on device"):
        convert(new, small_disk / "b", partitions=3, replace=True, on_progress=fill)
    assert stored(small_disk / "b") == OLD and verify(small_disk / "b").model_id
    assert {path.name for path in small_disk.iterdir()} == {"b", "other"}
    (small_disk / "other").unlink()
    convert(new, small_disk / "b", partitions=3, replace=True)
    assert len(stored(small_disk / "b")) == 6 and {path.name for path in small_disk.iterdir()} == {"b"}


def test_memory_stays_within_bounds(tmp_path: Path) -> None:
    size_bytes = 200_000_000
    source = tmp_path / "a"
    source.mkdir()
    (source / "config.json").write_text("{}")
    header = f'{{"x":{{"dtype":"U8","shape":[{size_bytes}],"data_offsets":[0,{size_bytes}]}}}}'.encode()
    with (source / "model.safetensors").open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.truncate(8 + len(header) + size_bytes)
    program = (
        "import resource, sys; from pathlib import Path; from sllm_actor.checkpoint.convert import convert\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(source), str(tmp_path / "b")], capture_output=True, text=True, check=True
    )
    assert int(ran.stdout) * 1024 < 32 * 2**20
    assert read_folder(tmp_path / "b").files[0].size_bytes == size_bytes + 4096


def test_a_lock_is_taken_on_the_folder_that_is_at_the_path(tmp_path: Path) -> None:
    stage = tmp_path / ".b.sllm-partial"
    stage.mkdir()
    held = os.open(stage, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with pytest.raises(TargetBusy), staging.staged(tmp_path / "b", replace=False, check_old=lambda old: None):
            pass
    finally:
        os.close(held)
    with staging.staged(tmp_path / "b", replace=False, check_old=lambda old: None) as given:
        (given / "x").write_text("y")
    assert (tmp_path / "b" / "x").read_text() == "y"
