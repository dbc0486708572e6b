"""A process of its own that leases a checkpoint while the fault shim makes its disk fail: its child's end, and ours."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import xxhash
from checkpoints import drop_page_cache
from loaders import CHUNK, LIMIT_S, bytes_of, opened

from sllm_actor.checkpoint.folder import Checkpoint, read_folder
from sllm_actor.errors import SllmError
from sllm_actor.loader.loader import Loader
from sllm_actor.loader.mapping import map_files
from sllm_actor.loader.order import files_in_place

COUNTED = ("open", "open_direct", "fstat", "nowait", "buffered", "direct", "ring", "read", "populate", "effects")


class Outcome(msgspec.Struct, frozen=True):
    """What came of a lease: the digests of its files, or an error; and of a second one, on a disk that is sound."""

    digests: list[str] = []
    error: str = ""
    message: str = ""
    digests_after: list[str] = []
    error_after: str = ""


def digests_of(files: list[bytes]) -> list[str]:
    return [xxhash.xxh3_128_hexdigest(raw) for raw in files]


def lease_in_a_process(
    shim: Path, folder: Path, *rules: str, files: str = ".safetensors", cached: bool = True, threads: int = 1
) -> tuple[Outcome, dict[str, int]]:
    """Lease `folder` in a child whose reads of what `files` is in the path of obey `rules`; count its calls too."""
    return _in_a_process(shim, folder, rules, files, "cached" if cached else "dropped", threads)


def lease_by_io_uring(shim: Path, folder: Path, *rules: str, threads: int = 1) -> tuple[Outcome, dict[str, int]]:
    """Lease `folder` in such a child whose direct reads go through io_uring."""
    return _in_a_process(shim, folder, rules, ".safetensors", "io_uring", threads)


def map_in_a_process(shim: Path, folder: Path, *rules: str, threads: int = 1) -> tuple[Outcome, dict[str, int]]:
    """Map the files of `folder` in place in such a child, by so many threads."""
    return _in_a_process(shim, folder, rules, ".safetensors", "mapped", threads)


def _in_a_process(
    shim: Path, folder: Path, rules: Sequence[str], files: str, way: str, threads: int
) -> tuple[Outcome, dict[str, int]]:
    counts = folder.parent / f"{folder.name}.counts"
    counts.unlink(missing_ok=True)
    said = subprocess.run(
        [sys.executable, __file__, folder, way, str(threads)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "LD_PRELOAD": str(shim),
            "SLLM_FAULT_PATH": files,
            "SLLM_FAULT_RULES": " ".join(rules),
            "SLLM_FAULT_COUNTS": str(counts),
            "SLLM_FAULT_DISARMED": "1",
        },
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert said.returncode == 0, said.stderr.decode()
    numbers = struct.unpack(f"={len(COUNTED)}Q", counts.read_bytes())
    return msgspec.json.decode(said.stdout, type=Outcome), dict(zip(COUNTED, numbers, strict=True))


async def _lease(loader: Loader, checkpoint: Checkpoint) -> tuple[list[str], str, str]:
    try:
        lease = await loader.lease(checkpoint)
    except SllmError as wrong:
        assert loader.free_bytes == loader.pool_bytes and not loader.residents(), "a failed load keeps chunks"
        return [], type(wrong).__name__, wrong.message
    digests = digests_of(bytes_of(loader, lease))
    lease.release()
    return digests, "", ""


def _map(checkpoint: Checkpoint, threads: int) -> tuple[list[str], str, str]:
    pool_fd = os.memfd_create("no pool")
    try:
        with map_files(pool_fd, CHUNK, files_in_place(checkpoint), populate=threads) as mapped:
            return digests_of([bytes(buffer) for buffer in mapped.buffers]), "", ""
    except SllmError as wrong:
        return [], type(wrong).__name__, wrong.message
    finally:
        os.close(pool_fd)


async def _main(folder: Path, way: str, threads: int) -> Outcome:
    checkpoint = read_folder(folder)
    if way == "dropped":
        drop_page_cache(folder)
    # Of what is loaded into this process; nobody else has that name.
    arm = ctypes.CDLL(None).fault_shim_arm
    if way == "mapped":
        arm(1)
        digests, error, message = _map(checkpoint, threads)
        arm(0)
        gc.collect()
        assert f"{checkpoint.path}/" not in Path("/proc/self/maps").read_text(), "a mapping is left"
        after = _map(checkpoint, threads) if error else ([], "", "")
        return Outcome(digests, error, message, *after[:2])
    # Leaving it checks that no descriptor, thread or mapping is left.
    async with opened(reading_threads=threads, io_uring=way == "io_uring") as loader:
        arm(1)
        try:
            digests, error, message = await _lease(loader, checkpoint)
        finally:
            arm(0)
        if not error:
            return Outcome(digests=digests)
        digests_after, error_after, _ = await _lease(loader, checkpoint)
    return Outcome(error=error, message=message, digests_after=digests_after, error_after=error_after)


if __name__ == "__main__":
    found = asyncio.run(_main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
    sys.stdout.buffer.write(msgspec.json.encode(found))
