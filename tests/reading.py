"""What the tests of all sources do: read a file whole, and see that something is refused."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import pytest

from sllm_actor.errors import SllmError
from sllm_actor.sources.source import Source, SourceFile

WEIGHTS = "model.safetensors"


async def whole(source: Source, file: SourceFile) -> bytes:
    """Read a file whole."""
    into = bytearray(file.size_bytes)
    await source.read(file, 0, memoryview(into))
    return bytes(into)


async def weights_of(source: Source) -> SourceFile:
    return next(file for file in await source.files() if file.name == WEIGHTS)


async def refused(kind: type[SllmError], work: Awaitable[Any]) -> SllmError:
    """Check that the work is refused by an error of just this kind."""
    with pytest.raises(kind) as caught:
        await work
    assert type(caught.value) is kind
    return caught.value
