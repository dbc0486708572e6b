"""One load of a checkpoint from its sources, and those who wait for it: in host memory, or on devices of theirs."""

from __future__ import annotations

import asyncio
import logging

from sllm_actor.errors import SllmError
from sllm_actor.loader.copying import Copying
from sllm_actor.loader.fetch import Fetch
from sllm_actor.loader.lease import HostLease
from sllm_actor.loader.loads import OnProgress
from sllm_actor.loader.mapping import HostFile
from sllm_actor.loader.order import OnPlaced, Order

log = logging.getLogger(__name__)


class Waiter:
    """One who waits for a load, and what he is told meanwhile; `copying` is how his devices get it."""

    def __init__(self, order: Order) -> None:
        self.on_placed: OnPlaced | None = order.on_placed
        self.on_progress: OnProgress | None = None if order.targets else order.on_progress
        self.copying: Copying | None = None
        if order.targets:
            self.copying = Copying(order.checkpoint, order.targets, order.priority, order.on_progress)

    @property
    def is_copied_to(self) -> bool:
        """Whether his devices get each chunk as it arrives."""
        return self.copying is not None and self.copying.begun


class SharedLoad:
    """A load under way. Its `task` gives a lease of its own, or None where there was nothing to fetch any more."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.arrived_bytes = 0
        self.abandoned = False
        self.task: asyncio.Task[HostLease | None]
        self._waiters: list[Waiter] = []
        self._watching: list[OnProgress] = []
        self._files: tuple[HostFile, ...] | None = None
        self._fetch: Fetch | None = None
        self._goes_through = False

    @property
    def wants_devices(self) -> bool:
        """Whether somebody waits for it on a device."""
        return any(waiter.copying is not None for waiter in self._waiters)

    def start(self, task: asyncio.Task[HostLease | None]) -> None:
        """Be told of the task that does it."""
        self.task = task
        task.add_done_callback(self._ended)

    def join(self, order: Order) -> Waiter:
        """Wait for it, too; `leave` it, however it ends."""
        waiter = Waiter(order)
        self._waiters.append(waiter)
        try:
            if waiter.on_placed is not None and self._files is not None:
                waiter.on_placed(self._files)
            if waiter.copying is not None and self._fetch is not None:
                self._fetch.follow(waiter.copying)
        except BaseException:
            self.leave(waiter)
            raise
        return waiter

    def watch(self, on_progress: OnProgress) -> None:
        """Be told how far it is, to its end, without waiting for it."""
        self._watching.append(on_progress)

    def leave(self, waiter: Waiter) -> None:
        """Wait no more. A load that nobody waits for ends, or gives back what it has brought."""
        self._waiters.remove(waiter)
        if self._waiters and not (self._goes_through and not any(each.is_copied_to for each in self._waiters)):
            return
        self.abandoned = True
        if not self.task.done():
            self.task.cancel()
        elif not self._waiters and not self.task.cancelled() and self.task.exception() is None:
            lease = self.task.result()
            if lease is not None:
                lease.release()

    async def wait(self, waiter: Waiter) -> None:
        """Wait for its end, and until all is on the waiter's devices; at most until these have failed."""
        waiting: list[asyncio.Future[object]] = [self.task]  # type: ignore[list-item]
        if waiter.copying is not None:
            waiting.append(waiter.copying.done)  # type: ignore[arg-type]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)

    def fetching(self, fetch: Fetch, *, goes_through: bool) -> None:
        """Be told that bytes are about to come, and where they only go through."""
        self._fetch, self._goes_through = fetch, goes_through
        for waiter in self._waiters:
            if waiter.copying is not None:
                fetch.follow(waiter.copying)

    def placed(self, files: tuple[HostFile, ...]) -> None:
        """Be told where the files will lie."""
        self._files = files
        for waiter in self._waiters:
            if waiter.on_placed is None:
                continue
            try:
                waiter.on_placed(files)
            except SllmError as wrong:
                # The engine of one who waits has died, which he will hear of; the load is not his alone.
                log.warning("an engine can't be told where its weights will lie: %s", wrong)

    def arrived(self, size_bytes: int) -> None:
        """Be told that more has arrived."""
        self.arrived_bytes += size_bytes
        waiting = [waiter.on_progress for waiter in self._waiters if waiter.on_progress is not None]
        for tell in (*waiting, *self._watching):
            # On its own turn of the loop, so that its failure is not ours.
            asyncio.get_running_loop().call_soon(tell, self.arrived_bytes, self.size_bytes)

    def _ended(self, task: asyncio.Task[HostLease | None]) -> None:
        """Let go of copies to which nothing comes any more."""
        brought = not task.cancelled() and task.exception() is None and task.result() is not None
        for waiter in self._waiters:
            if waiter.copying is not None and not (brought and waiter.copying.begun):
                waiter.copying.give_up()
