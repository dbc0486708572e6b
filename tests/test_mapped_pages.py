"""What mapping costs, in page faults and in what is mapped how: counts, which hold on a busy machine, too."""

from __future__ import annotations

import ctypes
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from checkpoints import drop_page_cache, folder_of
from loaders import kept_in_page_cache
from loaders import mover as mover

from sllm_actor.checkpoint.folder import Checkpoint, read_folder
from sllm_actor.loader.libc import huge_page_refusal
from sllm_actor.loader.loader import Loader
from sllm_actor.loader.mapping import HostFile, MappedFiles, map_files
from sllm_actor.loader.order import files_in_place
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.units import KIB, MIB

CHUNK = 2 * MIB
CHUNKS = 16
PAGE = 4 * KIB
# What Python itself may fault in meanwhile.
SOME = 32
# prctl(PR_SET_THP_DISABLE), which a process can't take back for another: so it has one of its own.
WITHOUT_HUGE_PAGES = f"""
import asyncio, ctypes, sys
from pathlib import Path
from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.loader.libc import huge_page_refusal
from sllm_actor.loader.loader import Loader
from sllm_actor.runtime.clock import SystemClock

async def main():
    loader = await Loader.open(pool_bytes={CHUNKS * CHUNK}, chunk_bytes={CHUNK}, clock=SystemClock(), reading_threads=2)
    lease = await loader.lease(read_folder(Path(sys.argv[1])))
    print("refused:", huge_page_refusal(), loader.facts().huge_bytes, sum(file.size_bytes for file in lease.files))
    lease.release()
    await loader.close()

assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0
asyncio.run(main())
"""


# Objects of Python's, more than a few huge pages of them, and a process that may have none.
GATHERED = """
import ctypes, sys
from sllm_actor.loader.libc import gather_heap

def in_huge_pages():
    return int(next(line for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")).split()[1])

if sys.argv[1] == "without":
    assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0
many = [str(number) for number in range(500_000)]
before = in_huge_pages()
print(gather_heap(), (in_huge_pages() - before) // 2048, many == [str(number) for number in range(500_000)])
"""


def gathered(how: str) -> tuple[int, int, str]:
    told = subprocess.run([sys.executable, "-c", GATHERED, how], check=True, capture_output=True, text=True).stdout
    pages, more, same = told.split()
    return int(pages), int(more), same


def test_what_python_keeps_is_gathered_in_huge_pages_and_the_same_where_the_kernel_makes_none() -> None:
    pages, more, same = gathered("with")
    assert same == "True"
    if huge_page_refusal() == "":
        assert pages >= more > 4
    assert gathered("without")[::2] == (0, "True")


