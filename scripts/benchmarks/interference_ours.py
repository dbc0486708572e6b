"""Ours as a process: `python -m benchmarks.interference_ours node POOL_BYTES CHUNK_BYTES THREADS FOLDER SIZE_BYTES`.

A node's loader and write gate, and background writers that the gate holds back: what the product's SSD tier does with a
download, without the download. A scratch file of SIZE_BYTES in FOLDER stands for what it stores.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.actors_process import Commands, serve
from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.loader.loader import Loader
from sllm_actor.loader.scratch import Scratch
from sllm_actor.loader.write_gate import WriteGate
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.runtime.tasks import TaskScope


class Gates:
    """The gate of the moment. A loader tells it for as long as it lives, a gate's rate is one measurement's."""

    def __init__(self) -> None:
        self.gate: WriteGate | None = None

    def on_reading(self, reading: bool) -> None:
        """Pass on what the loader tells."""
        if self.gate is not None:
            self.gate.on_reading(reading)


class Node:
    """The commands of the process with the pool."""

    def __init__(self, loader: Loader, gates: Gates, scratch: Scratch, threads: int) -> None:
        self._loader = loader
        self._gates = gates
        self._scratch = scratch
        self._executor = ThreadPoolExecutor(threads)
        self._threads = threads
        self._serial = 0
        self._written_bytes = 0

    async def load(self, folder: str) -> dict[str, Any]:
        """Measure one load of a checkpoint that the pool does not hold, to its last byte in the pool."""
        self._serial += 1
        checkpoint = read_folder(Path(folder))
        checkpoint = msgspec.structs.replace(checkpoint, fingerprint=f"{checkpoint.fingerprint}-{self._serial}")
        lease = await self._loader.lease(checkpoint)
        lease.release()
        report = lease.report
        return {"s": report.duration_s, "size_bytes": report.total_bytes, "ssd_bytes": report.ssd_bytes}

    async def load_beside_writes(self, folder: str, bytes_per_s: float) -> dict[str, Any]:
        """Measure one load beside writers that get so much of the device while it runs."""
        gate = self._gates.gate = WriteGate(bytes_per_s, SystemClock())
        writers = TaskScope("writers")
        begun = asyncio.Event()
        try:
            for k in range(self._threads):
                writers.spawn(self._write(gate, k, begun), f"writer {k}")
            await begun.wait()
            before_bytes = self._written_bytes
            answer = await self.load(folder)
            return answer | {"written_bytes": self._written_bytes - before_bytes}
        finally:
            self._gates.gate = None
            await writers.close()

    async def _write(self, gate: WriteGate, number: int, begun: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await gate(self._scratch.block_bytes)
            self._written_bytes += await loop.run_in_executor(self._executor, self._scratch.write, number)
            number += self._threads
            begun.set()


async def node(
    pool_bytes: str, chunk_bytes: str, threads: str, folder: str, size_bytes: str
) -> tuple[dict[str, Any], Commands]:
    """Open the pool and the scratch file, and tell what the machine gave for the pool."""
    gates = Gates()
    scratch = Scratch(Path(folder), int(size_bytes), int(chunk_bytes))
    loader = await Loader.open(
        pool_bytes=int(pool_bytes), chunk_bytes=int(chunk_bytes), clock=SystemClock(), on_reading=gates.on_reading
    )
    made = Node(loader, gates, scratch, int(threads))
    facts: dict[str, Any] = msgspec.to_builtins(loader.facts())
    return facts, {"load": made.load, "load_beside_writes": made.load_beside_writes}


if __name__ == "__main__":
    serve(node=node)
