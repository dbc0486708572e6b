"""The load format `sllm` of vLLM: weights out of a host pool into a vLLM model.

Of a node's pool, where its files lie already; else of one of its own, into which our loader reads the model's folder.
As of vLLM v0.33.0.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from vllm.model_executor.model_loader import BaseModelLoader

from sllm_actor.checkpoint.folder import Checkpoint, read_folder
from sllm_actor.checkpoint.layout import is_pad
from sllm_actor.engine.mapped_tensors import VIEWED_DTYPES, tensors_of
from sllm_actor.engine.vllm_options import LoaderConfig, PooledWeights
from sllm_actor.errors import BackendInvalid, CheckpointInvalid, ConfigInvalid
from sllm_actor.loader.loader import Loader
from sllm_actor.loader.mapping import HostFile, InPlace, map_files
from sllm_actor.messages.engine import PooledFile
from sllm_actor.runtime.clock import SystemClock


class SllmModelLoader(BaseModelLoader):  # type: ignore[misc]
    """Gives a vLLM model its weights as views of mapped memory, which it copies to where it computes."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        try:
            self._config = msgspec.convert(load_config.model_loader_extra_config, LoaderConfig)
        except msgspec.ValidationError as error:
            raise ConfigInvalid(f"model_loader_extra_config: {error}", param="model_loader_extra_config") from None

    def download_model(self, model_config: Any) -> None:
        """Look whether all is there: models come to a node by its sources, and here by nobody."""
        if not self._config.pool:
            _folder_of(model_config)

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Give the model its weights, and hold it to having taken one for each parameter."""
        if self._config.pool:
            with _of_node(self._config) as (files, mapped):
                loaded = model.load_weights(_weights(files, mapped, self._config.aliases))
        else:
            loaded = _in_a_pool_of_its_own(_folder_of(model_config), self._config, model.load_weights)
        # Where weights are quantized, not every parameter has a tensor of its name.
        if loaded is not None and model_config.quantization is None:
            missing = {name for name, _ in model.named_parameters()} - set(loaded)
            if missing:
                raise CheckpointInvalid(f"{len(missing)} weights are not in the checkpoint: {min(missing)}")


def _folder_of(model_config: Any) -> Checkpoint:
    named = Path(model_config.model)
    if not named.is_dir():
        raise BackendInvalid(f"the load format sllm reads folders, and {model_config.model} is none", param="model")
    checkpoint = read_folder(named)
    if checkpoint.ranks > 1:
        raise BackendInvalid(f"{named} is split for {checkpoint.ranks} ranks", param="model")
    return checkpoint


@contextmanager
def _of_node(config: LoaderConfig) -> Iterator[tuple[list[PooledFile], Mapping[str, memoryview]]]:
    """Map what lies in a node's pool."""
    files = [_host_file(file) for file in config.files]
    pool_fd = os.open(config.pool, os.O_RDWR | os.O_CLOEXEC)
    try:
        mapped = map_files(pool_fd, config.chunk_bytes, files, populate=config.reading_threads)
    finally:
        os.close(pool_fd)
    with mapped:
        yield _named(files), {file.name: buffer for file, buffer in zip(files, mapped.buffers, strict=True)}


def _host_file(file: PooledWeights) -> HostFile:
    if file.path:
        return HostFile(file.name, file.size_bytes, (), InPlace(file.path, file.mtime_ns, file.inode))
    return HostFile(file.name, file.size_bytes, tuple(file.chunks))


def _named(files: Iterable[HostFile]) -> list[PooledFile]:
    return [PooledFile(name=file.name, size_bytes=file.size_bytes) for file in files]


def _weights(
    files: Sequence[PooledFile], mapped: Mapping[str, memoryview], aliases: Mapping[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Give every tensor by the order of its bytes, and again under each other name that it has."""
    tensors, owner = tensors_of(files, mapped)
    others: dict[str, list[str]] = {}
    for alias, stored in aliases.items():
        others.setdefault(stored, []).append(alias)
    for tensor in tensors:
        if is_pad(tensor.name):
            continue
        if tensor.dtype not in VIEWED_DTYPES:
            raise BackendInvalid(f"{tensor.name} is stored as {tensor.dtype}, which torch has no view of")
        view = owner[tensor.name].view(tensor)
        for name in (tensor.name, *others.get(tensor.name, ())):
            yield name, view


def _in_a_pool_of_its_own(checkpoint: Checkpoint, config: LoaderConfig, load: Any) -> Any:
    async def read() -> Any:
        chunks = sum(-(-file.size_bytes // config.chunk_bytes) for file in checkpoint.files)
        loader = await Loader.open(
            pool_bytes=chunks * config.chunk_bytes,
            chunk_bytes=config.chunk_bytes,
            reading_threads=config.reading_threads,
            clock=SystemClock(),
        )
        try:
            lease = await loader.lease(checkpoint)
            with map_files(loader.pool_fd, loader.chunk_bytes, lease.files) as mapped:
                buffers = {file.name: buffer for file, buffer in zip(lease.files, mapped.buffers, strict=True)}
                loaded = load(_weights(_named(lease.files), buffers, checkpoint.aliases))
                buffers.clear()
            lease.release()
            return loaded
        finally:
            await loader.close()

    # vLLM may have a loop of its own on this thread.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, read()).result()
