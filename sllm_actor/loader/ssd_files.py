"""What the SSD tier does to a file system, each thing in one place. Blocks; knows neither models nor quotas.

A changed name is followed by a sync of the folders that it is in. No file is kept open, and none is opened or removed
through a symbolic link. What the disk refuses is a `WriteFailed` or `ReadFailed` that names the path.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from sllm_actor.errors import DataFolderInUse, ReadFailed, TargetInvalid, WriteFailed

# What O_DIRECT asks of offsets and lengths; 4,096 is enough for every disk of today.
BLOCK_BYTES = 4096
# More is not taken by one call of the kernel.
_MAX_CALL_BYTES = 2**30
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Give the disk's refusals inside the block their type and the path's name.

    Raises:
        WriteFailed: the disk is full, fails, or is read-only.
    """
    try:
        yield
    except OSError as wrong:
        raise WriteFailed(f"{path} can't be written: {wrong.strerror or wrong}") from wrong


def lock_folder(folder: Path, lock_name: str, owned: tuple[str, ...]) -> int:
    """Make `folder`, lock it, and return the descriptor that holds the lock until it is closed.

    The lock's file is also the mark that the `owned` names in the folder are ours to empty: where it is missing, there
    must be nothing of these names, or someone else's files would be removed.

    Raises:
        DataFolderInUse: another living process holds it.
        TargetInvalid: something else is in the folder under one of the names.
        WriteFailed: it can't be made or written.
    """
    with writing(folder):
        os.makedirs(folder, exist_ok=True)
        found = [folder / name for name in owned if os.path.lexists(folder / name)]
        if found and not os.path.lexists(folder / lock_name):
            raise TargetInvalid(f"{found[0]} exists and no SSD tier has made it; choose another folder", param="folder")
        descriptor = os.open(folder / lock_name, os.O_RDWR | os.O_CREAT | _OPEN, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise DataFolderInUse(f"the SSD tier {folder} is held by another living process", param="folder") from None
    return descriptor


def make_folder(path: Path) -> None:
    """Make a folder where there is none.

    Raises:
        TargetInvalid: there is something of that name which is no folder, such as a symbolic link.
        WriteFailed: the disk refused.
    """
    with writing(path):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
        if not is_folder(path):
            raise TargetInvalid(f"{path} is in the way and is not a folder", param="folder")


def is_folder(path: Path) -> bool:
    """Tell whether there is a folder; a link to one is none."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def is_file_of(path: Path, size_bytes: int) -> bool:
    """Tell whether there is a regular file of this size; a link to one is none."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size_bytes


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    with writing(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _OPEN)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_file(path: Path) -> None:
    """Wait until the bytes of a file are on the disk."""
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | _OPEN)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def move(source: Path, target: Path) -> None:
    """Rename in one step, and wait until the disk knows it. A folder that is not empty is never replaced.

    Raises:
        WriteFailed: the disk refused; it is where it was.
    """
    with writing(target):
        os.rename(source, target)
    try:
        sync_folder(target.parent)
        sync_folder(source.parent)
    except WriteFailed:
        with contextlib.suppress(OSError):
            os.rename(target, source)
        raise


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, or a file, or a link; nothing where there is nothing."""
    with writing(path), contextlib.suppress(FileNotFoundError):
        if is_folder(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def write_small(path: Path, raw: bytes) -> None:
    """Write a file whole and wait until its bytes are on the disk; a kill may leave it torn."""
    with writing(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _OPEN, 0o644)
        try:
            put(descriptor, memoryview(raw), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_small(path: Path, raw: bytes) -> None:
    """Write a file so that it is wholly the old or wholly the new one, whatever happens."""
    new = path.with_name(path.name + ".new")
    write_small(new, raw)
    with writing(path):
        os.rename(new, path)
    sync_folder(path.parent)


def mark(path: Path, present: bool) -> None:
    """Make or remove an empty file, and wait until the disk knows it."""
    with writing(path):
        if present:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | _OPEN, 0o644))
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    sync_folder(path.parent)


def stamp(path: Path, wall_s: float) -> None:
    """Set the time of a file; the disk learns of it when it likes."""
    with writing(path):
        at_ns = int(wall_s * 1e6) * 1000
        os.utime(path, ns=(at_ns, at_ns), follow_symlinks=False)


def stamped_s(path: Path) -> float:
    """Return the time of a file, seconds since 1970; 0 where there is none."""
    try:
        return os.lstat(path).st_mtime_ns / 1e9
    except OSError:
        return 0.0


def allocate(path: Path, size_bytes: int) -> None:
    """Make a new file of this size whose room on the disk is taken already."""
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN, 0o644)
        try:
            if size_bytes:
                os.posix_fallocate(descriptor, 0, size_bytes)
        finally:
            os.close(descriptor)


def write_at(path: Path, data: memoryview, offset: int) -> None:
    """Write into a file: past the page cache where offset, memory and file system allow, else through it."""
    aligned_bytes = len(data) // BLOCK_BYTES * BLOCK_BYTES if offset % BLOCK_BYTES == 0 else 0
    with writing(path):
        done = _write_direct(path, data[:aligned_bytes], offset) if aligned_bytes else 0
        if done < len(data):
            descriptor = os.open(path, os.O_WRONLY | _OPEN)
            try:
                put(descriptor, data[done:], offset + done)
            finally:
                os.close(descriptor)


def _write_direct(path: Path, data: memoryview, offset: int) -> int:
    """Return how many bytes the file system has taken directly; a whole number of blocks, perhaps none."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT | _OPEN)
    except OSError as wrong:
        if wrong.errno == errno.EINVAL:
            return 0
        raise
    done = 0
    try:
        while done < len(data):
            written = os.pwrite(descriptor, data[done : done + _MAX_CALL_BYTES], offset + done)
            if written == 0 or written % BLOCK_BYTES:
                break
            done += written
    except OSError as wrong:
        # Memory that is not aligned, as file systems say it.
        if wrong.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
    return done


