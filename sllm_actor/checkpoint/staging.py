"""Make a folder appear whole or not at all: written beside its place, synced, then renamed into it.

Knows no checkpoints. The folder is written as `.NAME.sllm-partial` next to NAME and held by a lock (flock) that the
kernel drops with the process, so that what a killed one has left is told from what a living one writes. A target
that exists is exchanged with the new folder in one step (renameat2, RENAME_EXCHANGE): at every moment it is wholly the
old or wholly the new one. Where the file system can't exchange (NFS, some FUSE), the old one steps aside as
`.NAME.sllm-replaced` first; a process killed between the two renames leaves no target, and the next one puts it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from sllm_actor.errors import TargetBusy, TargetExists, TargetInvalid, WriteFailed

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)
_MAX_ATTEMPTS = 16
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def staged(target: Path, *, replace: bool, check_old: Callable[[Path], None]) -> Iterator[Path]:
    """Give an empty folder to write into, which becomes `target` if the block ends without an error.

    Files in it must be synced by whoever writes them. `check_old` refuses, by raising, a folder that may not be
    replaced; it is asked before the block and again before the exchange.

    Raises:
        TargetExists: there is something at `target`, and `replace` is false or it is no folder.
        TargetBusy: another process is writing the same target.
        TargetInvalid: the folder that is to hold it does not exist, or its name is impossible.
        WriteFailed: the disk refused something.
    """
    stage = target.with_name(f".{target.name}.sllm-partial")
    with contextlib.ExitStack() as stack:
        with _written(target):
            descriptor = stack.enter_context(_held(stage))
            _put_back(target)
            _check(target, replace, check_old)
        try:
            yield stage
            with _written(target):
                os.fsync(descriptor)
                _check(target, replace, check_old)
                _publish(stage, target)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise


@contextlib.contextmanager
def _written(target: Path) -> Iterator[None]:
    """Give the disk's refusals their type; what is raised inside the caller's block keeps its own."""
    try:
        yield
    except OSError as wrong:
        raise WriteFailed(f"{target} can't be written: {wrong.strerror or wrong}") from wrong


def _check(target: Path, replace: bool, check_old: Callable[[Path], None]) -> None:
    if not os.path.lexists(target):
        return
    if not replace:
        raise TargetExists(f"{target} exists; it is replaced only when that is asked for (--replace)", param="target")
    if target.is_symlink() or not target.is_dir():
        raise TargetExists(f"{target} is not a folder and is not replaced", param="target")
    check_old(target)


@contextlib.contextmanager
def _held(stage: Path) -> Iterator[int]:
    """Own the staging folder, emptied of what a killed process has left in it."""
    descriptor = _take(stage)
    try:
        for entry in list(os.scandir(stage)):
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
        try:
            yield descriptor
        finally:
            # Also where something was refused before a byte was written.
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(stage, follow_symlinks=False), os.fstat(descriptor)):
                    os.rmdir(stage)
    finally:
        os.close(descriptor)


def _take(stage: Path) -> int:
    """Make or find the folder and lock it; whoever held it may rename it away meanwhile, so look again."""
    for _ in range(_MAX_ATTEMPTS):
        try:
            os.mkdir(stage)
        except FileNotFoundError:
            raise TargetInvalid(f"{stage.parent} does not exist", param="target") from None
        except FileExistsError:
            pass
        try:
            descriptor = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except NotADirectoryError:
            raise TargetInvalid(f"{stage} is in the way and is not a folder", param="target") from None
        if _lock(descriptor, stage):
            return descriptor
    raise _busy(stage)


def _lock(descriptor: int, stage: Path) -> bool:
    """Lock the folder; False if the path now leads to another one."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(stage, follow_symlinks=False), os.fstat(descriptor)):
            return True
    except BlockingIOError:
        os.close(descriptor)
        raise _busy(stage) from None
    except FileNotFoundError:
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return False


def _busy(stage: Path) -> TargetBusy:
    return TargetBusy(f"another process is writing {stage}", param="target")


def _retired(target: Path) -> Path:
    return target.with_name(f".{target.name}.sllm-replaced")


def _put_back(target: Path) -> None:
    """Undo what a process killed between the two renames of the fallback has left."""
    retired = _retired(target)
    if retired.is_symlink() or not retired.is_dir():
        return
    if os.path.lexists(target):
        shutil.rmtree(retired)
    else:
        os.rename(retired, target)
        _sync(target.parent)


def _publish(stage: Path, target: Path) -> None:
    if not os.path.lexists(target):
        _appear(stage, target)
        _sync(target.parent)
        return
    # The lock keeps the old folder, from the exchange on under the staging name, out of others' hands.
    descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        old = stage
        if not _rename(stage, target, RENAME_EXCHANGE):
            old = _retired(target)
            os.rename(target, old)
            try:
                os.rename(stage, target)
            except BaseException:
                os.rename(old, target)
                raise
        _sync(target.parent)
        # The new folder stands; what can't be removed now is removed by the next conversion.
        shutil.rmtree(old, ignore_errors=True)
    finally:
        os.close(descriptor)


def _appear(stage: Path, target: Path) -> None:
    try:
        if not _rename(stage, target, RENAME_NOREPLACE):
            os.rename(stage, target)
    except OSError as wrong:
        if wrong.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise TargetExists(f"{target} has appeared meanwhile", param="target") from None
        raise


def _rename(source: Path, target: Path, flags: int) -> bool:
    """Rename by renameat2; False where the kernel, libc or file system does not know the flag."""
    call = getattr(_libc, "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(target))


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
