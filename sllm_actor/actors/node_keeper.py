"""Carries out what operators ask of this node as a whole."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from sllm_actor.actors.instance import WORKERS
from sllm_actor.actors.place import Place
from sllm_actor.errors import SllmError
from sllm_actor.messages.instances import EndStarts, InstanceStatus, ListInstances, StopInstances
from sllm_actor.messages.migration import MoveAway
from sllm_actor.messages.operations import CordonNode, DrainNode, NoticeNode, NoticeTaken, StopEverything
from sllm_actor.messages.placement import ReportNow
from sllm_actor.metadata import Store
from sllm_actor.runtime import Actor, ActorRef, Clock, handles

log = logging.getLogger(__name__)

NODE_KEEPER = "node-keeper"
COORDINATOR = "migration-coordinator"
CORDONS = "cordons/"
# Before it looks again at what neither stops nor ends.
PAUSE_S = 0.1


class Emptied:
    """How far a node is in becoming empty: instances stopped, and answers that went on elsewhere."""

    def __init__(self) -> None:
        self.stopped = 0
        self.moved = 0


class NodeKeeper(Actor):
    """Owns whether the node is cordoned."""

    def __init__(
        self, place: Place, store: Store, manager: ActorRef, clock: Clock, *, ask_timeout_s: float,
        stop_timeout_s: float,
    ) -> None:  # fmt: skip
        self._clock = clock
        self._place = place
        self._store = store
        self._key = CORDONS + place.node
        self._manager = manager
        self._ask_timeout_s = ask_timeout_s
        self._stop_timeout_s = stop_timeout_s

    async def started(self) -> None:
        self._tell(await self._store.get(self._key) is not None)

    def _tell(self, cordoned: bool) -> None:
        if cordoned != self._place.cordoned:
            self._place.cordoned = cordoned
            self._manager.tell(ReportNow())

    @handles(CordonNode, concurrent=True)
    async def cordon(self, message: CordonNode) -> None:
        if message.cordoned:
            await self._store.put(self._key, b"")
        else:
            await self._store.delete(self._key)
        self._tell(message.cordoned)

    @handles(DrainNode, concurrent=True)
    async def drain(self, _: DrainNode) -> int:
        await self._store.put(self._key, b"")
        self._tell(True)
        emptying = Emptied()
        await self._empty(emptying)
        return emptying.stopped

    @handles(NoticeNode, concurrent=True)
    async def notice(self, message: NoticeNode) -> NoticeTaken:
        """Do as for a drain, for so long; what is left then ends with the node, and goes on from its Router's log."""
        await self._store.put(self._key, b"")
        self._tell(True)
        emptying = Emptied()
        try:
            async with asyncio.timeout(message.seconds):
                await self._empty(emptying)
        except TimeoutError:
            log.warning("the notice of %g s is over, and not everything has left this node", message.seconds)
        left: tuple[InstanceStatus, ...] = await self._ask(ListInstances(), self._ask_timeout_s)
        return NoticeTaken(moved=emptying.moved, stopped=emptying.stopped, left=sum(one.active for one in left))

    @handles(StopEverything, concurrent=True)
    async def stop_everything(self, _: StopEverything) -> int:
        emptying = Emptied()
        await self._empty(emptying)
        return emptying.stopped

    async def _empty(self, emptied: Emptied) -> None:
        """Stop all instances; those that are being started are given up, and may come up elsewhere.

        What they answer goes on elsewhere, where it can; each is stopped when it has nothing more.
        """
        while True:
            starts: int = await self._ask(EndStarts(), self._ask_timeout_s)
            running: tuple[InstanceStatus, ...] = await self._ask(ListInstances(), self._ask_timeout_s)
            if not running and not starts:
                return
            before = emptied.stopped
            await asyncio.gather(*(self._stop(one, emptied) for one in running))
            if emptied.stopped == before:
                await self._clock.sleep(PAUSE_S)

    async def _stop(self, one: InstanceStatus, emptied: Emptied) -> None:
        stop = StopInstances(model=one.model, instance_id=one.instance_id)
        stopped, moved = await asyncio.gather(self._ask(stop, self._stop_timeout_s), self._move_away(one.instance_id))
        emptied.stopped += stopped
        emptied.moved += moved

    async def _move_away(self, instance_id: str) -> int:
        message = MoveAway(worker=f"{WORKERS}{instance_id}", instance_id=instance_id)
        try:
            moved: int = await self.context.system.ref(COORDINATOR).ask(message, timeout_s=self._stop_timeout_s)
        except SllmError as error:
            log.warning("the requests of %s end here: %s", instance_id, error)
            return 0
        return moved

    async def _ask(self, message: object, timeout_s: float) -> Any:
        return await self._manager.ask(message, timeout_s=timeout_s)
