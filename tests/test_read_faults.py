"""A disk that fails, stutters or changes under a load: right bytes or a typed error, and nothing kept.

The faults are made by `native/tests/fault_shim.cc`, between a child process and its libc.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import folder_of
from compiled import shared_library
from leasing_process import Outcome, Shimmed, digests_of, lease_by_io_uring, lease_in_a_process, map_in_a_process
from loaders import CHUNK, on_disk, opened
from loaders import mover as mover

from sllm_actor.checkpoint.folder import read_folder

pytestmark = pytest.mark.usefixtures("mover")

SIZES = (5 * CHUNK + 123, 3 * CHUNK)
CHUNKS = 6 + 3
# No read is answered by the cache, whatever it holds: then each comes by the way that waits for the device.
UNCACHED = f"nowait:1-:fail={errno.EAGAIN}"
NOT_OFFERED = [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shimmed]:
    process = Shimmed(shared_library(tmp_path_factory.mktemp("shim"), "fault_shim", "tests/fault_shim.cc"))
    yield process
    process.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "model", *SIZES)


@pytest.fixture
def right(folder: Path) -> list[str]:
    """Digests of the files as they are before anything happens to them."""
    return digests_of(on_disk(read_folder(folder)))


def name_of(number: int) -> str:
    return os.strerror(number)


def check_failed(outcome: Outcome, right: list[str], reason: str, file: str = "model-0000") -> None:
    assert outcome.error == "ReadFailed", outcome
    assert file in outcome.message and reason in outcome.message
    # It was the disk's fault and not the loader's: on a disk that is well again the same loader reads it.
    assert (outcome.digests_after, outcome.error_after) == (right, "")


def check_changed(outcome: Outcome) -> None:
    assert (outcome.error, outcome.error_after) == ("CheckpointChanged", "CheckpointChanged"), outcome
    assert "model-0000" in outcome.message


# ---- the shim itself ----


def test_the_shim_sees_every_call_by_which_a_checkpoint_is_read(
    shim: Shimmed, folder: Path, right: list[str], mover: str
) -> None:
    outcome, counts = lease_in_a_process(shim, folder, UNCACHED)
    assert outcome == Outcome(digests=right)
    direct = len(SIZES) if mover == "native" else 0
    assert (counts["open"], counts["open_direct"]) == (len(SIZES), direct)
    assert counts["fstat"] >= 2 * len(SIZES) and counts["read"] >= CHUNKS
    assert (counts["direct"] > 0) == (mover == "native")
    assert counts["effects"] == counts["nowait"]


def test_a_process_without_faults_reads_a_cached_checkpoint_from_the_cache(
    shim: Shimmed, folder: Path, right: list[str]
) -> None:
    outcome, counts = lease_in_a_process(shim, folder)
    assert outcome == Outcome(digests=right)
    assert counts["nowait"] >= CHUNKS and counts["effects"] == 0


# ---- reads that fail ----


@pytest.mark.parametrize("rule", ["read:1:", "read:4:", "read:9:", "read:1-:"])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_read_that_fails_is_reported_with_its_file_and_the_reason(
    shim: Shimmed, folder: Path, right: list[str], rule: str, threads: int
) -> None:
    outcome, counts = lease_in_a_process(shim, folder, UNCACHED, f"{rule}fail={errno.EIO}", threads=threads)
    check_failed(outcome, right, name_of(errno.EIO))
    assert counts["effects"] > counts["nowait"]


def test_a_read_of_the_cache_that_fails_is_reported_too(shim: Shimmed, folder: Path, right: list[str]) -> None:
    outcome, _ = lease_in_a_process(shim, folder, f"nowait:3:fail={errno.EIO}")
    check_failed(outcome, right, name_of(errno.EIO))


def test_of_several_files_the_one_that_failed_is_named(shim: Shimmed, folder: Path, right: list[str]) -> None:
    second = "model-00002-of-00002"
    outcome, _ = lease_in_a_process(shim, folder, UNCACHED, f"read:2:fail={errno.EIO}", files=second, threads=4)
    check_failed(outcome, right, name_of(errno.EIO), file=second)


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("which", [1, 2])
def test_a_file_that_cannot_be_opened_is_a_failed_read(
    shim: Shimmed, folder: Path, right: list[str], number: int, which: int
) -> None:
    outcome, _ = lease_in_a_process(shim, folder, f"open:{which}:fail={number}")
    check_failed(outcome, right, name_of(number), file=f"model-{which:05}")


@pytest.mark.parametrize("which", [1, 2, 4])
def test_a_file_that_cannot_be_examined_is_a_failed_read(
    shim: Shimmed, folder: Path, right: list[str], which: int
) -> None:
    outcome, counts = lease_in_a_process(shim, folder, f"fstat:{which}:fail={errno.EIO}")
    assert counts["effects"] == 1
    check_failed(outcome, right, name_of(errno.EIO))


def test_a_direct_open_that_fails_as_no_refusal_does_is_a_failed_read(
    shim: Shimmed, folder: Path, right: list[str], mover: str
) -> None:
    outcome, counts = lease_in_a_process(shim, folder, f"open_direct:1:fail={errno.EIO}")
    if mover == "portable":  # It never asks for one.
        assert (outcome, counts["open_direct"]) == (Outcome(digests=right), 0)
    else:
        check_failed(outcome, right, name_of(errno.EIO))


@pytest.mark.parametrize("when", ["1", "4", "1-"])
@pytest.mark.parametrize("threads", [1, 4])
async def test_a_read_by_io_uring_that_fails_is_reported_with_its_file_and_the_reason(
    shim: Shimmed, folder: Path, right: list[str], mover: str, when: str, threads: int
) -> None:
    if mover == "portable":
        pytest.skip("the portable mover has no io_uring")
    async with opened() as loader:
        if not loader.facts().io_uring:
            pytest.skip("io_uring is not allowed here")
    sound, counts = lease_by_io_uring(shim, folder, UNCACHED, threads=threads)
    assert sound == Outcome(digests=right)
    assert counts["ring"] >= CHUNKS
    assert counts["direct"] == 0
    rules = (UNCACHED, f"ring:{when}:fail={errno.EIO}")
    outcome, counts = lease_by_io_uring(shim, folder, *rules, threads=threads)
    check_failed(outcome, right, name_of(errno.EIO))
    assert counts["effects"] > counts["nowait"]


# ---- reads that stutter ----


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_short_reads_give_the_right_bytes(
    shim: Shimmed, folder: Path, right: list[str], seed: int, cached: bool
) -> None:
    short = (f"read:1-:short={seed}", f"nowait:1-:short={seed}" if cached else UNCACHED)
    outcome, counts = lease_in_a_process(shim, folder, *short, threads=1 + seed)
    assert outcome == Outcome(digests=right)
    assert counts["read"] > CHUNKS


@pytest.mark.parametrize("call", ["nowait", "read", "open"])
def test_an_interrupted_call_is_made_again(shim: Shimmed, folder: Path, right: list[str], call: str) -> None:
    rules = [f"{call}:{first}-{first + 1}:fail={errno.EINTR}" for first in (1, 5)]
    outcome, counts = lease_in_a_process(shim, folder, *rules, *([UNCACHED] if call == "read" else []))
    assert outcome == Outcome(digests=right)
    assert counts["effects"] >= (2 if call == "open" else 4)


@pytest.mark.parametrize("number", [errno.EAGAIN, *NOT_OFFERED], ids=name_of)
def test_a_filesystem_that_does_not_tell_what_is_cached_is_read_all_the_same(
    shim: Shimmed, folder: Path, right: list[str], number: int
) -> None:
    outcome, counts = lease_in_a_process(shim, folder, f"nowait:1-:fail={number}")
    assert outcome == Outcome(digests=right)
    assert counts["effects"] > 0 and counts["read"] >= CHUNKS


# ---- files that are mapped in place ----


@pytest.mark.parametrize("threads", [1, 2])
def test_a_mapped_page_that_cannot_be_read_is_reported_with_its_file(
    shim: Shimmed, folder: Path, right: list[str], threads: int
) -> None:
    # What the kernel says of a page whose read has failed; its first touch would be SIGBUS.
    outcome, counts = map_in_a_process(shim, folder, f"populate:2:fail={errno.EFAULT}", threads=threads)
    assert counts["effects"] == 1
    check_failed(outcome, right, name_of(errno.EFAULT), file="model-00002-of-00002")


def test_a_mapping_that_finds_no_memory_is_not_called_a_failed_read(
    shim: Shimmed, folder: Path, right: list[str]
) -> None:
    outcome, _ = map_in_a_process(shim, folder, f"populate:1:fail={errno.ENOMEM}")
    assert (outcome.error, outcome.digests_after) == ("ConfigInvalid", right)
    assert "model-00001" in outcome.message and name_of(errno.ENOMEM) in outcome.message


def test_a_file_that_is_cut_while_it_is_mapped_is_refused(shim: Shimmed, folder: Path) -> None:
    outcome, _ = map_in_a_process(shim, folder, "populate:1:truncate=100")
    check_changed(outcome)


@pytest.mark.parametrize("number", [errno.EINTR, errno.EAGAIN, errno.EINVAL], ids=name_of)
def test_a_kernel_that_is_interrupted_or_can_map_no_pages_beforehand_does_no_harm(
    shim: Shimmed, folder: Path, right: list[str], number: int
) -> None:
    outcome, counts = map_in_a_process(shim, folder, f"populate:1:fail={number}")
    assert outcome == Outcome(digests=right)
    assert counts["populate"] == len(SIZES) + (number != errno.EINVAL)


# ---- direct reads that are refused ----


@pytest.mark.parametrize("number", NOT_OFFERED, ids=name_of)
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "dropped"])
def test_a_filesystem_that_opens_nothing_directly_is_read_through_the_cache(
    shim: Shimmed, folder: Path, right: list[str], number: int, cached: bool, mover: str
) -> None:
    refused = f"open_direct:1-:fail={number}"
    outcome, counts = lease_in_a_process(shim, folder, UNCACHED, refused, cached=cached, threads=2)
    assert outcome == Outcome(digests=right)
    assert counts["direct"] == 0 and counts["buffered"] >= CHUNKS
    assert (counts["open_direct"] > 0) == (mover == "native")


@pytest.mark.parametrize(
    ("number", "when"),
    [*((number, "1-") for number in [*NOT_OFFERED, errno.EAGAIN]), (errno.EINVAL, "2-"), (errno.EOPNOTSUPP, "3")],
)
def test_a_filesystem_that_refuses_direct_reads_is_read_through_the_cache(
    shim: Shimmed, folder: Path, right: list[str], number: int, when: str, mover: str
) -> None:
    outcome, counts = lease_in_a_process(shim, folder, UNCACHED, f"direct:{when}:fail={number}")
    assert outcome == Outcome(digests=right)
    assert counts["buffered"] > 0
    assert (counts["effects"] > counts["nowait"]) == (mover == "native")


# ---- files that change while they are read ----


@pytest.mark.parametrize("size_bytes", [0, 2 * CHUNK + 77, SIZES[0] - 1, SIZES[0] + 1])
@pytest.mark.parametrize("when", [1, 6])
def test_a_file_that_changes_its_size_during_the_load_is_refused(
    shim: Shimmed, folder: Path, size_bytes: int, when: int
) -> None:
    change = f"read:{when}:truncate={size_bytes}"
    outcome, counts = lease_in_a_process(shim, folder, UNCACHED, change, files="model-00001")
    assert counts["effects"] == counts["nowait"] + 1
    check_changed(outcome)


def test_a_file_that_ends_early_is_refused(shim: Shimmed, folder: Path, right: list[str]) -> None:
    outcome, _ = lease_in_a_process(shim, folder, UNCACHED, "read:2:end")
    assert (outcome.error, outcome.digests_after) == ("CheckpointChanged", right)
    assert "ended while it was read" in outcome.message


@pytest.mark.parametrize("when", ["read:1", "read:5", "nowait:2", "nowait:6"])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_file_that_is_rewritten_during_the_load_is_refused(
    shim: Shimmed, folder: Path, when: str, threads: int
) -> None:
    rules = [f"{when}:rewrite", *([UNCACHED] if when.startswith("read") else [])]
    outcome, _ = lease_in_a_process(shim, folder, *rules, files="model-00001", threads=threads)
    check_changed(outcome)


@pytest.mark.parametrize("change", ["replace", "unlink"])
@pytest.mark.parametrize("when", ["read:1", "read:6", "nowait:2"])
def test_a_file_that_is_replaced_during_the_load_is_refused_or_was_read_whole_before(
    shim: Shimmed, folder: Path, right: list[str], change: str, when: str
) -> None:
    rules = [f"{when}:{change}", *([UNCACHED] if when.startswith("read") else [])]
    outcome, _ = lease_in_a_process(shim, folder, *rules, files="model-00001")
    if outcome.error:
        check_changed(outcome)
    else:  # What is open stays what it was, whatever its name now leads to.
        assert outcome == Outcome(digests=right)


@pytest.mark.parametrize("change", ["replace", "unlink", "rewrite", "truncate=100"])
def test_a_file_that_is_changed_before_it_is_opened_is_refused(shim: Shimmed, folder: Path, change: str) -> None:
    outcome, _ = lease_in_a_process(shim, folder, f"open:1:{change}", files="model-00002")
    check_changed(outcome)


def test_a_file_that_is_replaced_between_two_of_its_openings_is_refused(
    shim: Shimmed, folder: Path, right: list[str], mover: str
) -> None:
    outcome, counts = lease_in_a_process(shim, folder, "open_direct:1:replace", files="model-00001")
    if mover == "portable":  # It opens a file once.
        assert (outcome, counts["effects"]) == (Outcome(digests=right), 0)
    else:
        check_changed(outcome)
