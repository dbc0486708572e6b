"""The byte mover without the native library: Python threads and preadv. Slower, and the same in every answer.

It reads through the page cache, never directly; its chunks, events and errors are those of the native one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import threading
from collections import deque
from collections.abc import Sequence

from sllm_actor.errors import CheckpointChanged, ConfigInvalid, NoCapacity, ReadFailed, SllmError
from sllm_actor.loader.libc import lock_memory
from sllm_actor.loader.mover import FilePlan, LoadState, LoadStatus, MoverOptions, SlabFacts
from sllm_actor.runtime.clock import Clock

# Absent from this Python's modules: linux/fcntl.h, asm-generic/mman-common.h.
_F_ADD_SEALS, _SEALS = 1033, 0x1 | 0x2 | 0x4
_MADV_POPULATE_WRITE = 23


class _OpenFile:
    """One file of a load, opened at its first chunk and closed after its last."""

    def __init__(self, plan: FilePlan) -> None:
        self.plan = plan
        self._lock = threading.Lock()
        self._fd: int | None = None  # Guarded by _lock.
        self._chunks_left = len(plan.chunks)  # Guarded by _lock.

    def read(self, offset: int, target: memoryview) -> tuple[int, int]:
        """Fill `target` from `offset` on; return the bytes that were cached and those that were not."""
        try:
            fd = self._ensure_open()
            cached = _read_cached(fd, offset, target)
            self._read_rest(fd, offset, target, cached)
            with self._lock:
                self._chunks_left -= 1
                last = self._chunks_left == 0
            if last:
                self._check_unchanged(fd)
                self.close()
        except FileNotFoundError:
            raise CheckpointChanged(f"{self.plan.path} is gone") from None
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
                # O_NONBLOCK: a pipe put in the file's place must not hold a reading thread.
                fd = os.open(self.plan.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                try:
                    self._check_unchanged(fd)
                except BaseException:
                    os.close(fd)
                    raise
                self._fd = fd
            return self._fd

    def _check_unchanged(self, fd: int) -> None:
        found, plan = os.fstat(fd), self.plan
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointChanged(f"{plan.path} is no longer a regular file")
        if found.st_size != plan.size_bytes:
            raise CheckpointChanged(
                f"{plan.path} has {found.st_size} bytes and had {plan.size_bytes} when it was registered"
            )
        if (found.st_ino, found.st_mtime_ns) != (plan.inode, plan.mtime_ns):
            raise CheckpointChanged(f"{plan.path} was replaced or rewritten since it was registered")

    def _read_rest(self, fd: int, offset: int, target: memoryview, done: int) -> None:
        while done < len(target):
            got = os.preadv(fd, [target[done:]], offset + done)
            if got == 0:
                raise CheckpointChanged(f"{self.plan.path} ended while it was read")
            done += got


def _read_cached(fd: int, offset: int, target: memoryview) -> int:
    try:
        return os.preadv(fd, [target], offset, os.RWF_NOWAIT)
    except OSError as wrong:
        if wrong.errno in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            return 0
        raise


class _Load:
    """A cursor over the chunks of a load. Guarded by the mover's lock, but for the files themselves."""

    def __init__(self, files: Sequence[FilePlan], begun_s: float) -> None:
        self.files = [_OpenFile(plan) for plan in files]
        self.items = deque((file, chunk) for file in self.files for chunk in range(len(file.plan.chunks)))
        self.in_flight = 0
        self.stopped = False
        self.state = LoadState.LOADING
        self.page_cache_bytes = 0
        self.ssd_bytes = 0
        self.total_bytes = sum(plan.size_bytes for plan in files)
        self.begun_s = begun_s
        self.ended_s = begun_s
        self.error: SllmError | None = None

    def stop(self) -> None:
        self.stopped = True
        self.items.clear()

    def end(self, now_s: float) -> None:
        for file in self.files:
            file.close()
        complete = self.page_cache_bytes + self.ssd_bytes == self.total_bytes
        stopped = LoadState.DONE if complete else LoadState.CANCELLED
        self.state = LoadState.FAILED if self.error else stopped
        self.ended_s = now_s


class PortableMover:
    """A slab and Python threads. Thread-safe but for `close`, which comes last."""

    def __init__(self, options: MoverOptions, clock: Clock) -> None:
        self._options = options
        self._clock = clock
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

    def start(self, files: Sequence[FilePlan]) -> int:
        load = _Load(files, self._clock.monotonic_s())
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
                duration_s=(load.ended_s if ended else self._clock.monotonic_s()) - load.begun_s,
                error=type(load.error) if load.error else None,
                message=load.error.message if load.error else "",
            )

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
                load = self._runnable.popleft()
                if not load.items:
                    continue
                file, chunk = load.items.popleft()
                load.in_flight += 1
                if load.items:
                    self._runnable.append(load)  # Each load has its turn.
            error, cached, read = None, 0, 0
            try:
                cached, read = self._read_chunk(file, chunk)
            except SllmError as caught:
                error = caught
            with self._changed:
                load.in_flight -= 1
                load.page_cache_bytes += cached
                load.ssd_bytes += read
                if error is not None:
                    load.error = load.error or error
                    load.stop()
                self._end_if_idle(load)
                self._notify()

    def _read_chunk(self, file: _OpenFile, chunk: int) -> tuple[int, int]:
        chunk_bytes = self._options.chunk_bytes
        begin = file.plan.chunks[chunk] * chunk_bytes
        length = min(chunk_bytes, file.plan.size_bytes - chunk * chunk_bytes)
        with self._memory[begin : begin + length] as target:
            return file.read(chunk * chunk_bytes, target)

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
