"""Carries out what operators ask of this node as a whole."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from sllm_actor.actors.instance import WORKERS
from sllm_actor.actors.place import Place
from sllm_actor.errors import SllmError
from sllm_actor.messages.instances import InstanceStatus, ListInstances, StopInstances
from sllm_actor.messages.migration import MoveAway
from sllm_actor.messages.operations import CordonNode, DrainNode, StopEverything
from sllm_actor.messages.placement import ReportNow
from sllm_actor.metadata import Store
from sllm_actor.runtime import Actor, ActorRef, handles

log = logging.getLogger(__name__)

NODE_KEEPER = "node-keeper"
COORDINATOR = "migration-coordinator"
CORDONS = "cordons/"


class NodeKeeper(Actor):
    """Owns whether the node is cordoned."""

    def __init__(self, place: Place, store: Store, manager: ActorRef, *, ask_timeout_s: float, stop_timeout_s: float):
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
        return await self._stop_instances()

    @handles(StopEverything, concurrent=True)
    async def stop_everything(self, _: StopEverything) -> int:
        return await self._stop_instances()

    async def _stop_instances(self) -> int:
        """Stop all, also those that come up meanwhile: what was placed before this node was cordoned.

        What they answer goes on elsewhere, where it can; each is stopped when it has nothing more.
        """
        stopped = 0
        while True:
            running: tuple[InstanceStatus, ...] = await self._ask(ListInstances(), self._ask_timeout_s)
            if not running:
                return stopped
            each = [StopInstances(model=one.model, instance_id=one.instance_id) for one in running]
            counts, _ = await asyncio.gather(
                asyncio.gather(*(self._ask(one, self._stop_timeout_s) for one in each)),
                asyncio.gather(*(self._move_away(one.instance_id) for one in running)),
            )
            stopped += sum(counts)

    async def _move_away(self, instance_id: str) -> None:
        message = MoveAway(worker=f"{WORKERS}{instance_id}", instance_id=instance_id)
        try:
            await self.context.system.ref(COORDINATOR).ask(message, timeout_s=self._stop_timeout_s)
        except SllmError as error:
            log.warning("the requests of %s end here: %s", instance_id, error)

    async def _ask(self, message: object, timeout_s: float) -> Any:
        return await self._manager.ask(message, timeout_s=timeout_s)
