"""What a node gives to others of a model that came from elsewhere: from its card, and from the SSD or host memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest
from houses import WEIGHTS, House, house
from houses import origin as origin
from houses import stock as stock

from sllm_actor.errors import SourceChanged, SourceMissing
from sllm_actor.loader.mapping import HostFile
from sllm_actor.node.held_models import HeldCard
from sllm_actor.sources.source import SourceFile


async def held(node: House, place: str) -> tuple[HeldCard, Path]:
    """The model as it is given away from one place; and where its weights are, if that is a folder."""
    await node.tiers.pull(node.card)
    (entry,) = node.tiers.ssd.entries()
    files: tuple[HostFile, ...] = ()
    if place == "memory":
        lease = await node.lease()
        files = lease.files
        lease.release()
    loader = node.tiers.loader
    ssd = None if place == "memory" else entry.path
    return HeldCard(node.card, ssd, await loader.memory(), loader.chunk_bytes, files), entry.path


async def given(model: HeldCard, file: SourceFile, offset: int = 0) -> bytes:
    into = bytearray(file.size_bytes - offset)
    await model.read(file, offset, memoryview(into))
    return bytes(into)


@pytest.mark.parametrize("place", ["ssd", "memory"])
async def test_each_read_looks_at_its_own_file_and_lists_none(
    origin: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(origin) as node:
        model, _ = await held(node, place)
        # What the pull has left to delete is listed for that, and not for a read.
        await node.tiers.ssd.trash_emptied()
        try:

            def scandir(*_: object) -> NoReturn:
                raise AssertionError("a folder was listed")

            monkeypatch.setattr(os, "scandir", scandir)
            files = await model.files()
            assert WEIGHTS in [file.name for file in files]
            for file in files:
                expected = (origin / file.name).read_bytes()
                assert await given(model, file) == expected
                assert await given(model, file, len(expected) // 2) == expected[len(expected) // 2 :]
        finally:
            monkeypatch.undo()
            await model.close()


async def test_what_is_gone_unknown_or_another_is_not_given(origin: Path) -> None:
    async with house(origin) as node:
        model, weights = await held(node, "ssd")
        try:
            known = {file.name: file for file in await model.files()}
            with pytest.raises(SourceMissing, match="no file other"):
                await given(model, SourceFile("other.json", 5))
            with pytest.raises(SourceChanged):
                await given(model, SourceFile(WEIGHTS, known[WEIGHTS].size_bytes, "another"))
            (weights / WEIGHTS).rename(weights / "away")
            with pytest.raises(SourceMissing, match=WEIGHTS):
                await given(model, known[WEIGHTS])
            (weights / WEIGHTS).mkdir()
            with pytest.raises(SourceMissing, match=WEIGHTS):
                await given(model, known[WEIGHTS])
            (weights / WEIGHTS).rmdir()
            (weights / "away").rename(weights / WEIGHTS)
            assert await given(model, known[WEIGHTS]) == (origin / WEIGHTS).read_bytes()
        finally:
            await model.close()