def faults_of(work: Callable[[], object]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def touch(mapped: MappedFiles) -> None:
    for buffer in mapped.buffers:
        for at in range(0, len(buffer), PAGE):
            buffer[at]


def smaps(address: int) -> dict[str, int]:
    """The counts, in bytes, of the mapping that an address lies in."""
    found: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and (count := re.match(r"(\w+): +(\d+) kB", line)):
            found[count[1]] = int(count[2]) * KIB
    return found


def address_of(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(buffer))


async def opened(huge_pages: bool) -> Loader:
    return await Loader.open(
        pool_bytes=CHUNKS * CHUNK, chunk_bytes=CHUNK, clock=SystemClock(), reading_threads=2, huge_pages=huge_pages
    )


def checkpoint_in(folder: Path) -> Checkpoint:
    return read_folder(folder_of(folder, CHUNKS * CHUNK))


@pytest.mark.parametrize("way", ["pool", "in place"])
async def test_no_page_is_left_to_fault_for_who_touches_what_was_mapped(tmp_path: Path, way: str, mover: str) -> None:
    checkpoint = checkpoint_in(tmp_path)
    loader = await opened(huge_pages=False)
    try:
        with ExitStack() as stack:
            files: tuple[HostFile, ...]
            if way == "pool":
                files = (await loader.lease(checkpoint)).files
            else:
                stack.enter_context(kept_in_page_cache(checkpoint))
                files = files_in_place(checkpoint)
            found = []
            for populate in (0, 2):
                mapped = stack.enter_context(map_files(loader.pool_fd, CHUNK, files, populate=populate))
                touch(mapped)  # Once for what Python needs, which is not counted: the second mapping is.
                mapped = stack.enter_context(map_files(loader.pool_fd, CHUNK, files, populate=populate))
                found.append(faults_of(lambda mapped=mapped: touch(mapped)))  # type: ignore[misc]
            at_touch, left = found
            assert left < SOME // 4
            assert at_touch >= left + CHUNKS // 2, "without `populate` there is something to fault"
    finally:
        await loader.close()


async def test_a_pool_lies_in_huge_pages_and_is_mapped_by_them_where_the_kernel_puts_some_together(
    tmp_path: Path,
) -> None:
    checkpoint = checkpoint_in(tmp_path)
    loader = await opened(huge_pages=True)
    try:
        # As the kernel does for a page that is put together without a pool.
        assert (loader.facts().huge_bytes == loader.pool_bytes) == (not huge_page_refusal())
        if huge_page_refusal():
            return
        lease = await loader.lease(checkpoint)
        mapped: list[MappedFiles] = []
        assert (
            faults_of(lambda: mapped.append(map_files(loader.pool_fd, CHUNK, lease.files, populate=2))) < CHUNKS + SOME
        )
        found = smaps(address_of(mapped[0].buffers[0]))
        assert found["ShmemPmdMapped"] + found["Shared_Hugetlb"] == CHUNKS * CHUNK
    finally:
        await loader.close()


async def test_what_is_too_short_for_a_huge_page_lies_in_small_ones() -> None:
    loader = await Loader.open(pool_bytes=5 * MIB, chunk_bytes=MIB, clock=SystemClock(), reading_threads=2)
    try:
        facts = loader.facts()
        assert facts.huge_bytes == (0 if huge_page_refusal() else 4 * MIB)
        assert not facts.reserved, "a chunk of 1 MiB is no huge page"
        (pool,) = re.findall(r"^([0-9a-f]+)-.*sllm-host-pool", Path("/proc/self/maps").read_text(), re.MULTILINE)
        assert smaps(int(pool, 16))["Rss"] == loader.pool_bytes, "a page is left to be taken"
    finally:
        await loader.close()


def test_where_the_kernel_makes_no_huge_page_a_pool_has_small_ones(tmp_path: Path) -> None:
    checkpoint_in(tmp_path)
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_HUGE_PAGES, str(tmp_path)], check=False, text=True, capture_output=True
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.split() == ["refused:", "Invalid", "argument", "0", str(CHUNKS * CHUNK)]


async def test_pages_that_a_device_has_written_are_used_before_an_engine_touches_them(tmp_path: Path) -> None:
    # A direct read into registered memory leaves no trace in the page tables, a processor's access does.
    checkpoint = checkpoint_in(tmp_path)
    loader = await opened(huge_pages=False)
    try:
        if not loader.facts().io_uring:
            pytest.skip("io_uring is not allowed here, and pread marks pages as used by itself")
        drop_page_cache(tmp_path)
        (pool,) = re.findall(r"^([0-9a-f]+)-.*sllm-host-pool", Path("/proc/self/maps").read_text(), re.MULTILINE)
        Path("/proc/self/clear_refs").write_text("1")
        assert smaps(int(pool, 16))["Referenced"] == 0
        lease = await loader.lease(checkpoint)
        if lease.report.ssd_bytes < checkpoint.size_bytes:
            pytest.skip("this file system reads through its cache")
        assert smaps(int(pool, 16))["Referenced"] == CHUNKS * CHUNK
    finally:
        await loader.close()
