"""A download that knows of nobody, as a process: `python -m benchmarks.interference_writer writer FOLDER SIZE BLOCK`.

It writes blocks at full speed past the page cache, over a scratch file in the folder that the checkpoints lie in.
"""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.actors_process import Commands, serve
from sllm_actor.loader.scratch import Scratch, Writers


class Download:
    """The commands of the process."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._writers: Writers | None = None

    async def begin(self, threads: int) -> None:
        """Begin to write, and return when the first block is written."""
        self._writers = Writers(self._scratch, threads)
        self._writers.start()
        self._writers.until_begun()

    async def look(self) -> list[float]:
        """Give the bytes written since `begin`, and the moment."""
        assert self._writers is not None
        return [self._writers.written_bytes, time.monotonic()]

    async def end(self) -> None:
        """Write no more."""
        assert self._writers is not None
        self._writers.stop()
        self._writers.check()


async def writer(folder: str, size_bytes: str, block_bytes: str) -> tuple[None, Commands]:
    """Take the room for the scratch file."""
    made = Download(Scratch(Path(folder), int(size_bytes), int(block_bytes)))
    return None, {"begin": made.begin, "look": made.look, "end": made.end}


if __name__ == "__main__":
    serve(writer=writer)
