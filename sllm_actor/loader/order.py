"""What one caller of a loader wants to be loaded, and the plan of it for the byte mover. Pure, but for one question."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from sllm_actor.checkpoint.folder import Checkpoint, WeightFile
from sllm_actor.errors import InvalidInput
from sllm_actor.loader.host_memory import Key
from sllm_actor.loader.lease import DeviceTarget, LoadReport
from sllm_actor.loader.loads import OnProgress
from sllm_actor.loader.mapping import HostFile, InPlace, cached_bytes
from sllm_actor.loader.mover import FilePlan, LoadPlan, LoadStatus

OnPlaced = Callable[[tuple[HostFile, ...]], None]
"""Called as soon as it is known where the files will lie: an engine may map them while their bytes come."""


class Order(NamedTuple):
    """What one caller wants to be loaded."""

    checkpoint: Checkpoint
    targets: Mapping[str, DeviceTarget]
    priority: int
    verify: bool
    on_placed: OnPlaced | None
    on_progress: OnProgress | None

    @property
    def key(self) -> Key:
        return key_of(self.checkpoint)

    @property
    def checks(self) -> bool:
        return self.verify and self.checkpoint.digest_bytes > 0

    def placed(self, files: tuple[HostFile, ...]) -> None:
        """Tell where the files will lie, if that is wanted."""
        if self.on_placed is not None:
            self.on_placed(files)

    def plan(self, files: tuple[HostFile, ...], window: tuple[int, ...] = (), *, resident: bool = False) -> LoadPlan:
        """Say to the mover what to read into which chunks, what to check, and what to copy."""
        chunks = {file.name: file.chunks for file in files}
        wanted = chunks.keys() | self.targets.keys()
        return LoadPlan(
            files=tuple(
                self._file(file, chunks.get(file.name, ())) for file in self.checkpoint.files if file.name in wanted
            ),
            priority=self.priority,
            resident=resident,
            digest_bytes=self.checkpoint.digest_bytes if self.checks else 0,
            window=window,
        )

    def _file(self, file: WeightFile, chunks: tuple[int, ...]) -> FilePlan:
        target = self.targets.get(file.name)
        return FilePlan(
            path=str(self.checkpoint.file_path(file)),
            size_bytes=file.size_bytes,
            mtime_ns=file.mtime_ns,
            inode=file.inode,
            chunks=chunks,
            digests=file.digests if self.checks else b"",
            target=target.buffer.target if target is not None else None,
            target_offset=target.offset if target is not None else 0,
        )

    def report(self, status: LoadStatus) -> LoadReport:
        """Say where the bytes of a load came from."""
        return LoadReport(
            page_cache_bytes=status.page_cache_bytes,
            ssd_bytes=status.ssd_bytes,
            total_bytes=self.checkpoint.size_bytes,
            duration_s=status.duration_s,
            device_bytes=status.device_bytes,
        )


def key_of(checkpoint: Checkpoint) -> Key:
    """Give the key under which the pool holds a checkpoint."""
    if checkpoint.identity:
        return Key(checkpoint.fingerprint, checkpoint.identity, ())
    return Key(checkpoint.fingerprint, str(checkpoint.path), tuple(file.inode for file in checkpoint.files))


def check_targets(checkpoint: Checkpoint, targets: Mapping[str, DeviceTarget]) -> None:
    """See that files of a checkpoint are to go where there is room for them.

    Raises:
        InvalidInput: there is no target, one names no file, or one is too small.
    """
    if not targets:
        raise InvalidInput(f"{checkpoint.path}: no file is to be loaded")
    sizes = {file.name: file.size_bytes for file in checkpoint.files}
    for name, target in targets.items():
        if name not in sizes:
            raise InvalidInput(f"{checkpoint.path} has no file {name}")
        if not 0 <= target.offset <= target.buffer.size_bytes - sizes[name]:
            raise InvalidInput(
                f"{name} of {sizes[name]} bytes does not fit at {target.offset} of a device buffer of "
                f"{target.buffer.size_bytes}"
            )


def bytes_in_page_cache(checkpoint: Checkpoint) -> int:
    """Return about how much of the checkpoint is in the page cache. Blocks."""
    return sum(cached_bytes(str(checkpoint.file_path(file))) for file in checkpoint.files)


def files_in_place(checkpoint: Checkpoint) -> tuple[HostFile, ...]:
    """Describe the files as they lie in the page cache."""
    return tuple(
        HostFile(file.name, file.size_bytes, (), InPlace(str(checkpoint.file_path(file)), file.mtime_ns, file.inode))
        for file in checkpoint.files
    )
