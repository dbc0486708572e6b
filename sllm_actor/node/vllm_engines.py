"""Engine processes that are vLLM's: programs of their own, in an environment of their own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version

import msgspec

from sllm_actor.config import Config
from sllm_actor.engine.client import Engine
from sllm_actor.engine.vllm_options import VllmOptions
from sllm_actor.errors import BackendInvalid
from sllm_actor.runtime.spawning import Spawned, spawn

MODULE = "sllm_actor.node.vllm_child"


class VllmEngines:
    """Starts a process for each that is asked for: none is kept warm. Belongs to one event loop."""

    def __init__(self, config: Config, pool_fd: int) -> None:
        self._python = config.vllm_python
        self._pool_fd = pool_fd
        self._max_frame_bytes = config.max_frame_bytes
        self._options = VllmOptions(gpu_memory_percent=config.vllm_gpu_memory_percent, eager=config.vllm_eager)

    async def take(self) -> Engine:
        """Start one; it imports vLLM while it is told what to do.

        Raises:
            BackendInvalid: this node has no vLLM.
            EngineStartFailed: its Python can't be started.
        """
        if not self._python:
            raise BackendInvalid("this node has no vLLM: set vllm_python to a Python that has it", param="backend")
        return await Engine.open(self._spawn, self._pool_fd, self._max_frame_bytes)

    async def _spawn(self, fds: Sequence[int]) -> Spawned:
        options = msgspec.json.encode(self._options).decode()
        told = [*map(str, fds), str(self._max_frame_bytes), version("sllm_actor"), options]
        return spawn([os.path.expanduser(self._python), "-P", "-m", MODULE, *told], fds, os.environ)
