"""Builders for tests of sources: origins that answer as they are told, and the promise that a source leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TypeVar

from aiohttp.abc import AbstractResolver, ResolveResult
from checkpoints import noise
from raw_server import Answer, Request

from sllm_actor.sources.source import Source, SourceFile, SourceOptions

OPTIONS = SourceOptions(connect_timeout_s=20, stall_timeout_s=20)
HASTY = SourceOptions(connect_timeout_s=0.3, stall_timeout_s=0.3)
WEIGHTS = noise(300_000, 1)
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "tokenizer.json": b'{"a": 1}'}
GATHER_S = 20

Kind = TypeVar("Kind", bound=Source)


def origin(files: Mapping[str, bytes] = FILES, etag: str = '"one"', otherwise: Answer | None = None) -> Answer:
    """Answer as a good origin with ranges does at `/m/`; `otherwise` has the paths that it does not know."""

    def answer(request: Request) -> None:
        content = files.get(request.path.removeprefix("/m/"))
        if content is not None:
            request.reply_file(content, {"ETag": etag})
        elif otherwise is not None:
            otherwise(request)
        else:
            request.reply(404)

    return answer


def only(name: str, special: Answer, rest: Answer | None = None, method: str = "GET") -> Answer:
    """Answer requests for the content of one file in a special way, and all others as a good origin does."""
    good = rest or origin()

    def answer(request: Request) -> None:
        (special if request.path == f"/m/{name}" and request.method == method else good)(request)

    return answer


def model_file(validator: str = '"one"', name: str = "model.safetensors", content: bytes = WEIGHTS) -> SourceFile:
    """The weights of `FILES`, as `origin` lists them."""
    return SourceFile(name, len(content), validator)


def descriptors() -> list[str]:
    """List those of this process; a loop of libuv opens one for /dev/null when it first has need of it."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # A server's thread may close it between being listed and being looked at.
            if os.readlink(f"/proc/self/fd/{name}") != "/dev/null":
                found.append(name)
    return sorted(found)


async def read(source: Source, file: SourceFile, offset: int = 0, size_bytes: int | None = None) -> bytes:
    """Read a range, and see to it that nothing around it is written."""
    size = file.size_bytes - offset if size_bytes is None else size_bytes
    around = bytearray(b"\xa5" * (size + 16))
    await source.read(file, offset, memoryview(around)[8 : 8 + size])
    assert around[:8] == around[-8:] == b"\xa5" * 8
    return bytes(around[8:-8])


@asynccontextmanager
async def opened(source: Kind) -> AsyncIterator[Kind]:
    """The source, and the promise that no descriptor and no task is left once it is closed."""
    gc.collect()
    before = descriptors(), asyncio.all_tasks()
    try:
        yield source
    finally:
        await source.close()
        async with asyncio.timeout(GATHER_S):
            # What ends a connection takes turns of the loop, and the server's own threads.
            while (descriptors(), asyncio.all_tasks()) != before:
                await asyncio.sleep(0)


class Names(AbstractResolver):
    """A resolver of a test: gives the addresses of a name in turn, the last one for ever. `_` in a name means a dot."""

    def __init__(self, **names: list[str]) -> None:
        self._names = {name.replace("_", "."): addresses for name, addresses in names.items()}
        self.asked: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.asked.append(host)
        if host not in self._names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        addresses = self._names[host]
        address = addresses.pop(0) if len(addresses) > 1 else addresses[0]
        return [
            ResolveResult(hostname=host, host=each, port=port, family=socket.AF_INET, proto=0, flags=0)
            for each in address.split()
        ]

    async def close(self) -> None:
        pass


async def until(true: Callable[[], object]) -> None:
    """Turn the loop until something has come true."""
    async with asyncio.timeout(GATHER_S):
        while not true():
            await asyncio.sleep(0)
