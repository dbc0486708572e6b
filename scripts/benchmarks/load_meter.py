"""How every system is measured, ours and the peers alike, inside its own process.

A load is over when every tensor is there *and* a byte of every page of every tensor has been read: a mapping that has
not been faulted in is a promise. The reading is C, one call for all tensors, over the addresses that torch tells; what
it takes where everything is resident already is measured right after, apart.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import resource
import time
import zlib
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.load_limits import Machine

# What pads a converted checkpoint is no tensor of the model.
PAD = "__pad_"


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _device_bytes() -> int:
    """Tell how much this process has had storage devices read so far, by whichever way."""
    found = re.search(r"^read_bytes: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found is not None, "the kernel accounts I/O by task"
    return int(found.group(1))


class Meter:
    """Measures one load at a time: `begin`, load, `end`."""

    def __init__(self, library: str) -> None:
        self._machine = Machine(library)
        # What is imported by now stays: to look through it before each load would take longer than many a load.
        gc.collect()
        gc.freeze()
        self._begin_s = self._begin_cpu_s = 0.0
        self._begin_device_bytes = 0

    def begin(self) -> None:
        """Start the clock, with nobody's garbage left."""
        gc.collect()
        self._begin_device_bytes = _device_bytes()
        self._begin_cpu_s = _cpu_s()
        self._begin_s = time.perf_counter()

    def end(self, tensors: Mapping[str, torch.Tensor], digest: bool) -> dict[str, Any]:
        """Touch every page, stop the clock, and say what was measured; with `digest`, what the tensors hold."""
        loaded_s = time.perf_counter()
        ranges = self._ranges(tensors)
        self._machine.touch(*ranges)
        end_s = time.perf_counter()
        cpu_s = _cpu_s() - self._begin_cpu_s
        device_bytes = _device_bytes() - self._begin_device_bytes
        again_begin_s = time.perf_counter()
        self._machine.touch(*self._ranges(tensors))
        again_s = time.perf_counter() - again_begin_s
        answer: dict[str, Any] = {
            "s": end_s - self._begin_s,
            "touch_s": end_s - loaded_s,
            "again_s": again_s,
            "cpu_s": cpu_s,
            "device_bytes": device_bytes,
            "size_bytes": sum(ranges[1]),
        }
        if digest:
            answer |= {"digest": _digest(tensors), "maps_files": _maps_files(ranges[0])}
        return answer

    @staticmethod
    def _ranges(tensors: Mapping[str, torch.Tensor]) -> tuple[array[int], array[int]]:
        values = tensors.values()
        addresses = array("Q", [tensor.data_ptr() for tensor in values])
        return addresses, array("Q", [tensor.nbytes for tensor in values])


def _digest(tensors: Mapping[str, torch.Tensor]) -> list[int]:
    """Sum up what the tensors hold, whatever their names: how many, their bytes, and the sum of their checksums."""
    count = size_bytes = checksums = 0
    for name, tensor in tensors.items():
        if name.startswith(PAD):
            continue
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
        count, size_bytes = count + 1, size_bytes + tensor.nbytes
        checksums += zlib.crc32((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
    return [count, size_bytes, checksums]


def _maps_files(addresses: array[int]) -> bool:
    """Tell whether any tensor lies in a mapped file, that is, was not copied."""
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *_ = line.split()
        if inode != "0":
            begin, _, end = span.partition("-")
            spans.append((int(begin, 16), int(end, 16)))
    return any(begin <= address < end for address in addresses for begin, end in spans)


def weight_files(folder: str, suffix: str = ".safetensors") -> list[str]:
    """List the weight files of a folder, in order."""
    found = sorted(str(path) for path in Path(folder).iterdir() if path.name.endswith(suffix))
    if not found:
        raise FileNotFoundError(f"no {suffix} in {folder}")
    return found


def quiet() -> None:
    """Have libraries say nothing and fetch nothing."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "RUNAI_STREAMER_LOG_LEVEL": "WARNING",
        "TQDM_DISABLE": "1",
    }
