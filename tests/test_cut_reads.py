"""Links that drop again and again: what has come of a chunk stays, and the next read goes on behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from checkpoints import folder_of
from fault_proxy import Fault, FaultProxy
from houses import WEIGHTS, tiers_at
from houses import origin as origin
from loaders import CHUNK, bytes_of
from raw_server import RawServer, Request
from scripted_source import ScriptedSource
from sources import OPTIONS
from test_suppliers import NAME, SIZE, half, suppliers_of

from sllm_actor.errors import CheckpointCorrupt, SourceChanged, SourceError, SourceUnreachable
from sllm_actor.loader.cards import Card
from sllm_actor.loader.fetch import Read, read_and_settle
from sllm_actor.loader.suppliers import LEAST_PROGRESS_BYTES, MAX_FAILURES, Supplier, Suppliers
from sllm_actor.loader.tiers import Tiers
from sllm_actor.runtime.clock import LoopClock
from sllm_actor.sources.http import HttpSource
from sllm_actor.sources.source import SourceFile
from sllm_actor.testing.virtual_loop import run_virtual


class CutSource(ScriptedSource):
    """Gives `give_bytes` of each read and then fails, `cuts` times; `spoils` flips a bit of each."""

    def __init__(self, folder: Path, url: str, give_bytes: int, cuts: int, *, spoils: bool = False) -> None:
        super().__init__(folder, url)
        self._give_bytes = give_bytes
        self._cuts = cuts
        self._spoils = spoils

    async def read(self, file: SourceFile, offset: int, into: memoryview) -> None:
        if self._cuts == 0 or len(into) <= self._give_bytes:
            await super().read(file, offset, into)
            into[0] ^= self._spoils
            return
        self._cuts -= 1
        await super().read(file, offset, into[: self._give_bytes])
        into[0] ^= self._spoils
        cut: SourceError = SourceUnreachable("cut")
        cut.came_bytes = self._give_bytes
        raise cut


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(tmp_path, SIZE)


def read_once(folder: Path, *sources: ScriptedSource) -> list[str]:
    """Read the file, compared with what it should be, and give who brought it."""

    async def work() -> list[str]:
        suppliers, found = await suppliers_of(*sources), bytearray(SIZE)
        givers = await suppliers.read(NAME, 0, memoryview(found))
        assert found == (folder / NAME).read_bytes()
        return [giver.source.url for giver in givers]

    return run_virtual(work)


def test_a_read_goes_on_behind_what_had_come_before_it_was_cut(folder: Path) -> None:
    source = CutSource(folder, "test://a", 15_000, cuts=2)
    assert read_once(folder, source) == ["test://a"]
    assert source.reads == [(NAME, 0), (NAME, 15_000), (NAME, 30_000)]


def test_a_source_that_is_cut_more_often_than_it_may_fail_gets_there_if_each_brings_enough(tmp_path: Path) -> None:
    size = (MAX_FAILURES + 3) * LEAST_PROGRESS_BYTES
    folder = folder_of(tmp_path, size)

    async def work(give_bytes: int) -> int:
        source = CutSource(folder, "test://a", give_bytes, cuts=10**9)
        suppliers = Suppliers([Supplier(source, {f.name: f for f in await source.files()})], LoopClock(), half)
        try:
            await suppliers.read(NAME, 0, memoryview(bytearray(size)))
        finally:
            assert source.reads == [(NAME, k * give_bytes) for k in range(len(source.reads))]
        return len(source.reads)

    assert run_virtual(lambda: work(LEAST_PROGRESS_BYTES)) == MAX_FAILURES + 3
    with pytest.raises(SourceUnreachable, match="cut"):
        run_virtual(lambda: work(LEAST_PROGRESS_BYTES - 1))


def test_another_source_goes_on_behind_what_the_first_has_given(folder: Path) -> None:
    near, far = CutSource(folder, "test://near", 17_000, cuts=1), ScriptedSource(folder, "test://far")
    assert read_once(folder, near, far) == ["test://near", "test://far"]
    assert far.reads == [(NAME, 17_000)]


def test_who_is_wrong_is_told_by_a_read_from_one_source_alone(folder: Path) -> None:
    """Of a read that two have given nobody knows whose part was wrong: the other one must not pay for it."""
    wrong = CutSource(folder, "test://wrong", 17_000, cuts=10**9, spoils=True)
    right = ScriptedSource(folder, "test://right")

    async def work() -> tuple[bytes, dict[str, int]]:
        suppliers, into = await suppliers_of(wrong, right), bytearray(SIZE)
        known = {supplier.source.url: supplier for supplier in suppliers._suppliers}

        async def settle() -> None:
            if into != (folder / NAME).read_bytes():
                raise CheckpointCorrupt("wrong")

        await read_and_settle(suppliers, [Read(NAME, 0, memoryview(into))], settle)
        return bytes(into), {url: supplier.wrongs for url, supplier in known.items()}

    content, wrongs = run_virtual(work)
    assert content == (folder / NAME).read_bytes()
    assert wrongs["test://right"] == 0


# Over HTTP, by a proxy that cuts.


class Linked(NamedTuple):
    tiers: Tiers
    card: Card
    proxy: FaultProxy

    @property
    def size_bytes(self) -> int:
        return self.card.checkpoint.size_bytes


@asynccontextmanager
async def linked(folder: Path, choose: Callable[[Request], Fault | None], etags: list[str]) -> AsyncIterator[Linked]:
    """Tiers whose source is behind a proxy. Later reads of the weights meet later `etags`, the last for ever."""
    weights = {f"/m/{path.name}": path.read_bytes() for path in folder.iterdir()}

    def answer(request: Request) -> None:
        content = weights.get(request.path)
        if content is None:
            request.reply(404)
            return
        request.reply_file(content, {"ETag": etags[0]})
        if request.method == "GET" and WEIGHTS[:5] in request.path and len(etags) > 1:
            etags.pop(0)

    with RawServer(answer) as server, FaultProxy(server.port) as proxy:
        source = HttpSource(f"{proxy.url}/m/", OPTIONS)
        async with tiers_at(folder.parent / "node", lambda _: source) as tiers:
            card = await tiers.describe(source.url)
            source = HttpSource(f"{proxy.url}/m/", OPTIONS)
            proxy.body_bytes, proxy.choose = 0, choose
            yield Linked(tiers, card, proxy)


CUT_BYTES = CHUNK // 3


def cut(request: Request) -> Fault | None:
    return Fault(cut_after_bytes=CUT_BYTES)


@pytest.mark.parametrize("way", ["load", "pull"])
async def test_a_link_that_never_carries_a_whole_chunk_brings_the_checkpoint_and_nothing_twice(
    origin: Path, way: str
) -> None:
    async with linked(origin, cut, ['"one"']) as link:
        if way == "load":
            lease = await link.tiers.lease(link.card)
            files = bytes_of(link.tiers.loader, lease)
            assert files == [(origin / file.name).read_bytes() for file in link.card.checkpoint.files]
            lease.release()
        await link.tiers.pull(link.card)
        assert link.tiers.is_on_ssd(link.card)
        # What is lost of a cut is what lay between the proxy and us.
        assert link.size_bytes <= link.proxy.body_bytes <= link.size_bytes * 1.1


async def test_a_version_that_changes_between_two_parts_of_a_chunk_is_noticed(origin: Path) -> None:
    etags = ['"one"']
    async with linked(origin, cut, etags) as link:
        etags += ['"two"']
        with pytest.raises(SourceChanged, match='is "two" now'):
            await link.tiers.lease(link.card)
        assert link.tiers.loader.residents() == []


async def test_a_wrong_byte_in_one_part_costs_its_chunk_alone(origin: Path) -> None:
    left = [True]

    def cut_and_spoil(request: Request) -> Fault:
        spoils = left and request.headers.get("range", "").startswith(f"bytes={CHUNK + CUT_BYTES}-")
        return Fault(cut_after_bytes=CUT_BYTES, corrupt_byte=100 if spoils and left.pop() else None)

    async with linked(origin, cut_and_spoil, ['"one"']) as link:
        lease = await link.tiers.lease(link.card)
        assert left == []
        assert bytes_of(link.tiers.loader, lease) == [
            (origin / file.name).read_bytes() for file in link.card.checkpoint.files
        ]
        lease.release()
        assert link.proxy.body_bytes <= (link.size_bytes + CHUNK) * 1.1
        await link.tiers.pull(link.card)
