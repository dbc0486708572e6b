"""A node that holds one folder, in a process of its own: `peer_source_process.py NODE FOLDER HELD`.

Prints its address. Reads of the file HELD print `reading` and never end, so that a test can kill it in the middle.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from remote_pairs import QUICK

from sllm_actor.actors import PeerServer
from sllm_actor.runtime import ActorSystem
from sllm_actor.sources.holdings import FolderHoldings, Held, HeldFolder
from sllm_actor.sources.peer import PEER_ACTOR
from sllm_actor.sources.peer_messages import PEER_MESSAGES
from sllm_actor.sources.source import SourceFile


class Stuck(HeldFolder):
    """Reads every file but one."""

    async def read(self, file: SourceFile, offset: int, into: memoryview) -> None:
        if file.name == sys.argv[3]:
            print("reading", flush=True)
            await asyncio.Event().wait()
        await super().read(file, offset, into)


class Holdings(FolderHoldings):
    """Holds the one folder under any name."""

    @asynccontextmanager
    async def hold(self, model: str) -> AsyncIterator[Held]:
        yield Stuck(Path(sys.argv[2]), lambda _: "")


async def nowhere(_: str) -> Path | None:
    return None


async def serve() -> None:
    system = ActorSystem(node_id=sys.argv[1], messages=PEER_MESSAGES, limits=QUICK)
    await system.spawn(PeerServer(Holdings(nowhere), max_reads=4), PEER_ACTOR)
    print(await system.listen("tcp://127.0.0.1:0"), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await system.close()


if __name__ == "__main__":
    asyncio.run(serve())
