"""A process of its own that leases a checkpoint while the fault shim makes its disk fail: its child's end, and ours."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import select
import struct
import subprocess
import sys
import traceback
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
from sllm_actor.runtime.forkserver import die_with_parent

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


class Wanted(msgspec.Struct, frozen=True):
    """Ask for one process; `environment` holds what is said to the shim, and which mover it uses."""

    environment: dict[str, str]
    folder: str
    way: str
    threads: int
    answer: str


class Shimmed:
    """A process with the shim before its libc, warm: it forks one for each lease, and what was imported is there."""

    def __init__(self, shim: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LD_PRELOAD": str(shim)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, wanted: Wanted) -> None:
        """Have it done in a fork; what that says of a failure is on our own stderr."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(msgspec.json.encode(wanted) + b"\n")
        self._process.stdin.flush()
        assert select.select([self._process.stdout], [], [], LIMIT_S)[0], "it hangs"
        assert self._process.stdout.readline() == b"0\n", "see its stderr"

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def lease_in_a_process(
    shim: Shimmed, folder: Path, *rules: str, files: str = ".safetensors", cached: bool = True, threads: int = 1
) -> tuple[Outcome, dict[str, int]]:
    """Lease `folder` in a child whose reads of what `files` is in the path of obey `rules`; count its calls too."""
    return _in_a_process(shim, folder, rules, files, "cached" if cached else "dropped", threads)


def lease_by_io_uring(shim: Shimmed, folder: Path, *rules: str, threads: int = 1) -> tuple[Outcome, dict[str, int]]:
    """Lease `folder` in such a child whose direct reads go through io_uring."""
    return _in_a_process(shim, folder, rules, ".safetensors", "io_uring", threads)


def map_in_a_process(shim: Shimmed, folder: Path, *rules: str, threads: int = 1) -> tuple[Outcome, dict[str, int]]:
    """Map the files of `folder` in place in such a child, by so many threads."""
    return _in_a_process(shim, folder, rules, ".safetensors", "mapped", threads)


def _in_a_process(
    shim: Shimmed, folder: Path, rules: Sequence[str], files: str, way: str, threads: int
) -> tuple[Outcome, dict[str, int]]:
    counts, answer = (folder.parent / f"{folder.name}.{what}" for what in ("counts", "answer"))
    for left in (counts, answer):
        left.unlink(missing_ok=True)
    environment = {
        "SLLM_NO_NATIVE": os.environ["SLLM_NO_NATIVE"],
        "SLLM_FAULT_PATH": files,
        "SLLM_FAULT_RULES": " ".join(rules),
        "SLLM_FAULT_COUNTS": str(counts),
        "SLLM_FAULT_DISARMED": "1",
    }
    shim.ask(Wanted(environment, str(folder), way, threads, str(answer)))
    numbers = struct.unpack(f"={len(COUNTED)}Q", counts.read_bytes())
    outcome = msgspec.json.decode(answer.read_bytes(), type=Outcome)
    return outcome, dict(zip(COUNTED, numbers, strict=True))


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


def _become(wanted: Wanted, warm_pid: int) -> None:
    die_with_parent(warm_pid)
    os.environ |= wanted.environment
    ctypes.CDLL(None).fault_shim_set_up()
    found = asyncio.run(_main(Path(wanted.folder), wanted.way, wanted.threads))
    Path(wanted.answer).write_bytes(msgspec.json.encode(found))


def _fork(wanted: Wanted) -> int:
    """Do what is wanted in a fork of this process; gives its exit code, negative for a signal."""
    warm_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            _become(wanted, warm_pid)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    assert len(os.listdir("/proc/self/task")) == 1, "who has a second thread must not fork"
    for line in sys.stdin.buffer:
        print(_fork(msgspec.json.decode(line, type=Wanted)), flush=True)
