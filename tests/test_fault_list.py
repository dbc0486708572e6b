"""Whatever an origin or a disk does wrong costs a load or a pull its typed error, and leaves nothing behind it.

Chunks, descriptors, mapped pools, tasks and temporary files are counted around each (`houses.tiers_at`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fault_proxy import Fault, FaultProxy
from houses import origin as origin
from houses import tiers_at
from loaders import CHUNK, bytes_of
from raw_server import RawServer, Request

from sllm_actor.errors import (
    CheckpointCorrupt,
    SllmError,
    SourceChanged,
    SourceRefused,
    SourceUnreachable,
    SourceViolation,
    WriteFailed,
)
from sllm_actor.loader import suppliers
from sllm_actor.loader.cards import Card
from sllm_actor.loader.tiers import Tiers
from sllm_actor.sources.http import HttpSource
from sllm_actor.sources.source import SourceOptions

HASTY = SourceOptions(connect_timeout_s=20, stall_timeout_s=0.5)
Wrong = Callable[[Request, bytes], None]


def part(request: Request, content: bytes, *, etag: str = '"one"', more: int = 0) -> None:
    """Answer a range, `more` bytes longer than it is."""
    begin, end = request.asked_range(len(content)) or (0, len(content))
    body = (content[begin:end] + bytes(max(0, more)))[: end - begin + more]
    request.reply(206, {"ETag": etag, "Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"}, body)


ANSWERS: dict[str, tuple[Wrong, type[SllmError], str]] = {
    "another ETag": (lambda request, content: part(request, content, etag='"two"'), SourceChanged, 'is "two" now'),
    "too few bytes": (lambda request, content: part(request, content, more=-1), SourceViolation, "are the answer"),
    "too many bytes": (lambda request, content: part(request, content, more=1), SourceViolation, "are the answer"),
    "no credentials": (lambda request, _: request.reply(401), SourceRefused, "wants credentials"),
    "another host": (
        lambda request, _: request.reply(302, {"Location": "http://localhost:9/x"}),
        SourceRefused,
        "not among the hosts allowed",
    ),
    "closed": (lambda request, _: None, SourceUnreachable, "model"),
}
FAULTS: dict[str, tuple[Fault, type[SllmError], str]] = {
    "stalls": (Fault(stall_after_bytes=100), SourceUnreachable, "not a byte for"),
    "cut": (Fault(cut_after_bytes=100), SourceUnreachable, "before it is whole"),
    "wrong bytes": (Fault(corrupt_byte=CHUNK // 8), CheckpointCorrupt, r"model\.safetensors.*chunk \d+"),
}


class Place(NamedTuple):
    """Tiers over an origin that a test can make go wrong."""

    tiers: Tiers
    card: Card
    folder: Path
    wrong: list[Wrong]
    proxy: FaultProxy

    async def bring(self, way: str) -> None:
        """Load the checkpoint, and compare it, or pull it."""
        if way == "pull":
            await self.tiers.pull(self.card)
            return
        lease = await self.tiers.lease(self.card)
        files = bytes_of(self.tiers.loader, lease)
        lease.release()
        assert files == [(self.folder / file.name).read_bytes() for file in self.card.checkpoint.files]


@asynccontextmanager
async def place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    monkeypatch.setattr(suppliers, "_FIRST_PAUSE_S", 0.001)
    contents = {f"/m/{path.name}": path.read_bytes() for path in folder.iterdir()}
    wrong: list[Wrong] = []

    def answer(request: Request) -> None:
        content = contents.get(request.path)
        if content is None:
            request.reply(404)
        elif wrong and request.path.endswith(".safetensors"):
            wrong[0](request, content)
        else:
            request.reply_file(content, {"ETag": '"one"'})

    with RawServer(answer) as server, FaultProxy(server.port) as proxy:
        url = f"{proxy.url}/m/"
        async with tiers_at(folder.parent / "node", lambda _: HttpSource(url, HASTY)) as tiers:
            yield Place(tiers, await tiers.describe(url), folder, wrong, proxy)


async def refused(there: Place, way: str, error: type[SllmError], message: str, undo: Callable[[], Any]) -> None:
    """See the typed error; then, with the fault undone, all of it come."""
    with pytest.raises(error, match=message) as raised:
        await there.bring(way)
    assert type(raised.value) is error
    assert there.tiers.loader.residents() == []
    undo()
    await there.bring(way)
    await there.tiers.pull(there.card)


@pytest.mark.parametrize("way", ["load", "pull"])
@pytest.mark.parametrize("kind", ANSWERS)
async def test_an_origin_that_answers_wrongly(
    origin: Path, monkeypatch: pytest.MonkeyPatch, kind: str, way: str
) -> None:
    answer, error, message = ANSWERS[kind]
    async with place(origin, monkeypatch) as there:
        there.wrong.append(answer)
        await refused(there, way, error, message, there.wrong.clear)


@pytest.mark.parametrize("way", ["load", "pull"])
@pytest.mark.parametrize("kind", FAULTS)
async def test_a_connection_that_breaks_off_stalls_or_lies(
    origin: Path, monkeypatch: pytest.MonkeyPatch, kind: str, way: str
) -> None:
    fault, error, message = FAULTS[kind]
    async with place(origin, monkeypatch) as there:
        there.proxy.choose = lambda request: fault if ".safetensors" in request.path else None

        def undo() -> None:
            there.proxy.choose = None

        await refused(there, way, error, message, undo)


@pytest.mark.parametrize("way", ["load", "pull"])
async def test_an_origin_that_answers_a_range_with_the_whole_file(
    origin: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    async with place(origin, monkeypatch) as there:
        there.wrong.append(lambda request, content: request.reply(200, {"ETag": '"one"'}, content))
        await there.bring(way)
        await there.tiers.pull(there.card)


def failing(call: str, number: int) -> Callable[..., Any]:
    plain = getattr(os, call)

    def fail(fd: int, *rest: Any) -> Any:
        if "/partial/" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(number, os.strerror(number))
        return plain(fd, *rest)

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
async def test_a_disk_that_takes_no_more_costs_a_pull_its_error_and_a_load_its_copy(
    origin: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    async with place(origin, monkeypatch) as there:
        with monkeypatch.context() as broken:
            for call in ("pwrite", "pwritev", "write", "fsync", "fdatasync", "posix_fallocate"):
                broken.setattr(os, call, failing(call, number))
            with pytest.raises(WriteFailed, match=os.strerror(number)):
                await there.bring("pull")
            await there.bring("load")
            assert not there.tiers.is_on_ssd(there.card)
        there.tiers.loader.evict(there.card.checkpoint)
        await there.bring("pull")
        assert there.tiers.is_on_ssd(there.card)
