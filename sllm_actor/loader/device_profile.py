"""What a calibration has found out about the device below a data folder, and the file that it is kept in.

A profile is believed for the device that it was measured on alone: a copied folder, or one that lies on another disk
now, has none. Knows nothing of how to measure.
"""

from __future__ import annotations

import os
import re
from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from sllm_actor.checkpoint.writer import write_bytes
from sllm_actor.errors import ConfigInvalid, WriteFailed

NAME = "disk_profile.json"
FORMAT_VERSION = 1
MAX_FILE_BYTES = 64 * 1024
# File systems in memory take O_DIRECT since Linux 6.6, and there is no device below them all the same.
IN_MEMORY = frozenset({"tmpfs", "ramfs"})
_PARTIAL = f".{NAME}.partial"
_MOUNTS = Path("/proc/self/mountinfo")
_BLOCK_DEVICES = Path("/sys/dev/block")
_SECTOR_BYTES = 512
_MAX_SOURCE = 256

Threads = Annotated[int, Meta(ge=1, le=64)]
Rate = Annotated[float, Meta(gt=0, le=1e15)]
Text = Annotated[str, Meta(max_length=_MAX_SOURCE)]


class DeviceIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What tells a device from others: its file system's id and kind, where it is mounted from, and its size.

    `size_bytes` is 0 where no block device lies below.
    """

    filesystem_id: Annotated[int, Meta(ge=0)]
    kind: Text
    source: Text
    size_bytes: Annotated[int, Meta(ge=0)]


class Alone(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bandwidth of so many threads that have the device to themselves."""

    threads: Threads
    bytes_per_s: Rate


class Together(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bandwidths of reading and writing threads beside each other."""

    reading_threads: Threads
    writing_threads: Threads
    read_bytes_per_s: Rate
    write_bytes_per_s: Annotated[float, Meta(ge=0, le=1e15)]

    @property
    def write_share(self) -> float:
        """How much of all that was moved the writes were."""
        return self.write_bytes_per_s / (self.read_bytes_per_s + self.write_bytes_per_s)


Rows = Annotated[tuple[Alone, ...], Meta(min_length=1, max_length=64)]


class DeviceProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a device gives, in chunks of `chunk_bytes`, and the number of threads that reads it best.

    `reader` is the one that was measured: io_uring, pread or portable; `direct`: there is a way past the page cache.
    """

    version: int = FORMAT_VERSION
    device: DeviceIdentity
    reader: Text
    direct: bool
    chunk_bytes: Annotated[int, Meta(ge=1)]
    reads: Rows
    writes: Rows
    together: Annotated[tuple[Together, ...], Meta(max_length=64)]
    reading_threads: Threads
    measured_at: Annotated[datetime, Meta(tz=True)]
    package_version: Text

    @property
    def read_bytes_per_s(self) -> float:
        """The best bandwidth of reads alone."""
        return max(row.bytes_per_s for row in self.reads)

    @property
    def write_bytes_per_s(self) -> float:
        """The best bandwidth of writes alone."""
        return max(row.bytes_per_s for row in self.writes)

    def age_s(self, wall_s: float) -> float:
        """Return the seconds since it was measured, by a clock that may have been set back meanwhile."""
        return max(0.0, wall_s - self.measured_at.timestamp())


class _Versioned(msgspec.Struct):
    version: int


def read_profile(folder: Path) -> DeviceProfile | None:
    """Read the profile of a data folder; None where nobody has made one. Blocks.

    Raises:
        ConfigInvalid: it can't be read, is damaged or of another version, or was measured on another device.
    """
    profile = profile_in(folder / NAME)
    if profile is not None and profile.device != (device := device_of(folder)):
        raise ConfigInvalid(
            f"{folder / NAME} was measured on another device: {profile.device.source}, not {device.source}"
        )
    return profile


def profile_in(path: Path) -> DeviceProfile | None:
    """Read the profile in a file, of whichever device; None where there is no file. Blocks.

    Raises:
        ConfigInvalid: it can't be read, is damaged or of another version.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as wrong:
        raise ConfigInvalid(f"{path} can't be read: {wrong.strerror}") from None
    try:
        raw = os.read(fd, MAX_FILE_BYTES + 1)
    except OSError as wrong:
        raise ConfigInvalid(f"{path} can't be read: {wrong.strerror}") from None
    finally:
        os.close(fd)
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigInvalid(f"{path} is longer than {MAX_FILE_BYTES} bytes")
    return _decode(path, raw)


def _decode(path: Path, raw: bytes) -> DeviceProfile:
    try:
        version = msgspec.json.decode(raw, type=_Versioned).version
        if version != FORMAT_VERSION:
            raise ConfigInvalid(f"{path} is of format {version}, and this package reads {FORMAT_VERSION}")
        return msgspec.json.decode(raw, type=DeviceProfile)
    except (msgspec.DecodeError, RecursionError) as wrong:
        raise ConfigInvalid(f"{path} is damaged: {wrong}") from None


def write_profile(folder: Path, profile: DeviceProfile) -> Path:
    """Store the profile of a data folder in place of what is there, whole or not at all; give its path. Blocks.

    Raises:
        WriteFailed: the disk refused; what was there before is as it was.
    """
    path, partial = folder / NAME, folder / _PARTIAL
    raw = msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n"
    try:
        partial.unlink(missing_ok=True)  # What a killed process has left.
        try:
            write_bytes(partial, raw)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as wrong:
        raise WriteFailed(f"{path} can't be written: {wrong.strerror}") from None
    return path


def device_of(folder: Path) -> DeviceIdentity:
    """Tell which device a folder lies on. Blocks.

    Raises:
        ConfigInvalid: the folder can't be examined.
    """
    try:
        number, filesystem_id = os.stat(folder).st_dev, os.statvfs(folder).f_fsid
        kind, source = _mount_of(folder)
    except OSError as wrong:
        raise ConfigInvalid(f"data_dir: {folder} can't be examined: {wrong.strerror}", param="data_dir") from None
    try:
        size_bytes = int((_BLOCK_DEVICES / f"{os.major(number)}:{os.minor(number)}/size").read_text()) * _SECTOR_BYTES
    except (OSError, ValueError):
        size_bytes = 0
    return DeviceIdentity(filesystem_id, kind[:_MAX_SOURCE], source[:_MAX_SOURCE], size_bytes)


def _mount_of(folder: Path) -> tuple[str, str]:
    """Give the kind of the file system that holds the folder, and what is mounted there."""
    wanted, best, found = os.path.realpath(folder), "", ("", "")
    for line in os.fsdecode(_MOUNTS.read_bytes()).splitlines():
        about, _, below = line.partition(" - ")
        # The fifth field is where; the last of those at one place lies on top.
        where = _unescaped(about.split(" ")[4])
        if (wanted == where or wanted.startswith(where.rstrip("/") + "/")) and len(where) >= len(best):
            kind, source, *_ = below.split(" ")
            best, found = where, (_printable(kind), _printable(_unescaped(source)))
    return found


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda escaped: chr(int(escaped[1], 8)), text)


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
