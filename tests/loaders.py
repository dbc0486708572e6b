"""A loader on a small pool for tests, with either byte mover, that must leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import mmap
import os
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from checkpoints import folder_of

from sllm_actor.checkpoint.folder import Checkpoint, read_folder
from sllm_actor.loader.lease import HostLease
from sllm_actor.loader.libc import lock_memory
from sllm_actor.loader.loader import Loader
from sllm_actor.loader.mapping import map_files
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.units import KIB

CHUNK = 64 * KIB
LIMIT_S = 60.0


@pytest.fixture(params=["native", "portable"])
def mover(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SLLM_NO_NATIVE", "1" if request.param == "portable" else "")
    return str(request.param)


@pytest.fixture(params=["disk", "tmpfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


def threads() -> int:
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # It may end between being listed and being looked at.
            names.append(path.read_text().strip())
    portable = [thread for thread in threading.enumerate() if thread.name.startswith("sllm-reader")]
    return names.count("sllm-reader") + len(portable)


def descriptors() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir() if path.exists())


def mapped_pools() -> int:
    return Path("/proc/self/maps").read_text().count("sllm-host-pool")


def held() -> tuple[list[str], int, int]:
    """What this process holds: its descriptors, reading threads and mapped pools."""
    return descriptors(), threads(), mapped_pools()


def settled(look: Callable[[], object], wanted: object) -> object:
    """What is seen once it is `wanted`, or at the time limit: the kernel lists a joined thread for a moment yet."""
    deadline_s = time.monotonic() + LIMIT_S
    while (seen := look()) != wanted and time.monotonic() < deadline_s:
        os.sched_yield()
    return seen


@asynccontextmanager
async def opened(chunks: int = 32, **options: Any) -> AsyncIterator[Loader]:
    """A loader, and the promise that it leaves nothing behind."""
    await asyncio.to_thread(gc.collect)  # The loop's own worker thread is not the loader's.
    before = held()
    loader = await Loader.open(pool_bytes=chunks * CHUNK, chunk_bytes=CHUNK, clock=SystemClock(), **options)
    try:
        yield loader
    finally:
        await loader.close()

    def left() -> tuple[list[str], int, int]:
        # What another test still had open may be gone by now.
        files, readers, pools = held()
        return sorted({*files} - {*before[0]}), max(0, readers - before[1]), max(0, pools - before[2])

    assert settled(left, ([], 0, 0)) == ([], 0, 0), f"{before} before, {held()} after"


@contextlib.contextmanager
def kept_in_page_cache(checkpoint: Checkpoint) -> Iterator[None]:
    """Lock the files' pages: a kernel may reclaim a clean page between two lines of a test."""
    with contextlib.ExitStack() as stack:
        for described in checkpoint.files:
            file = stack.enter_context(checkpoint.file_path(described).open("r+b"))
            pages = stack.enter_context(mmap.mmap(file.fileno(), 0))
            assert lock_memory(memoryview(pages)), "the memlock limit is below this test's files"
        yield


def bytes_of(loader: Loader, lease: HostLease) -> list[bytes]:
    with map_files(loader.pool_fd, loader.chunk_bytes, lease.files) as mapped:
        return [bytes(buffer) for buffer in mapped.buffers]


def on_disk(checkpoint: Checkpoint) -> list[bytes]:
    return [checkpoint.file_path(file).read_bytes() for file in checkpoint.files]


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not true():
            await asyncio.sleep(0)


def checkpoint_of(folder: Path, chunks: int = 1, seed: int = 0) -> Checkpoint:
    return read_folder(folder_of(folder, chunks * CHUNK, seed=seed))
