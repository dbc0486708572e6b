"""The one place where the benchmark meets the loader: what the product's node and engine do, in their order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from sllm_actor.checkpoint.folder import Checkpoint, read_folder
from sllm_actor.checkpoint.layout import is_pad
from sllm_actor.checkpoint.safetensors_header import Header, parse_header
from sllm_actor.engine.mapped_tensors import MappedTensors
from sllm_actor.loader.lease import HostLease
from sllm_actor.loader.loader import Loader
from sllm_actor.loader.mapping import HostFile, MappedFiles, map_files
from sllm_actor.runtime.clock import SystemClock

# Threads that map pages; an engine takes as many as it computes with.
POPULATE = 2


async def open_loader(pool_bytes: int, chunk_bytes: int, huge_pages: bool) -> Loader:
    """Open a loader as a node does."""
    return await Loader.open(
        pool_bytes=pool_bytes,
        clock=SystemClock(),
        chunk_bytes=chunk_bytes,
        reading_threads=4,
        huge_pages=huge_pages,
    )


class Attached:
    """A leased checkpoint that this process has mapped, and its tensors."""

    def __init__(self, lease: HostLease, mapped: MappedFiles, tensors: dict[str, torch.Tensor]) -> None:
        self.lease = lease
        self.tensors = tensors
        self._mapped = mapped

    def close(self) -> None:
        """Give up tensors, mapping and lease."""
        self.tensors.clear()
        self._mapped.close()
        self.lease.release()


async def load(loader: Loader, folder: str, serial: int, in_place: bool, overlap: bool) -> Attached:
    """Bring a checkpoint from its folder to tensors in this process.

    `serial` tells this load from earlier ones, so that none finds its bytes in the pool; `overlap` maps while bytes
    flow.
    """
    checkpoint = read_folder(Path(folder))
    checkpoint = msgspec.structs.replace(checkpoint, fingerprint=f"{checkpoint.fingerprint}-{serial}")
    attaching: list[asyncio.Future[tuple[MappedFiles, dict[str, torch.Tensor]]]] = []
    loop = asyncio.get_running_loop()

    def placed(files: Sequence[HostFile]) -> None:
        attaching.append(loop.run_in_executor(None, _attach, loader, checkpoint, files))

    lease = await loader.lease(checkpoint, in_place=in_place, on_placed=placed if overlap else None)
    if not overlap:
        return Attached(lease, *_attach(loader, checkpoint, lease.files))
    return Attached(lease, *await attaching[-1])


def _attach(
    loader: Loader, checkpoint: Checkpoint, files: Sequence[HostFile]
) -> tuple[MappedFiles, dict[str, torch.Tensor]]:
    mapped = map_files(loader.pool_fd, loader.chunk_bytes, files, populate=POPULATE)
    return mapped, _views(mapped, [file.header for file in checkpoint.files])


def attach(pool_fd: int, chunk_bytes: int, files: Sequence[HostFile]) -> tuple[MappedFiles, dict[str, torch.Tensor]]:
    """Do what an engine does with files in the host pool: map them, parse their headers, look at their tensors."""
    mapped = map_files(pool_fd, chunk_bytes, files, populate=POPULATE)
    parsed = zip(mapped.buffers, files, strict=True)
    return mapped, _views(mapped, [parse_header(data, file.size_bytes, file.name) for data, file in parsed])


def _views(mapped: MappedFiles, headers: Sequence[Header]) -> dict[str, torch.Tensor]:
    return {
        tensor.name: tensors.view(tensor)
        for tensors, header in zip(map(MappedTensors, mapped.buffers), headers, strict=True)
        for tensor in header.tensors
        if not is_pad(tensor.name)
    }


def report_of(lease: HostLease) -> dict[str, int]:
    """Tell by which ways the bytes of a lease came; ways that nothing came by are left out."""
    found = msgspec.structs.asdict(lease.report)
    return {name: count for name, count in found.items() if name.endswith("_bytes") and count and name != "total_bytes"}
