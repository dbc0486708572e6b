"""Children of `remote`: the tiers of a node; a plain download to a disk; a transfer to nowhere.

`python -m benchmarks.remote_ours node DATA POOL_BYTES CHUNK_BYTES`, or `… plain TARGET CHUNK_BYTES`.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.actors_process import Commands, serve
from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.loader.cards import Cards
from sllm_actor.loader.loader import Loader
from sllm_actor.loader.ssd_tier import SsdTier
from sllm_actor.loader.tiers import Tiers
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.sources.local import FolderSource
from sllm_actor.sources.open import open_source
from sllm_actor.sources.source import Source, SourceOptions

PARALLEL = 8
_PIECE_BYTES = 1 << 20


def _open(url: str) -> Source:
    return open_source(url, SourceOptions(), {}, FolderSource)


async def node(data: str, pool_bytes: str, chunk_bytes: str) -> tuple[None, Commands]:
    """Be a node as far as its tiers go."""
    folder, clock = Path(data), SystemClock()

    async def opened(work: Callable[[Tiers], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        """Run `work` on an empty node: a pool of its own, and nothing on the SSD."""
        shutil.rmtree(folder, ignore_errors=True)
        loader = await Loader.open(pool_bytes=int(pool_bytes), clock=clock, chunk_bytes=int(chunk_bytes))
        ssd = await SsdTier.open(folder / "ssd", 2**50, clock)
        tiers = Tiers(loader, ssd, Cards(folder / "cards"), _open, clock, random.random)
        try:
            return await work(tiers)
        finally:
            await tiers.close()
            await ssd.close()
            await loader.close()

    async def stream(url: str) -> dict[str, Any]:
        """Time a start from nothing, and then until the SSD has its copy."""

        async def work(tiers: Tiers) -> dict[str, Any]:
            begun_s = time.perf_counter()
            card = await tiers.describe(url)
            lease = await tiers.lease(card)
            loaded_s = time.perf_counter() - begun_s
            lease.release()
            await tiers.pull(card)
            stored_s = time.perf_counter() - begun_s
            assert lease.report.remote_bytes == card.checkpoint.size_bytes
            return {"s": loaded_s, "stored_s": stored_s, "size_bytes": card.checkpoint.size_bytes}

        return await opened(work)

    async def pull_then_load(url: str) -> dict[str, Any]:
        """Time our own pull, and a load from the SSD after it."""

        async def work(tiers: Tiers) -> dict[str, Any]:
            begun_s = time.perf_counter()
            card = await tiers.describe(url)
            await tiers.pull(card)
            lease = await tiers.lease(card)
            took_s = time.perf_counter() - begun_s
            assert lease.report.ssd_bytes + lease.report.page_cache_bytes == card.checkpoint.size_bytes
            lease.release()
            return {"s": took_s, "size_bytes": card.checkpoint.size_bytes}

        return await opened(work)

    return None, {"stream": stream, "pull_then_load": pull_then_load}


async def plain(target: str, pool_bytes: str, chunk_bytes: str) -> tuple[None, Commands]:
    """Be a downloader without tiers: ranges on as many connections, into files or to nowhere."""
    folder, each = Path(target), int(chunk_bytes)

    async def transfer(url: str, files: dict[str, int], keep: bool) -> dict[str, Any]:
        """Time the bytes alone; with `keep`, into files that are synced, and a load of those by our loader."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        todo = deque((name, at, min(each, size - at)) for name, size in files.items() for at in range(0, size, each))
        descriptors = {name: os.open(folder / name, os.O_CREAT | os.O_WRONLY) for name in files if keep}
        loader = await Loader.open(pool_bytes=int(pool_bytes), clock=SystemClock(), chunk_bytes=each) if keep else None
        begun_s = time.perf_counter()
        async with aiohttp.ClientSession(read_bufsize=_PIECE_BYTES) as session:
            await asyncio.gather(*(_worker(session, url, todo, descriptors) for _ in range(PARALLEL)))
        for descriptor in descriptors.values():
            await asyncio.to_thread(os.fsync, descriptor)
            os.close(descriptor)
        arrived_s = time.perf_counter() - begun_s
        if loader is not None:
            (await loader.lease(await asyncio.to_thread(read_folder, folder))).release()
        took_s = time.perf_counter() - begun_s
        if loader is not None:
            await loader.close()
        return {"s": took_s, "arrived_s": arrived_s, "size_bytes": sum(files.values())}

    return None, {"transfer": transfer}


async def _worker(
    session: aiohttp.ClientSession, url: str, todo: deque[tuple[str, int, int]], descriptors: dict[str, int]
) -> None:
    while todo:
        name, at, length = todo.popleft()
        async with session.get(url + name, headers={"Range": f"bytes={at}-{at + length - 1}"}) as answer:
            answer.raise_for_status()
            async for piece in answer.content.iter_any():
                if descriptors:
                    await asyncio.to_thread(os.pwrite, descriptors[name], piece, at)
                at += len(piece)


if __name__ == "__main__":
    serve(node=node, plain=plain)
