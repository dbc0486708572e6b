"""What an operator says of vLLM's engine, and how its weights are named to it. Free of vLLM."""

from __future__ import annotations

import msgspec

LOAD_FORMAT = "sllm"


class VllmOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`gpu_memory_percent` is what an instance takes of its device; `eager` has nothing compiled or captured."""

    gpu_memory_percent: int
    eager: bool


class PooledWeights(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file in the host pool, as `PooledFile`, in what vLLM hands through to a loader: JSON and nothing else."""

    name: str
    size_bytes: int
    chunks: list[int] = []
    path: str = ""
    mtime_ns: int = 0
    inode: int = 0


class LoaderConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`model_loader_extra_config` of the load format `sllm`.

    With a `pool`, the path of a node's host pool, `files` lie in it already. Without one the model's folder is read
    into a pool of the loader's own. `aliases` has the stored name of each tensor that is stored under another one.
    """

    pool: str = ""
    chunk_bytes: int = 16 * 1024 * 1024
    reading_threads: int = 4
    files: list[PooledWeights] = []
    aliases: dict[str, str] = {}