def put(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data`, however little one call takes.

    Raises:
        OSError: as the kernel says.
    """
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + _MAX_CALL_BYTES], offset + done)


def read_at(path: Path, into: memoryview, offset: int) -> None:
    """Fill `into` from a file: past the page cache where offset, memory and file system allow, else through it.

    Raises:
        ReadFailed: the disk fails, or the file ends before.
    """
    aligned_bytes = len(into) // BLOCK_BYTES * BLOCK_BYTES if offset % BLOCK_BYTES == 0 else 0
    try:
        done = _read_direct(path, into[:aligned_bytes], offset) if aligned_bytes else 0
        if done < len(into):
            descriptor = os.open(path, os.O_RDONLY | _OPEN)
            try:
                got = _take(descriptor, into[done:], offset + done)
            finally:
                os.close(descriptor)
            if got < len(into) - done:
                raise ReadFailed(f"{path} ends at byte {offset + done + got}")
    except OSError as wrong:
        raise ReadFailed(f"{path} can't be read: {wrong.strerror}") from wrong


def _read_direct(path: Path, into: memoryview, offset: int) -> int:
    """Return how many bytes the file system has given directly; perhaps none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | _OPEN)
    except OSError as wrong:
        if wrong.errno == errno.EINVAL:
            return 0
        raise
    try:
        return _take(descriptor, into, offset)
    except OSError as wrong:
        if wrong.errno != errno.EINVAL:
            raise
        return 0
    finally:
        os.close(descriptor)


def _take(descriptor: int, into: memoryview, offset: int) -> int:
    """Read until `into` is full or the file ends; return how many bytes there were."""
    done = 0
    while done < len(into):
        got = os.preadv(descriptor, [into[done : done + _MAX_CALL_BYTES]], offset + done)
        if got == 0:
            break
        done += got
    return done
