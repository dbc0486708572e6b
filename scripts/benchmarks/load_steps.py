"""The paper's steps from a plain loader to ours, one by one, as a command of `load_ours engine`.

Each is the one before with one thing changed. The last two, a pool that is faulted in beforehand and mapping while
bytes flow, are the product's own, with overlap off and on: `load_ours`.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.actors_process import Commands
from benchmarks.load_limits import Machine, whole_pages
from benchmarks.load_meter import PAD, Meter
from sllm_actor.checkpoint.folder import Checkpoint, read_folder
from sllm_actor.engine.mapped_tensors import DTYPES, MappedTensors
from sllm_actor.units import MIB

BULK_BYTES = 16 * MIB


class Steps:
    """The steps, over one checkpoint of one file at a time; memory is fresh in each."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._memory: tuple[int, int] | None = None

    def by_tensor(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """Read each tensor into memory of its own, through the page cache."""
        tensors = {}
        for file in checkpoint.files:
            fd = os.open(checkpoint.file_path(file), os.O_RDONLY | os.O_CLOEXEC)
            for tensor in file.header.tensors:
                made = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
                target = memoryview((ctypes.c_char * made.nbytes).from_address(made.data_ptr())).cast("B")
                done = 0
                while done < len(target):
                    done += os.preadv(fd, [target[done:]], tensor.begin + done)
                tensors[tensor.name] = made
            os.close(fd)
        return tensors

    def bulk(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """Read the file front to back in pieces of 16 MiB, through the page cache."""
        return self._read(checkpoint, threads=1, direct=False)

    def direct(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """Read past the page cache."""
        return self._read(checkpoint, threads=1, direct=True)

    def threads(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """Read by four threads."""
        return self._read(checkpoint, threads=4, direct=True)

    def _read(self, checkpoint: Checkpoint, threads: int, direct: bool) -> dict[str, torch.Tensor]:
        (file,) = checkpoint.files
        memory = self._machine.memory(file.size_bytes, faulted=False)
        self._memory = memory, file.size_bytes
        self._machine.read_s(checkpoint.file_path(file), memory, file.size_bytes, BULK_BYTES, threads, direct)
        data = memoryview((ctypes.c_ubyte * whole_pages(file.size_bytes)).from_address(memory)).cast("B")
        lie = MappedTensors(data)
        return {tensor.name: lie.view(tensor) for tensor in file.header.tensors if not tensor.name.startswith(PAD)}

    def free(self) -> None:
        """Give back what the last step read into."""
        if self._memory is not None:
            self._machine.free(*self._memory)
        self._memory = None


def commands(library: str, meter: Meter) -> Commands:
    """Give the command that takes one step."""
    made = Steps(Machine(library))
    by_name: dict[str, Callable[[Checkpoint], dict[str, torch.Tensor]]] = {
        "by tensor": made.by_tensor,
        "bulk": made.bulk,
        "direct": made.direct,
        "threads": made.threads,
    }

    async def step(folder: str, name: str, digest: bool) -> dict[str, Any]:
        meter.begin()
        tensors = by_name[name](read_folder(Path(folder)))
        answer = meter.end(tensors, digest)
        del tensors
        gc.collect()
        made.free()
        return answer

    return {"step": step}
