"""A folder of this machine, or of a file system that is mounted here, as a source.

A file is told from a later one of its name by size, time of change and inode, before and after each read. A link may
lead to a file inside the folder, or, as the snapshots of a Hugging Face cache do, from `snapshots/REVISION` into the
`blobs` of the same model; any other link is refused, because a folder that is given to others must give nothing else.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from sllm_actor.domain.sentence_modules import MAX_MODULES_BYTES, MODULES_NAME, is_pooling_name, pooling_name_in
from sllm_actor.errors import (
    ReadFailed,
    SllmError,
    SourceChanged,
    SourceInvalid,
    SourceMissing,
    SourceRefused,
    SourceUnreachable,
)
from sllm_actor.runtime.threads import to_the_end
from sllm_actor.sources.source import MAX_FILES, SourceFile, belongs, belongs_below
from sllm_actor.sources.under_way import UnderWay
from sllm_actor.units import MIB

T = TypeVar("T")
# A read that nobody waits for any more ends after so many bytes.
STEP_BYTES = 4 * MIB
# What a medium says that has lost bytes: to ask it again does not help.
LOST = frozenset({errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ENODATA})
ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR})
FORBIDDEN = frozenset({errno.EACCES, errno.EPERM})


class FolderSource:
    """A checkpoint in a folder. Opens a file for each read, and keeps nothing open between reads.

    Of what lies below the folder, the file that its modules.json names for the pooling is part of it, and nothing else.
    """

    parallel = 4

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self.url = self._path.as_uri()
        self._under_way = UnderWay(self.url)

    async def files(self) -> tuple[SourceFile, ...]:
        """List the regular files of the folder that belong to a checkpoint; see `Source.files`."""
        return await self._under_way.run(_on_thread(lambda _: self._list()))

    async def find(self, name: str) -> SourceFile:
        """Describe one file as `files` does, without a look at the others.

        Raises:
            SourceMissing: it is not there, no regular file, or belongs to no checkpoint.
        """
        return await self._under_way.run(_on_thread(lambda _: self._find(name)))

    async def read(self, file: SourceFile, offset: int, into: memoryview) -> None:
        """Fill `into`; see `Source.read`.

        Raises:
            ReadFailed: the disk has lost these bytes.
        """
        assert offset >= 0 and offset + len(into) <= file.size_bytes, "a range beyond the file"
        await self._under_way.run(_on_thread(partial(self._read, file, offset, into)))

    async def close(self) -> None:
        """End what is being read."""
        await self._under_way.close()

    def _list(self) -> tuple[SourceFile, ...]:
        with _told(self._path):
            folder = self._path.resolve(strict=True)
            found: list[SourceFile] = []
            with os.scandir(folder) as entries:
                for name in (entry.name for entry in entries if belongs(entry.name)):
                    file = _describe(folder, name)
                    if file is not None:
                        found.append(file)
                    if len(found) > MAX_FILES:
                        raise SourceInvalid(f"{folder} has more than {MAX_FILES} files", param="source")
            with suppress(FileNotFoundError, NotADirectoryError):
                pooling = _pooling_name(folder)
                file = _describe(folder, pooling) if pooling is not None else None
                found += [file] if file is not None else []
        if not found:
            raise SourceMissing(f"{folder} has no file of a checkpoint", param="source")
        return tuple(sorted(found, key=lambda file: file.name))

    def _find(self, name: str) -> SourceFile:
        with _told(self._path / name[:200]):
            folder = self._path.resolve(strict=True)
            found = _describe(folder, name) if _is_of(folder, name) else None
        if found is None:
            raise SourceMissing(f"{self._path} has no file {name[:200]!r} of a checkpoint", param="source")
        return found

    def _read(self, file: SourceFile, offset: int, into: memoryview, stop: threading.Event) -> None:
        if not belongs_below(file.name):
            raise _foreign(file.name)
        path = self._path / file.name
        with _told(path):
            folder = self._path.resolve(strict=True)
            if not _is_of(folder, file.name):
                raise _foreign(file.name)
            # Looked at as it was for the list: a link may lead elsewhere by now.
            if _describe(folder, file.name) != file:
                raise SourceChanged(f"{path} is no longer the file that was listed")
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                _compare(path, fd, file)
                filled = 0
                while filled < len(into) and not stop.is_set():
                    count = os.preadv(fd, [into[filled : filled + STEP_BYTES]], offset + filled)
                    if not count:
                        raise SourceChanged(f"{path} ends at byte {offset + filled} of {file.size_bytes}")
                    filled += count
                _compare(path, fd, file)
            finally:
                os.close(fd)


def _foreign(name: str) -> SourceInvalid:
    return SourceInvalid(f"{name[:200]!r} belongs to no checkpoint", param="source")


def _is_of(folder: Path, name: str) -> bool:
    """Tell whether a name is that of a file that the folder gives, be it there or not."""
    return belongs(name) or (is_pooling_name(name) and name == _pooling_name(folder))


def _pooling_name(folder: Path) -> str | None:
    """Give the name that the folder's modules.json has for the pooling's file; None where it has none."""
    path = folder / MODULES_NAME
    try:
        described = _describe(folder, MODULES_NAME)
    except FileNotFoundError:
        return None
    if described is None or described.size_bytes > MAX_MODULES_BYTES:
        return None
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _compare(path, fd, described)
        return pooling_name_in(os.pread(fd, MAX_MODULES_BYTES + 1, 0))
    finally:
        os.close(fd)


def _describe(folder: Path, name: str) -> SourceFile | None:
    """Describe what a name of the folder leads to; None where that is no regular file."""
    path = folder / name
    found = path.lstat()
    # A file below the folder may lie behind a link of its own folder.
    if stat.S_ISLNK(found.st_mode) or path.parent != folder:
        try:
            target = path.resolve(strict=True)
            found = target.lstat()
        except (OSError, RuntimeError) as error:
            raise SourceInvalid(f"{path} is a link that leads nowhere: {error}", param="source") from None
        if not _is_inside(folder, target):
            raise SourceInvalid(f"{path} is a link that leads out of the folder, to {target}", param="source")
    if not stat.S_ISREG(found.st_mode):
        return None
    return SourceFile(name, found.st_size, _validator(found))


def _is_inside(folder: Path, target: Path) -> bool:
    if target.is_relative_to(folder):
        return True
    return folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"


def _validator(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}-{found.st_ino}"


def _compare(path: Path, fd: int, file: SourceFile) -> None:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or _validator(found) != file.validator:
        raise SourceChanged(f"{path} is no longer the file that was listed")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Say what the operating system has refused as a typed error that names the path."""
    try:
        yield
    except SllmError:
        raise
    except (OSError, RuntimeError) as error:
        number = error.errno if isinstance(error, OSError) else errno.ELOOP
        reason = os.strerror(number or errno.EIO)
        if number in ABSENT:
            raise SourceMissing(f"{path}: {reason}", param="source") from None
        if number in FORBIDDEN:
            raise SourceRefused(f"{path} can't be read: {reason}", param="source") from None
        if number in LOST:
            raise ReadFailed(f"{path} can't be read: {reason}") from None
        raise SourceUnreachable(f"{path} can't be read: {reason}") from None


async def _on_thread(work: Callable[[threading.Event], T]) -> T:
    """Run `work` on a thread. Cancelled, tell it to stop, and leave only when it has: it may be writing a buffer."""
    stop = threading.Event()
    running = asyncio.get_running_loop().run_in_executor(None, work, stop)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.set()
        with suppress(Exception):  # Nobody waits for what went wrong any more.
            await to_the_end(running)
        raise
