"""Chunks on their way from the host pool to one caller's devices, as they arrive from elsewhere.

Each caller has his own: what his device does wrong is his alone, and neither the network nor the SSD waits for it. A
few chunks at a time go to each buffer; those that wait lie in the pool.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping

from sllm_actor.checkpoint.folder import Checkpoint
from sllm_actor.loader.chunk_place import ChunkPlace
from sllm_actor.loader.lease import DeviceTarget
from sllm_actor.loader.loads import OnProgress
from sllm_actor.loader.reservation import Reservation
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.runtime.threads import to_the_end

# How many chunks are on their way to one buffer: enough for the streams of its device.
_COPIES_AT_ONCE = 4


class _Lane:
    """What goes to one buffer."""

    def __init__(self) -> None:
        self.waiting: deque[ChunkPlace] = deque()
        self.under_way = 0


class Copying:
    """The copies of one checkpoint to one caller's targets. `close` it, however it ends."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        targets: Mapping[str, DeviceTarget],
        priority: int,
        on_progress: OnProgress | None,
    ) -> None:
        numbers = {file.name: number for number, file in enumerate(checkpoint.files)}
        self._checkpoint = checkpoint
        self._targets = {numbers[name]: target for name, target in targets.items()}
        self._lanes = {target.buffer: _Lane() for target in targets.values()}
        self._priority = priority
        self._on_progress = on_progress
        self._total_bytes = sum(checkpoint.files[number].size_bytes for number in self._targets)
        self._copied_bytes = 0
        self._scope = TaskScope("copying")
        self._reserved: Reservation | None = None
        # Done with the bytes that were copied; failed with what the device said; cancelled where nothing comes.
        self.done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @property
    def begun(self) -> bool:
        """Whether chunks are given to it: it then needs all of them."""
        return self._reserved is not None

    @property
    def takes_more(self) -> bool:
        """Whether it still copies what arrives."""
        return not self.done.done()

    def begin(self, reserved: Reservation) -> None:
        """Copy from there what is put; it is kept there until `close`."""
        assert self._reserved is None, "it begins once"
        self._reserved = reserved
        reserved.use()

    def put(self, chunk: ChunkPlace) -> None:
        """Copy a chunk that has arrived and been checked, while it `takes_more`."""
        assert self._reserved is not None, "it has begun"
        target = self._targets.get(chunk.file)
        if target is None:
            self._reserved.leave(chunk)
            return
        lane = self._lanes[target.buffer]
        lane.waiting.append(chunk)
        self._go_on(lane)

    def give_up(self) -> None:
        """Begin no more copies: nothing more comes, or nobody wants it."""
        self.done.cancel()
        self._drop_waiting()

    async def close(self) -> None:
        """Give up and wait until nothing is sent to the targets any more that is not on its way; they may be closed."""
        self.give_up()
        tasks = self._scope.tasks()
        for task in tasks:
            task.cancel()
        try:
            await to_the_end(asyncio.gather(*tasks, return_exceptions=True))
        finally:
            if not self.done.cancelled():
                self.done.exception()  # Nobody may have asked.
            if self._reserved is not None:
                self._reserved.forget()

    def _go_on(self, lane: _Lane) -> None:
        while lane.waiting and lane.under_way < _COPIES_AT_ONCE:
            chunk = lane.waiting.popleft()
            lane.under_way += 1
            self._scope.spawn(self._copy(lane, chunk), f"copy-{chunk.file}-{chunk.chunk}", on_failure=self._failed)

    async def _copy(self, lane: _Lane, chunk: ChunkPlace) -> None:
        assert self._reserved is not None
        try:
            copied_bytes = await self._reserved.copy(chunk, self._targets[chunk.file], self._priority)
        finally:
            lane.under_way -= 1
        if self.takes_more:
            self._count(copied_bytes)
            self._go_on(lane)

    def _count(self, copied_bytes: int) -> None:
        self._copied_bytes += copied_bytes
        if self._on_progress is not None:
            # On its own turn of the loop, so that its failure is not ours.
            asyncio.get_running_loop().call_soon(self._on_progress, self._copied_bytes, self._total_bytes)
        if self._copied_bytes == self._total_bytes:
            self.done.set_result(self._copied_bytes)

    def _failed(self, wrong: BaseException) -> None:
        if self.takes_more:
            self.done.set_exception(wrong)
            self._drop_waiting()

    def _drop_waiting(self) -> None:
        for lane in self._lanes.values():
            while lane.waiting:
                assert self._reserved is not None
                self._reserved.leave(lane.waiting.popleft())
