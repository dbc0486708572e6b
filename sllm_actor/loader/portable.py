"""The byte mover without the native library: Python threads and preadv. Slower, and the same in every answer.

It reads through the page cache, never directly; its chunks, events and errors are those of the native one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import threading
from collections import deque

from sllm_actor.checkpoint.digests import DIGEST_BYTES, digest
from sllm_actor.errors import CheckpointChanged, CheckpointCorrupt, ConfigInvalid, NoCapacity, ReadFailed, SllmError
from sllm_actor.loader.described import check_unchanged, open_described
from sllm_actor.loader.device import Device
from sllm_actor.loader.libc import lock_memory
from sllm_actor.loader.meter import Meter
from sllm_actor.loader.mover import FilePlan, LoadPlan, LoadState, LoadStatus, MoverOptions, PathFacts, Paths, SlabFacts
from sllm_actor.runtime.clock import Clock

# Absent from this Python's modules: linux/fcntl.h, asm-generic/mman-common.h.
_F_ADD_SEALS, _SEALS = 1033, 0x1 | 0x2 | 0x4
_MADV_POPULATE_WRITE = 23
_NO_DEVICES = "devices need the native library, and SLLM_NO_NATIVE does without it"


class _Meters:
    def __init__(self, clock: Clock) -> None:
        self.cached = Meter(clock)
        self.storage = Meter(clock)


class _OpenFile:
    """One file of a load, opened at its first chunk and closed after its last."""

    def __init__(self, plan: FilePlan, meters: _Meters) -> None:
        self.plan = plan
        self._meters = meters
        self._lock = threading.Lock()
        self._fd: int | None = None  # Guarded by _lock.
        self._chunks_left = len(plan.chunks)  # Guarded by _lock.

    def read(self, offset: int, target: memoryview) -> tuple[int, int]:
        """Fill `target` from `offset` on; return the bytes that were cached and those that were not."""
        try:
            fd = self._ensure_open()
            cached = self._metered_cached(fd, offset, target)
            self._read_rest(fd, offset, target, cached)
            with self._lock:
                self._chunks_left -= 1
                last = self._chunks_left == 0
            if last:
                check_unchanged(fd, self.plan.path, self.plan.size_bytes, self.plan.mtime_ns, self.plan.inode)
                self.close()
        except OSError as wrong:
            raise ReadFailed(f"{self.plan.path} can't be read: {wrong.strerror}") from None
        return cached, len(target) - cached

    def close(self) -> None:
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
            self._fd = None

    def _ensure_open(self) -> int:
        with self._lock:
            if self._fd is None:
                plan = self.plan
                self._fd = open_described(plan.path, plan.size_bytes, plan.mtime_ns, plan.inode)
            return self._fd

    def _metered_cached(self, fd: int, offset: int, target: memoryview) -> int:
        got = 0
        self._meters.cached.begin()
        try:
            got = _read_cached(fd, offset, target)
        finally:
            self._meters.cached.end(got)
        return got

    def _read_rest(self, fd: int, offset: int, target: memoryview, done: int) -> None:
        if done == len(target):
            return
        cached = done
        self._meters.storage.begin()
        try:
            while done < len(target):
                got = os.preadv(fd, [target[done:]], offset + done)
                if got == 0:
                    raise CheckpointChanged(f"{self.plan.path} ended while it was read")
                done += got
        finally:
            self._meters.storage.end(done - cached)

    def check_digests(self, offset: int, data: memoryview, digest_bytes: int) -> None:
        """Compare what was read with the digests of the plan."""
        for at in range(0, len(data), digest_bytes):
            number = (offset + at) // digest_bytes
            expected = self.plan.digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
            found = digest(data[at : at + digest_bytes])
            if found != expected:
                raise CheckpointCorrupt(
                    f"{self.plan.path}: chunk {number} has the digest {found.hex()} and should have {expected.hex()}"
                )


def _read_cached(fd: int, offset: int, target: memoryview) -> int:
    try:
        return os.preadv(fd, [target], offset, os.RWF_NOWAIT)
    except OSError as wrong:
        if wrong.errno in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            return 0
        raise


class _Load:
    """A cursor over the chunks of a load. Guarded by the mover's lock, but for the files themselves."""

    def __init__(self, plan: LoadPlan, meters: _Meters, begun_s: float) -> None:
        self.plan = plan
        self.priority = plan.priority
        self.files = [_OpenFile(file, meters) for file in plan.files]
        self.items = deque((file, chunk) for file in self.files for chunk in range(len(file.plan.chunks)))
        self.in_flight = 0
        self.stopped = False
        self.state = LoadState.LOADING
        self.page_cache_bytes = 0
        self.ssd_bytes = 0
        self.complete_bytes = 0
        self.total_bytes = sum(file.size_bytes for file in plan.files)
        self.begun_s = begun_s
        self.ended_s = begun_s
        self.error: SllmError | None = None

    def stop(self) -> None:
        self.stopped = True
        self.items.clear()

    def end(self, now_s: float) -> None:
        for file in self.files:
            file.close()
        complete = self.complete_bytes == self.total_bytes
        stopped = LoadState.DONE if complete else LoadState.CANCELLED
        self.state = LoadState.FAILED if self.error else stopped
        self.ended_s = now_s


