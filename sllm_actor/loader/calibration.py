"""Measure a device: reads and writes against the number of threads, alone and beside each other.

Reads are those of the byte mover itself, whole loads of a scratch file, so that the profile says what a cold load
would get. Every measurement is taken in rounds and the best of each counts: whoever else uses the machine can only
make it look slower. Source of the ideas: WiscSort (VLDB '23): concurrency has a best size, and writes disturb reads.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import NamedTuple

from sllm_actor.errors import ConfigInvalid, WriteFailed
from sllm_actor.loader.choice import use_native
from sllm_actor.loader.device_profile import IN_MEMORY, Alone, DeviceProfile, Together, device_of
from sllm_actor.loader.memory import available_bytes
from sllm_actor.loader.mover import ByteMover, LoadPlan, LoadState, LoadStatus, MoverOptions, SlabFacts
from sllm_actor.loader.native import NativeMover
from sllm_actor.loader.portable import PortableMover
from sllm_actor.loader.scratch import Scratch, Writers
from sllm_actor.runtime.clock import Clock
from sllm_actor.units import GIB, MIB, format_bytes

THREADS = (1, 2, 4, 8, 16)
BESIDE_THREADS = (1, 2, 4)
ROUNDS = 2
STEPS = 1 + ROUNDS * (2 * len(THREADS) + len(BESIDE_THREADS))
# Fewer threads that come so close to the best are preferred: each costs memory traffic and a processor's time.
ENOUGH = 0.95
# A load that takes longer is cut off, so that a slow disk is measured in minutes, too.
MAX_LOAD_S = 20.0
MIN_SIZE_BYTES, MAX_SIZE_BYTES = MIB, 256 * GIB
MAX_SECONDS = 60.0
# A disk that is filled to the last byte fails others.
_USABLE_SHARE = 0.9
_LOOK_S = 1.0

OnStep = Callable[[str, int, int], None]
"""Called with what is measured next, the steps that are done, and all of them."""


class Options(NamedTuple):
    """How to measure. Each of two scratch files has `size_bytes`; each measurement lasts `seconds`, or one load."""

    size_bytes: int = GIB
    seconds: float = 1.0
    chunk_bytes: int = 16 * MIB
    huge_pages: bool = True
    io_uring: bool = True


def calibrate(folder: Path, options: Options, clock: Clock, on_step: OnStep = lambda *_: None) -> DeviceProfile:
    """Measure the device below a folder. Leaves nothing there, whatever ends it. Blocks for `STEPS` measurements.

    Raises:
        ConfigInvalid: an option is out of bounds, there is too little memory, or the native library is missing.
        WriteFailed: too little room, or the disk refused to write.
        ReadFailed: it refused to read.
    """
    chunk_bytes = _chunk_bytes(options)
    size_bytes = options.size_bytes // chunk_bytes * chunk_bytes
    _check_room(folder, size_bytes, max(THREADS) * chunk_bytes)
    device = device_of(folder)
    with Scratch(folder, size_bytes, chunk_bytes) as read_from, Scratch(folder, size_bytes, chunk_bytes) as write_to:
        on_step("filling a scratch file", 0, STEPS)
        read_from.fill()
        bench = _Bench(read_from, write_to, options, clock)
        step = _steps(on_step)
        reads: dict[int, float] = {}
        writes: dict[int, float] = {}
        beside: dict[int, tuple[float, float]] = {}
        for _ in range(ROUNDS):
            for threads in THREADS:
                step(f"{threads} reading")
                reads[threads] = max(bench.read(threads), reads.get(threads, 0.0))
            for threads in THREADS:
                step(f"{threads} writing")
                writes[threads] = max(bench.write(threads), writes.get(threads, 0.0))
        best = best_threads(reads)
        for _ in range(ROUNDS):
            for threads in BESIDE_THREADS:
                step(f"{best} reading beside {threads} writing")
                beside[threads] = max(bench.both(best, threads), beside.get(threads, (0.0, 0.0)))
        on_step("done", STEPS, STEPS)
    return DeviceProfile(
        device=device,
        reader=bench.reader,
        direct=read_from.direct and device.kind not in IN_MEMORY,
        chunk_bytes=chunk_bytes,
        reads=tuple(Alone(threads, rate) for threads, rate in reads.items()),
        writes=tuple(Alone(threads, rate) for threads, rate in writes.items()),
        together=tuple(Together(best, threads, *rates) for threads, rates in beside.items()),
        reading_threads=best,
        measured_at=datetime.fromtimestamp(clock.wall_s(), UTC),
        package_version=installed_version("sllm_actor"),
    )


def best_threads(reads: dict[int, float]) -> int:
    """Choose the fewest threads that read nearly as fast as any number does."""
    enough = ENOUGH * max(reads.values())
    return min(threads for threads, rate in reads.items() if rate >= enough)


class _Bench:
    """Takes one measurement after another on two scratch files."""

    def __init__(self, read_from: Scratch, write_to: Scratch, options: Options, clock: Clock) -> None:
        self._read_from, self._write_to = read_from, write_to
        self._options = options
        self._clock = clock
        self.reader = ""

    def read(self, threads: int) -> float:
        """Return the bytes/s of loads by so many threads."""
        with self._mover(threads) as mover:
            return self._loads(mover, threads)

    def write(self, threads: int) -> float:
        """Return the bytes/s of so many writing threads."""
        begun_s = self._clock.monotonic_s()
        with Writers(self._write_to, threads) as writers:
            writers.until_begun()
            writers.wait(self._options.seconds)
            writers.stop()
            elapsed_s = self._clock.monotonic_s() - begun_s
            writers.check()
            return writers.written_bytes / elapsed_s

    def both(self, reading: int, writing: int) -> tuple[float, float]:
        """Return the bytes/s of loads, and of the threads that write all the while."""
        with self._mover(reading) as mover, Writers(self._write_to, writing) as writers:
            writers.until_begun()
            before_bytes, begun_s = writers.written_bytes, self._clock.monotonic_s()
            read = self._loads(mover, reading)
            written_bytes, elapsed_s = writers.written_bytes - before_bytes, self._clock.monotonic_s() - begun_s
            writers.stop()
            writers.check()
            return read, written_bytes / elapsed_s

    @contextmanager
    def _mover(self, threads: int) -> Iterator[ByteMover]:
        """Make the byte mover that a node would have, with a pool of a chunk for each thread."""
        chosen = self._options
        options = MoverOptions(
            chunk_bytes=self._read_from.block_bytes, chunks=threads, reading_threads=threads, max_loads=1, lock=False,
            huge_pages=chosen.huge_pages, io_uring=chosen.io_uring,
        )  # fmt: skip
        mover: ByteMover = NativeMover(options) if use_native() else PortableMover(options, self._clock)
        try:
            self.reader = _reader(mover.facts)
            yield mover
        finally:
            mover.close()

    def _loads(self, mover: ByteMover, threads: int) -> float:
        """Load the scratch file over and over; count whole loads only, which have their beginning and end in them."""
        plan = LoadPlan(files=(self._read_from.plan(threads),))
        read_bytes, spent_s = 0, 0.0
        while spent_s < self._options.seconds:
            self._read_from.evict()
            status = self._follow(mover, mover.start(plan))
            read_bytes += _arrived(status)
            spent_s += status.duration_s
        return read_bytes / spent_s

    def _follow(self, mover: ByteMover, load_id: int) -> LoadStatus:
        """Wait for a load's end, and hasten it where it takes too long."""
        longest_s, cut = max(MAX_LOAD_S, self._options.seconds), False
        while (status := mover.status(load_id)).state is LoadState.LOADING:
            if status.duration_s > longest_s and _arrived(status) and not cut:
                mover.cancel(load_id)
                cut = True
            elif select.select([mover.event_fd], [], [], _LOOK_S)[0]:
                os.eventfd_read(mover.event_fd)
        mover.forget(load_id)
        if status.error is not None:
            raise status.error(status.message)
        return status


