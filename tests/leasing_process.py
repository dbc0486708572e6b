"""A process of its own that leases a checkpoint while the fault shim makes its disk fail: its child's end, and ours."""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
import subprocess
import sys
from pathlib import Path

import msgspec
import xxhash
from checkpoints import drop_page_cache
from loaders import LIMIT_S, bytes_of, opened

from sllm_actor.checkpoint.folder import Checkpoint, read_folder
from sllm_actor.errors import SllmError
from sllm_actor.loader.loader import Loader

COUNTED = ("open", "open_direct", "fstat", "nowait", "buffered", "direct", "read", "effects")


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
    counts = folder.parent / f"{folder.name}.counts"
    said = subprocess.run(
        [sys.executable, __file__, folder, "cached" if cached else "dropped", str(threads)],
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


async def _main(folder: Path, cached: bool, threads: int) -> Outcome:
    checkpoint = read_folder(folder)
    if not cached:
        drop_page_cache(folder)
    # Of what is loaded into this process; nobody else has that name.
    arm = ctypes.CDLL(None).fault_shim_arm
    # Leaving it checks that no descriptor, thread or mapping is left.
    async with opened(reading_threads=threads, io_uring=False) as loader:
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
    found = asyncio.run(_main(Path(sys.argv[1]), sys.argv[2] == "cached", int(sys.argv[3])))
    sys.stdout.buffer.write(msgspec.json.encode(found))
