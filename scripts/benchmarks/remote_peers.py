"""What people do today with a model that is not here: huggingface_hub's download, and from_pretrained after it.

A child, `python -m benchmarks.remote_peers warm CACHE`, has imported everything before it is asked. `… fresh CACHE URL`
is the whole of a new process, which prints when it had the model. What was downloaded is synced, as with a plain
download.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.actors_process import Commands, serve
from benchmarks.remote_origin import REPOSITORY


def _download_then_load(cache: Path, url: str) -> dict[str, Any]:
    # Here, so that a new process pays for them when it begins, and a warm one before it is asked.
    from huggingface_hub import snapshot_download
    from transformers import AutoModelForCausalLM

    begun_s = time.monotonic()
    folder = Path(snapshot_download(REPOSITORY, endpoint=url, cache_dir=cache, token=False))
    arrived_s = time.monotonic()
    size_bytes = 0
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        size_bytes += os.fstat(descriptor).st_size
        os.close(descriptor)
    synced_s = time.monotonic()
    AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    ended_s = time.monotonic()
    return {
        "s": ended_s - begun_s,
        "arrived_s": arrived_s - begun_s,
        "sync_s": synced_s - arrived_s,
        "load_s": ended_s - synced_s,
        "ended_s": ended_s,
        "size_bytes": size_bytes,
    }


async def warm(cache: str) -> tuple[None, Commands]:
    """Be a process that has imported torch and transformers."""
    import huggingface_hub  # noqa: F401
    import transformers.models.opt.modeling_opt  # noqa: F401

    async def download_then_load(url: str) -> dict[str, Any]:
        """Time both, from an empty cache."""
        shutil.rmtree(cache, ignore_errors=True)
        return _download_then_load(Path(cache), url)

    return None, {"download_then_load": download_then_load}


if __name__ == "__main__":
    if sys.argv[1] == "fresh":
        print(json.dumps(_download_then_load(Path(sys.argv[2]), sys.argv[3])))
    else:
        serve(warm=warm)