def _arrived(status: LoadStatus) -> int:
    return status.page_cache_bytes + status.ssd_bytes


def _reader(facts: SlabFacts) -> str:
    if not facts.native:
        return "portable"
    return "io_uring" if facts.io_uring else "pread"


def _steps(on_step: OnStep) -> Callable[[str], None]:
    """Count the steps after the first."""
    done = 0

    def step(label: str) -> None:
        nonlocal done
        done += 1
        on_step(label, done, STEPS)

    return step


def _chunk_bytes(options: Options) -> int:
    """Choose chunks as the node's, or smaller, so that the most threads have something to do."""
    if not MIN_SIZE_BYTES <= options.size_bytes <= MAX_SIZE_BYTES:
        bounds = f"{format_bytes(MIN_SIZE_BYTES)} to {format_bytes(MAX_SIZE_BYTES)}"
        raise ConfigInvalid(f"size: {options.size_bytes} bytes are not within {bounds}", param="size")
    if not 0 < options.seconds <= MAX_SECONDS:
        raise ConfigInvalid(f"seconds: {options.seconds} are not within 0 to {MAX_SECONDS:g}", param="seconds")
    share = options.size_bytes // max(THREADS)
    return min(options.chunk_bytes, 1 << (share.bit_length() - 1))


def _check_room(folder: Path, size_bytes: int, pool_bytes: int) -> None:
    try:
        found = os.statvfs(folder)
    except OSError as wrong:
        raise ConfigInvalid(f"data_dir: {folder} can't be examined: {wrong.strerror}", param="data_dir") from None
    free_bytes = found.f_bavail * found.f_frsize
    if 2 * size_bytes > _USABLE_SHARE * free_bytes:
        raise WriteFailed(
            f"{folder} has {format_bytes(free_bytes)} free, too little for two scratch files of "
            f"{format_bytes(size_bytes)} each; choose a smaller --size"
        )
    if pool_bytes > (available := available_bytes()):
        raise ConfigInvalid(
            f"measuring takes {format_bytes(pool_bytes)} of memory and {format_bytes(available)} are free; "
            "choose a smaller --size"
        )
