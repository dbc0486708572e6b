"""What this node gives to others: the models that are registered here, from where their bytes are at that moment.

A folder is read as it is. Of a model that came from elsewhere, what is small comes from its card, and the weights from
the SSD or from host memory; while neither has them whole, the node does not hold it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from sllm_actor.actors.registry import Registry
from sllm_actor.checkpoint.manifest import read_manifest
from sllm_actor.domain import ModelName
from sllm_actor.errors import CheckpointInvalid, ModelNotFound, SourceChanged, SourceMissing
from sllm_actor.loader.cards import Card
from sllm_actor.loader.holder import OTHER_NODE
from sllm_actor.loader.mapping import HostFile
from sllm_actor.loader.tiers import Tiers
from sllm_actor.runtime.threads import on_thread
from sllm_actor.sources.holdings import Held, HeldFolder
from sllm_actor.sources.local import FolderSource
from sllm_actor.sources.source import SourceFile


class HeldCard:
    """A model from elsewhere. Its validators name its content, so that they hold wherever it lies."""

    def __init__(self, card: Card, ssd: Path | None, pool: memoryview, chunk_bytes: int, files: tuple[HostFile, ...]):
        self._card = card
        self._small = FolderSource(card.checkpoint.path)
        self._ssd = None if ssd is None else FolderSource(ssd)
        self._pool = pool
        self._chunk_bytes = chunk_bytes
        self._in_memory = {file.name: file.chunks for file in files}

    async def model_id(self) -> str:
        return self._card.model_id

    async def files(self) -> tuple[SourceFile, ...]:
        return tuple(self._described(file) for file in self._given().values())

    def _given(self) -> dict[str, SourceFile]:
        """What there is of the files that were listed: not the weights that the checkpoint does not use."""
        held = self._card.small_paths().keys() | {file.name for file in self._card.checkpoint.files}
        return {name: file for name, file in self._card.files.items() if name in held}

    def _described(self, file: SourceFile) -> SourceFile:
        return SourceFile(file.name, file.size_bytes, self._card.checkpoint.identity)

    async def read(self, file: SourceFile, offset: int, into: memoryview) -> None:
        known = self._given().get(file.name)
        if known is None:
            raise SourceMissing(f"it has no file {file.name}", param="source")
        if file != self._described(known):
            raise SourceChanged(f"{file.name} is no longer the one that was listed")
        if file.name in self._card.small_paths():
            await self._small.read(await self._small.find(file.name), offset, into)
        elif self._ssd is not None:
            await self._ssd.read(await self._ssd.find(file.name), offset, into)
        else:
            await on_thread(self._copy, self._in_memory[file.name], offset, into)

    def _copy(self, chunks: tuple[int, ...], offset: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            index, within = divmod(offset + done, self._chunk_bytes)
            length = min(self._chunk_bytes - within, len(into) - done)
            begin = chunks[index] * self._chunk_bytes + within
            into[done : done + length] = self._pool[begin : begin + length]
            done += length

    async def close(self) -> None:
        await self._small.close()
        if self._ssd is not None:
            await self._ssd.close()
        self._pool.release()


class RegisteredModels:
    """Holdings of what is registered here, under its names."""

    def __init__(self, registry: Registry, tiers: Tiers) -> None:
        self._registry = registry
        self._tiers = tiers

    @asynccontextmanager
    async def hold(self, model: str) -> AsyncIterator[Held]:
        try:
            registered = self._registry.find(ModelName(model))
        except ModelNotFound as wrong:
            # Others ask by the id that they know it by.
            names = self._registry.names_by_model_id().get(model)
            if names is None:
                raise SourceMissing(wrong.message, param="source") from None
            registered = self._registry.find(ModelName(names[0]))
        wanted = await self._registry.wanted(registered)
        if not isinstance(wanted, Card):
            yield HeldFolder(Path(registered.path), _model_id)
            return
        ssd = self._tiers.ssd.lease(wanted.model_id, OTHER_NODE) if self._tiers.is_on_ssd(wanted) else None
        lease = None if ssd is not None else self._tiers.loader.lease_resident(wanted.checkpoint, OTHER_NODE)
        if ssd is None and lease is None:
            raise SourceMissing(f"this node does not have the bytes of {model} at the moment", param="source")
        try:
            loader = self._tiers.loader
            held = HeldCard(
                wanted,
                None if ssd is None else ssd.path,
                await loader.memory(),
                loader.chunk_bytes,
                () if lease is None else lease.files,
            )
            try:
                yield held
            finally:
                await asyncio.shield(held.close())
        finally:
            for part in (ssd, lease):
                if part is not None:
                    part.release()


def _model_id(folder: Path) -> str:
    """Give the digest that a converted checkpoint has of itself."""
    try:
        manifest = read_manifest(folder)
    except CheckpointInvalid:
        # It is for whoever reads the files to find out.
        return ""
    return manifest.model_id if manifest is not None else ""
