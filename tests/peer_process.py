"""A node in a process of its own, for tests that kill it, stop it, or let it run out of descriptors.

`peer_process.py serve NODE ENDPOINT`, `serve-without NODE ENDPOINT`, or `run-out ADDRESS`; tells of itself in lines.
"""

from __future__ import annotations

import asyncio
import resource
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from remote_pairs import QUICK, Everyman, Say, open_files, outcome, system

FEW = 12


async def serve(name: str, endpoint: str) -> None:
    node = system(name)
    await node.spawn(Everyman(), "man")
    print(await node.listen(endpoint), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await node.close()


async def run_out_of_files(peer: str) -> None:
    """Take every descriptor there is, ask, give them back, ask again; prints what came of it."""
    node = system("poor", QUICK)
    ref = node.ref("man", peer)
    used = len(open_files())
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + FEW, used + FEW))
    taken = []
    with suppress(OSError):
        while True:
            taken.append(open("/dev/null"))  # noqa: SIM115
    print(type(await outcome(ref.ask(Say(text="x"), timeout_s=60))).__name__, flush=True)
    for file in taken:
        file.close()
    answer = None
    while answer != "x":
        answer = await outcome(ref.ask(Say(text="x"), timeout_s=60))
        await asyncio.sleep(0.001)
    print(answer, flush=True)
    await node.close()


async def serve_without_files(name: str, endpoint: str) -> None:
    """Listen, and take every descriptor; give them back when a line comes in."""
    node = system(name)
    await node.spawn(Everyman(), "man")
    print(await node.listen(endpoint), flush=True)
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, sys.stdin.readline)
    used = len(open_files())
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + FEW, used + FEW))
    taken = []
    with suppress(OSError):
        while True:
            taken.append(open("/dev/null"))  # noqa: SIM115
    print("taken", flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    for file in taken:
        file.close()
    await loop.run_in_executor(None, sys.stdin.read)
    await node.close()


if __name__ == "__main__":
    work: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {
        "serve": serve,
        "serve-without": serve_without_files,
        "run-out": run_out_of_files,
    }
    asyncio.run(work[sys.argv[1]](*sys.argv[2:]))