class PortableMover:
    """A slab and Python threads. Thread-safe but for `close`, which comes last."""

    def __init__(self, options: MoverOptions, clock: Clock) -> None:
        self._options = options
        self._clock = clock
        self._meters = _Meters(clock)
        self._changed = threading.Condition()
        self._loads: dict[int, _Load] = {}  # Guarded by _changed, as are the next three.
        self._runnable: deque[_Load] = deque()
        self._next_id = 1
        self._stopping = False
        self.pool_fd, self._slab = _slab(options.chunk_bytes * options.chunks)
        self._memory = memoryview(self._slab)
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        locked = options.lock and lock_memory(self._memory)
        self.facts = SlabFacts(native=False, locked=locked, huge_bytes=0)
        self._threads = [
            threading.Thread(target=self._work, name=f"sllm-reader-{k}", daemon=True)
            for k in range(options.reading_threads)
        ]
        for thread in self._threads:
            thread.start()

    def register(self, device: Device) -> None:
        raise ConfigInvalid(_NO_DEVICES)

    def start(self, plan: LoadPlan) -> int:
        if plan.window or any(file.target is not None for file in plan.files):
            raise ConfigInvalid(_NO_DEVICES)
        if plan.digest_bytes and self._options.chunk_bytes % plan.digest_bytes:
            raise ConfigInvalid(
                f"a digest of {plan.digest_bytes} bytes does not divide a chunk of {self._options.chunk_bytes}"
            )
        load = _Load(plan, self._meters, self._clock.monotonic_s())
        with self._changed:
            if len(self._loads) >= self._options.max_loads:
                raise NoCapacity("too many loads at once")
            load_id = self._next_id
            self._next_id += 1
            self._loads[load_id] = load
            self._runnable.append(load)
            self._changed.notify_all()
        return load_id

    def status(self, load_id: int) -> LoadStatus:
        with self._changed:
            load = self._loads[load_id]
            ended = load.state is not LoadState.LOADING
            return LoadStatus(
                state=load.state,
                page_cache_bytes=load.page_cache_bytes,
                ssd_bytes=load.ssd_bytes,
                device_bytes=0,
                duration_s=(load.ended_s if ended else self._clock.monotonic_s()) - load.begun_s,
                error=type(load.error) if load.error else None,
                message=load.error.message if load.error else "",
            )

    def set_priority(self, load_id: int, priority: int) -> None:
        with self._changed:
            self._loads[load_id].priority = priority

    def drop_targets(self, load_id: int) -> None:
        raise AssertionError("it has none")

    def paths(self) -> Paths:
        return Paths(page_cache=self._meters.cached.facts(), ssd=self._meters.storage.facts(), device=PathFacts(0, 0.0))

    def cancel(self, load_id: int) -> None:
        with self._changed:
            load = self._loads[load_id]
            if load.state is LoadState.LOADING:
                load.stop()
                self._end_if_idle(load)

    def forget(self, load_id: int) -> None:
        with self._changed:
            ended = self._loads.pop(load_id)
            assert ended.state is not LoadState.LOADING, "a load that has not ended can't be forgotten"

    def close(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for load in self._loads.values():
            load.end(self._clock.monotonic_s())
        self._memory.release()
        self._slab.close()
        os.close(self.pool_fd)
        os.close(self.event_fd)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._runnable)
                if self._stopping:
                    return
                # The one of the highest priority that has waited longest.
                load = max(self._runnable, key=lambda waiting: waiting.priority)
                self._runnable.remove(load)
                if not load.items:
                    continue
                file, chunk = load.items.popleft()
                load.in_flight += 1
                if load.items:
                    self._runnable.append(load)  # Each load has its turn.
            error, cached, read = None, 0, 0
            try:
                cached, read = self._read_chunk(load.plan, file, chunk)
            except SllmError as caught:
                error = caught
            except Exception as caught:  # A bug, or no memory: the load fails, the thread goes on.
                error = SllmError(f"{file.plan.path}: {type(caught).__name__}: {caught}")
            with self._changed:
                load.in_flight -= 1
                load.page_cache_bytes += cached
                load.ssd_bytes += read
                if error is None:
                    load.complete_bytes += self._length(file, chunk)
                else:
                    load.error = load.error or error
                    load.stop()
                self._end_if_idle(load)
                self._notify()

    def _length(self, file: _OpenFile, chunk: int) -> int:
        return min(self._options.chunk_bytes, file.plan.size_bytes - chunk * self._options.chunk_bytes)

    def _read_chunk(self, plan: LoadPlan, file: _OpenFile, chunk: int) -> tuple[int, int]:
        chunk_bytes = self._options.chunk_bytes
        begin, offset = file.plan.chunks[chunk] * chunk_bytes, chunk * chunk_bytes
        with self._memory[begin : begin + self._length(file, chunk)] as target:
            read = (0, 0) if plan.resident else file.read(offset, target)
            if file.plan.digests:
                file.check_digests(offset, target, plan.digest_bytes)
            return read

    def _end_if_idle(self, load: _Load) -> None:
        if load.in_flight == 0 and not load.items:
            load.end(self._clock.monotonic_s())
            self._notify()

    def _notify(self) -> None:
        # Refused only when the counter is full, and then the event is readable anyway.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self.event_fd, 1)


def _slab(size_bytes: int) -> tuple[int, mmap.mmap]:
    fd = os.memfd_create("sllm-host-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # Allocates every page: the faults that remain are cheap ones.
        os.posix_fallocate(fd, 0, size_bytes)
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
        slab = mmap.mmap(fd, size_bytes)
    except OSError as wrong:
        os.close(fd)
        raise ConfigInvalid(f"host pool: {size_bytes} bytes cannot be had: {wrong.strerror}") from None
    with contextlib.suppress(OSError):
        slab.madvise(_MADV_POPULATE_WRITE)
    return fd, slab
