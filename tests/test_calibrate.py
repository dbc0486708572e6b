"""`sllm-node calibrate` on real disks: what it finds, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from loaders import held, settled
from terminals import in_terminal

from sllm_actor.errors import CheckpointChanged, ConfigInvalid, WriteFailed
from sllm_actor.loader import calibration
from sllm_actor.loader.calibration import BESIDE_THREADS, STEPS, THREADS, Options, calibrate
from sllm_actor.loader.device_profile import NAME, DeviceProfile, device_of, read_profile, write_profile
from sllm_actor.loader.scratch import Scratch, Writers
from sllm_actor.node.data_folder import LOCK, DataFolder
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.testing.node_process import CLI
from sllm_actor.units import GIB, KIB, MIB

TINY = ("--size", "8MiB", "--seconds", "0.02")
QUICK = Options(size_bytes=MIB, seconds=0.001)


def cli(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run(
        [CLI, *arguments], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran


def cli_json(*arguments: str | Path, status: int = 0, **environment: str) -> Any:
    ran = cli(*arguments, "--json", **environment)
    assert ran.returncode == status, ran
    return json.loads(ran.stdout)


def finding(folder: Path, *arguments: str) -> dict[str, str]:
    ran = cli(
        "doctor", "--port", "0", "--data-dir", folder, "--set", "host_pool_bytes=64MiB", *arguments, "--json"
    )  # fmt: skip
    # What else it finds is the machine's: 4 says that there are warnings.
    assert ran.returncode in (0, 4), ran
    found: dict[str, str] = next(
        check for check in json.loads(ran.stdout)["checks"] if check["check"] == "disk profile"
    )
    return found


@pytest.fixture
def leaves_nothing(tmp_path: Path) -> Iterator[None]:
    def state() -> tuple[object, ...]:
        return held(), sorted(path.name for path in tmp_path.iterdir())

    before = state()
    yield
    assert settled(state, before) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own of 16 MiB, where this process may mount one."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = tmp_path / "disk"
    place.mkdir()
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, b"size=16m") != 0:
        pytest.skip(f"no tmpfs can be mounted: {os.strerror(ctypes.get_errno())}")
    yield place
    libc.umount2(os.fsencode(place), 2)


def free_bytes(folder: Path) -> int:
    return os.statvfs(folder).f_bfree * os.statvfs(folder).f_frsize


def test_the_disk_is_measured_the_profile_stored_and_doctor_shows_it(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    missing = finding(folder)
    assert missing["level"] == "warning"
    assert "sllm-node calibrate" in missing["mend"]
    answer = cli_json("calibrate", *TINY, "--data-dir", folder)
    assert answer["path"] == str(folder / NAME)
    assert sorted(os.listdir(folder)) == sorted([LOCK, NAME])
    profile = read_profile(folder)
    assert profile is not None
    assert profile.device == device_of(folder)
    assert [row.threads for row in profile.reads] == list(THREADS) == [row.threads for row in profile.writes]
    assert [row.writing_threads for row in profile.together] == list(BESIDE_THREADS)
    assert {row.reading_threads for row in profile.together} == {profile.reading_threads} <= set(THREADS)
    assert profile.chunk_bytes == 512 * KIB
    shown = finding(folder, "--set", "reading_threads=9")
    assert shown["level"] == "ok"
    assert f"{profile.reading_threads} reading threads are best, and 9 are set" in shown["found"]
    assert "GB/s" in shown["found"]
    (folder / NAME).write_bytes(b"{")
    assert "is damaged" in finding(folder)["found"]


def test_people_get_tables_and_the_portable_reader_is_measured_as_itself(tmp_path: Path) -> None:
    first = cli("calibrate", "--size", "1MiB", "--seconds", "0.01", "--data-dir", tmp_path, SLLM_NO_NATIVE="1")
    assert first.returncode == 0
    assert "read by portable" in first.stdout
    assert "reading threads that are best: " in first.stdout
    assert first.stdout.count("GB/s") == 2 * len(THREADS) + 2 * len(BESIDE_THREADS)


def test_a_terminal_shows_how_far_it_is_and_how_much_time_is_left(tmp_path: Path) -> None:
    with in_terminal([CLI, "calibrate", *TINY, "--data-dir", tmp_path], 80, 40) as terminal:
        assert terminal.ended() == 0
    assert b" left  " in terminal.raw
    assert "left" not in terminal.text
    assert "reading threads that are best: " in terminal.text


def test_a_folder_that_another_node_holds_is_refused(tmp_path: Path) -> None:
    held = DataFolder.open(tmp_path)
    try:
        error = cli_json("calibrate", *TINY, "--data-dir", tmp_path, status=1)["error"]
        assert error["code"] == "data_folder_in_use"
        assert os.listdir(tmp_path) == [LOCK]
    finally:
        held.close()


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("--size", "many"), 2), (("--seconds", "nan"), 2), (("--size", "900TiB"), 1),
    ],
)  # fmt: skip
def test_what_can_not_be_measured_is_refused(tmp_path: Path, arguments: tuple[str, str], status: int) -> None:
    assert cli("calibrate", "--data-dir", tmp_path, *arguments).returncode == status
    assert set(os.listdir(tmp_path)) <= {LOCK}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_whatever_ends_it_there_is_no_file_and_no_profile(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [CLI, "calibrate", "--size", "8MiB", "--seconds", "60", "--json", "--data-dir", tmp_path],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while not (names := scratch_files(process.pid, tmp_path)):
            assert process.poll() is None, process.communicate()
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert len(names) >= 1
    assert out == ""
    assert os.listdir(tmp_path) == [LOCK]
    if number != signal.SIGKILL:
        assert (process.returncode, err) == (130, "stopped: nothing was stored\n")


def scratch_files(pid: int, folder: Path) -> list[str]:
    """The descriptors of a process that are files of the folder without a name, once loads are being measured."""
    links = []
    for path in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            links.append(os.readlink(path))
        except OSError:
            continue
    begun = any("sllm-host-pool" in link for link in links)
    return [link for link in links if begun and link.startswith(str(folder)) and link.endswith("(deleted)")]


def test_an_interruption_in_the_last_measurement_leaves_nothing_either(tmp_path: Path, leaves_nothing: None) -> None:
    steps: list[int] = []

    def interrupt(label: str, done: int, of: int) -> None:
        steps.append(done)
        if done == STEPS - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(tmp_path, QUICK, SystemClock(), interrupt)
    assert steps == list(range(STEPS))


def test_a_disk_in_memory_is_measured_buffered_and_its_room_given_back(small_disk: Path) -> None:
    before_bytes = free_bytes(small_disk)
    profile = calibrate(small_disk, QUICK, SystemClock())
    assert not profile.direct
    assert profile.device.kind == "tmpfs"
    assert os.listdir(small_disk) == []
    assert free_bytes(small_disk) == before_bytes
    shown = cli("calibrate", "--size", "1MiB", "--seconds", "0.01", "--data-dir", small_disk)
    assert "has no direct reads and writes" in shown.stdout


def test_a_disk_without_room_is_refused_before_the_first_byte(small_disk: Path) -> None:
    error = cli_json("calibrate", "--size", "8MiB", "--data-dir", small_disk, status=1)["error"]
    assert error["code"] == "write_failed"
    assert "16.8 MB free" in error["message"] or "16.7 MB free" in error["message"]
    assert "--size" in error["message"]
    assert os.listdir(small_disk) == [LOCK]


def test_a_disk_that_fills_up_before_the_room_is_taken_is_a_typed_error(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_check_room", lambda *_: None)
    before_bytes = free_bytes(small_disk)
    with pytest.raises(WriteFailed, match="No space left on device"):
        calibrate(small_disk, Options(size_bytes=12 * MIB), SystemClock())
    assert os.listdir(small_disk) == []
    assert free_bytes(small_disk) == before_bytes


def fail(*_: object) -> NoReturn:
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("after", [0, 100])
def test_a_disk_that_fails_while_it_is_written_is_a_typed_error(
    tmp_path: Path, leaves_nothing: None, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    put, calls = Scratch._put, []

    def failing(scratch: Scratch, number: int, block: Any) -> int:
        calls.append(number)
        return put(scratch, number, block) if len(calls) <= after else fail()

    monkeypatch.setattr(Scratch, "_put", failing)
    with pytest.raises(WriteFailed, match="Input/output error"):
        calibrate(tmp_path, QUICK, SystemClock())


def test_a_disk_that_fails_while_it_is_read_is_a_typed_error(
    tmp_path: Path, leaves_nothing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    evict = Scratch.evict

    def cut(scratch: Scratch) -> None:
        evict(scratch)
        os.truncate(scratch.path, scratch.size_bytes // 2)

    monkeypatch.setattr(Scratch, "evict", cut)
    with pytest.raises(CheckpointChanged):
        calibrate(tmp_path, QUICK, SystemClock())


@pytest.mark.parametrize(
    "options",
    [
        QUICK._replace(size_bytes=MIB - 1), QUICK._replace(size_bytes=257 * GIB), QUICK._replace(seconds=0.0),
        QUICK._replace(seconds=61.0), QUICK._replace(seconds=float("nan")),
    ],
)  # fmt: skip
def test_options_out_of_bounds_are_refused(tmp_path: Path, options: Options, leaves_nothing: None) -> None:
    with pytest.raises(ConfigInvalid):
        calibrate(tmp_path, options, SystemClock())


def test_a_pool_that_does_not_fit_into_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "available_bytes", lambda: MIB - 1)
    with pytest.raises(ConfigInvalid, match="of memory"):
        calibrate(tmp_path, QUICK, SystemClock())


def test_a_load_that_takes_too_long_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MAX_LOAD_S", 0.0)
    profile = calibrate(tmp_path, QUICK._replace(seconds=1e-9), SystemClock())
    assert isinstance(profile, DeviceProfile)


@pytest.mark.parametrize("refuses", [False, True])
def test_writers_write_whole_blocks_in_turn_where_o_direct_is_refused_too(
    tmp_path: Path, leaves_nothing: None, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    opens = os.open

    def refusing(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if refuses and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opens(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refusing)
    with Scratch(tmp_path, 256 * KIB, 64 * KIB) as scratch:
        assert not (scratch.direct and refuses)
        scratch.fill()
        with open(scratch.path, "rb") as opened:
            first = opened.read()
        assert len({first[at : at + 4096] for at in range(0, len(first), 4096)}) == 64
        with Writers(scratch, 3) as writers:
            writers.until_begun()
        writers.check()
        assert writers.written_bytes >= 64 * KIB
        assert writers.written_bytes % (64 * KIB) == 0
        with open(scratch.path, "rb") as opened:
            assert opened.read() != first
        assert os.listdir(tmp_path) == []


def test_a_profile_that_was_measured_is_one_that_is_believed(tmp_path: Path) -> None:
    profile = calibrate(tmp_path, QUICK, SystemClock())
    write_profile(tmp_path, profile)
    assert read_profile(tmp_path) == profile
