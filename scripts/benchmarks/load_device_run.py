"""The part `device` of `load`: by turns ours, the peers and both limits, and the ratios between them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from benchmarks import load_limits
from benchmarks.actors_process import Child
from benchmarks.load_cases import COLD, LIMIT_BLOCKS_MIB, OPTIMIZED, STOCK, Case
from benchmarks.load_device import SHAPE, Devices
from benchmarks.load_folders import Folders
from sllm_actor.cli.show import out
from sllm_actor.units import MIB

Row = Callable[[str, str, str, list[float], str], None]
CHUNK_BYTES = 16 * MIB
# What a folder takes beyond its weights.
SPARE_CHUNKS = 4


class _Found:
    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], list[float]] = {}
        self.ratios: dict[str, list[float]] = {}

    def add(self, state: str, system: str, value: float) -> float:
        self.seconds.setdefault((state, system), []).append(value)
        return value


def run(row: Row, repeats: int, root: Path, tiny: bool, peers_python: str | None) -> dict[str, list[float]]:
    """Measure, add the rows by `row`, and give the ratios' values."""
    library = load_limits.build(root)
    folders = Folders(root, load_limits.Machine(library))
    folders.make([Case(COLD, SHAPE, layout, "") for layout in (OPTIMIZED, STOCK)], tiny, None)
    optimized = f"{SHAPE}-{OPTIMIZED}"
    size_bytes = sum(path.stat().st_size for path in folders.weights(optimized))
    pool_bytes = (size_bytes // CHUNK_BYTES + SPARE_CHUNKS) * CHUNK_BYTES
    found = _Found()
    with ExitStack() as stack:
        devices = Devices(stack, (pool_bytes, CHUNK_BYTES), peers_python)
        limits = Child(stack, "load_limits", "limits", str(library))
        for repeat in range(repeats + 1):
            measured = _Found() if repeat == 0 else found  # The first warms up, and is not counted.
            _repeat(measured, devices, limits, folders, optimized, size_bytes)
            out.print(
                f"{repeat}/{repeats} device: " + ", ".join(f"{k} {v[-1]:.2f}" for k, v in measured.ratios.items())
            )
    for (state, system), values in found.seconds.items():
        row(
            f"{state} → device, {SHAPE}",
            system,
            "s",
            values,
            f"{size_bytes / statistics.median(values) / 1e9:.2f} GB/s",
        )
    for system, reason in devices.failed.items():
        row(f"→ device, {SHAPE}", system, "s", [], reason)
    return found.ratios


def _repeat(found: _Found, devices: Devices, limits: Child, folders: Folders, optimized: str, size_bytes: int) -> None:
    """Measure the disk, then the pool that this has filled, each beside its limits and its peers."""
    copy_s = found.add("limit", "cuMemcpyHtoDAsync", size_bytes / devices.copy_rate())
    folders.evict(optimized)
    (weights,) = folders.weights(optimized)
    blocks = [block_mib * MIB for block_mib in LIMIT_BLOCKS_MIB]
    disk_s = min(limits.call("read", path=str(weights), block_bytes=block, threads=4) for block in blocks)
    limits.call("free")
    found.add("limit", "O_DIRECT, 4 threads", disk_s)
    folders.evict(optimized)
    cold_s = found.add("disk", "ours", devices.ours_s(folders.path(optimized), from_pool=False))
    pool_s = found.add("host pool", "ours", devices.ours_s(folders.path(optimized), from_pool=True))
    folders.evict(SHAPE)
    cold = devices.peers_s(folders.path(SHAPE))
    folders.fill(SHAPE)
    cached = devices.peers_s(folders.path(SHAPE))
    folders.evict(SHAPE)
    for state, values in (("disk", cold), ("page cache", cached)):
        for system, value in values.items():
            found.add(state, system, value)
    ratios = {"device_pool.share_of_limit": copy_s / pool_s, "device_disk.share_of_limit": max(disk_s, copy_s) / cold_s}
    if "safetensors" in cold and "safetensors" in cached:
        ratios["device_disk.over_safetensors"] = cold["safetensors"] / cold_s
        ratios["device_pool.over_safetensors"] = cached["safetensors"] / pool_s
    for name, value in ratios.items():
        found.ratios.setdefault(name, []).append(value)
