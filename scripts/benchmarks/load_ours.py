"""Ours as processes: `python -m benchmarks.load_ours node LIBRARY POOL_BYTES CHUNK_BYTES PAGES | engine LIBRARY`.

The node owns a loader and its pool. What it loads it attaches itself, in the steps of an engine; of what it only
holds, an engine in a process of its own maps the chunks, by the descriptor of the pool.
"""

from __future__ import annotations

import asyncio
import gc
import os
from typing import Any

import msgspec

from benchmarks import load_api, load_steps
from benchmarks.actors_process import Commands, serve
from benchmarks.load_meter import Meter, quiet
from sllm_actor.loader.loader import Loader
from sllm_actor.loader.mapping import HostFile


class Node:
    """The commands of the process with the pool."""

    def __init__(self, loader: Loader, library: str) -> None:
        self._loader = loader
        self._meter = Meter(library)
        self._serial = 0
        self._held: load_api.Attached | None = None

    async def _load(self, folder: str, in_place: bool, overlap: bool) -> load_api.Attached:
        self._serial += 1
        return await load_api.load(self._loader, folder, self._serial, in_place, overlap)

    async def load(self, folder: str, digest: bool, in_place: bool = True, overlap: bool = True) -> dict[str, Any]:
        """Measure one load of a checkpoint that the pool does not hold."""
        self._meter.begin()
        attached = await self._load(folder, in_place, overlap)
        answer = self._meter.end(attached.tensors, digest) | {"report": load_api.report_of(attached.lease)}
        attached.close()
        del attached
        gc.collect()
        return answer

    async def load_both(self, folders: list[str]) -> dict[str, Any]:
        """Measure two loads at once, until both are there."""
        self._meter.begin()
        both = await asyncio.gather(*(self._load(folder, False, True) for folder in folders))
        tensors = {f"{k} {name}": tensor for k, each in enumerate(both) for name, tensor in each.tensors.items()}
        answer = self._meter.end(tensors, False)
        del tensors
        for attached in both:
            attached.close()
        del both, attached
        gc.collect()
        return answer

    async def hold(self, folder: str) -> dict[str, Any]:
        """Keep a checkpoint in the pool, and tell an engine all it needs to attach it."""
        await self.let_go()
        self._held = await self._load(folder, in_place=False, overlap=True)
        files = [msgspec.to_builtins(file) for file in self._held.lease.files]
        pool = f"/proc/{os.getpid()}/fd/{self._loader.pool_fd}"
        return {"pool": pool, "chunk_bytes": self._loader.chunk_bytes, "files": files}

    async def let_go(self) -> None:
        """Hold nothing any more."""
        held, self._held = self._held, None
        if held is not None:
            held.close()


async def node(library: str, pool_bytes: str, chunk_bytes: str, pages: str) -> tuple[dict[str, Any], Commands]:
    """Open the pool, and tell what the machine gave for it."""
    quiet()
    loader = await load_api.open_loader(int(pool_bytes), int(chunk_bytes), pages != "small")
    made = Node(loader, library)
    commands: Commands = {"load": made.load, "load_both": made.load_both, "hold": made.hold, "let_go": made.let_go}
    facts: dict[str, Any] = msgspec.to_builtins(loader.facts())
    return facts, commands


async def engine(library: str) -> tuple[None, Commands]:
    """Attach what a node holds, on request, or take a step of the ablation."""
    quiet()
    meter = Meter(library)

    async def attach(pool: str, chunk_bytes: int, files: list[dict[str, Any]], digest: bool) -> dict[str, Any]:
        host_files = [msgspec.convert(file, HostFile) for file in files]
        pool_fd = os.open(pool, os.O_RDWR | os.O_CLOEXEC)
        try:
            meter.begin()
            mapped, tensors = load_api.attach(pool_fd, chunk_bytes, host_files)
            answer = meter.end(tensors, digest)
        finally:
            os.close(pool_fd)
        del tensors
        mapped.close()
        gc.collect()
        return answer

    return None, {"attach": attach, **load_steps.commands(library, meter)}


if __name__ == "__main__":
    serve(node=node, engine=engine)
