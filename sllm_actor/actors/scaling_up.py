"""Places the further instances that an Autoscaler misses, and has those leave that are too many."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Set
from contextlib import suppress
from typing import Any, cast

import msgspec

from sllm_actor.actors.autoscaler import Autoscaler
from sllm_actor.actors.fetching import Fetching
from sllm_actor.actors.granted_starts import GrantedStarts
from sllm_actor.actors.rooms import Waiting
from sllm_actor.actors.waiting_starts import WaitingStarts
from sllm_actor.domain import ModelName, NodeId
from sllm_actor.messages.placement import InstanceView, NodeChange, NodeReport, Placement, PlaceModel
from sllm_actor.policy.bytes_first import places
from sllm_actor.policy.cluster_view import ClusterView
from sllm_actor.policy.placement import QUIET, Decision, Evict, Start, Wait
from sllm_actor.runtime import ActorContext, Clock

# How often it looks at all models, and how often at most where more is asked of some than their instances take.
LOOK_EVERY_S = 0.5
LOOK_LEAST_S = 0.05
# Of the models that were called so many may find no place before the others are left for when all are looked at.
IN_VAIN = 8


class ScalingUp:
    """Belongs to one Scheduler, which decides, grants, gives up and evicts, and says when it `may_look`."""

    def __init__(
        self,
        context: ActorContext,
        view: ClusterView,
        clock: Clock,
        autoscaler: Autoscaler,
        waiting: WaitingStarts,
        granted: GrantedStarts,
        fetching: Fetching,
        *,
        decide: Callable[[Waiting, float], Decision],
        grant: Callable[[Waiting, Start, float], Placement],
        give_up: Callable[[Waiting, Evict], None],
        evict: Callable[[NodeReport, InstanceView], None],
        may_look: Callable[[float], bool],
    ) -> None:
        self._context = context
        self._view = view
        self._clock = clock
        self._autoscaler = autoscaler
        self._waiting = waiting
        self._granted = granted
        self._fetching = fetching
        self._decide = decide
        self._grant = grant
        self._give_up = give_up
        self._evict = evict
        self._may_look = may_look
        # The models that are to be looked at soon; those that lack an instance which has no place yet; and since when
        # some of these have let places go for better ones.
        self._called = set[ModelName]()
        self._placeless = set[ModelName]()
        self._stood_back: dict[ModelName, float] = {}
        self._is_called = asyncio.Event()

    def asked(self, models: Set[ModelName]) -> None:
        """Hear that more may be asked of these, or may wait for their start: at once, where it is too much for one."""
        # Who has no place waits for one, and not to be asked for more.
        asking = self._waiting.asking(self._view.awaited, models - self._placeless)
        if called := self._autoscaler.calling(self._view, asking):
            self._called |= called
            self._is_called.set()

    def hear(self, told: NodeReport | NodeChange) -> None:
        """Hear what a node's instances work on, and who waits there: that may be too much for one instance.

        Where there may be a place, models that have none are looked at again.
        """
        self.asked({*(told.awaited or ()), *(one.model for one in told.instances if one.active)})
        if (self._placeless or self._called) and _has_place(told):
            self._called |= self._placeless
            self._is_called.set()

    async def keep_looking(self) -> None:
        """Look again and again, and sooner at those of which more is asked."""
        whole_s = self._clock.monotonic_s() + LOOK_EVERY_S
        while True:
            await self._clock.sleep(LOOK_LEAST_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(whole_s - self._clock.monotonic_s()):
                    await self._is_called.wait()
            self._is_called.clear()
            now_s = self._clock.monotonic_s()
            is_whole = now_s >= whole_s
            if self._may_look(now_s):
                called, self._called = self._called, set()
                self._look(now_s, None if is_whole else called)
            if is_whole:
                whole_s = now_s + LOOK_EVERY_S
                self._end_surplus()

    def _end_surplus(self) -> None:
        for one in self._autoscaler.surplus(self._view):
            report = self._view.nodes[one.node].report
            self._view.give_up(one.node, [one.instance.instance_id])
            self._evict(report, one.instance)

    def _look(self, now_s: float, only: Set[ModelName] | None) -> None:
        """Start what is missing, or have its bytes fetched; what is on its way already is looked at anew each time."""
        autoscaler, awaited = self._autoscaler, self._waiting.asking(self._view.awaited, only)
        full, coming = set[ModelName](), Counter[tuple[ModelName, NodeId]]()
        placeless, standing_back = set[ModelName](), set[ModelName]()
        ahead = self._waiting.standing_back
        starting, fetched = self._granted.counts(), self._fetching.models()
        for question in autoscaler.missing(self._view, awaited, starting, fetched, only):
            if question.model in full or question.model in standing_back:
                continue
            if only is not None and len(full) == IN_VAIN:
                placeless.add(question.model)
                continue
            wish, decision = self._decided(question, now_s, ahead + len(standing_back))
            if not isinstance(decision, Start | Evict) or self._fetching.come_first(decision):
                node = self._room_beside(question.model, coming)
                if node is None and isinstance(decision, Start | Evict):
                    node = decision.report.node if self._fetching.begin(question, decision, now_s) else None
                if node is not None:
                    coming[question.model, node] += 1
                    continue
            if isinstance(decision, Start):
                self._stood_back.pop(question.model, None)
                placement = self._grant(wish, decision, now_s)
                start = autoscaler.start(self._context.system, placement, question.model)
                self._context.tasks.spawn(start, f"start-{placement.placement_id}")
                continue
            placeless.add(question.model)
            if isinstance(decision, Evict):
                self._give_up(wish, decision)
            elif wish.stands_back:
                self._stood_back[question.model] = wish.stood_back_from_s
                standing_back.add(question.model)
            else:
                full.add(question.model)
        self._placeless = placeless if only is None else placeless | (self._placeless - only)
        self._stood_back = {model: from_s for model, from_s in self._stood_back.items() if model in self._placeless}

    def _decided(self, question: PlaceModel, now_s: float, ahead: int) -> tuple[Waiting, Decision]:
        """Decide where one starts: on a node that has none of it; where there is none, beside another.

        Where the bytes are on their way, nothing starts before they are about to be there.
        """
        fetching = self._fetching.nodes(question.model)
        for not_on in dict.fromkeys((question.not_on, ())):
            asked = msgspec.structs.replace(cast(Any, question), not_on=(*not_on, *fetching))
            wish = Waiting(asked, now_s, QUIET)
            wish.ahead = ahead
            wish.stood_back_from_s = self._stood_back.get(question.model, 0.0)
            decision = self._decide(wish, now_s)
            wish.note(decision, now_s)
            if wish.stands_back or not isinstance(decision, Wait):
                break
        return wish, decision

    def _room_beside(self, model: ModelName, coming: Counter[tuple[ModelName, NodeId]]) -> NodeId | None:
        """Find a node that fetches the model and has a place for one more than those that are to start there."""
        for node in self._fetching.nodes(model):
            if coming[model, node] < places(self._view.nodes[node]):
                return node
        return None


def _has_place(told: NodeReport | NodeChange) -> bool:
    """Tell whether an instance is idle there, or a slot free."""
    if not all(one.active for one in told.instances):
        return True
    if isinstance(told, NodeChange):
        return False
    return sum(one.slots for one in told.instances) + sum(one.slots for one in told.starting) < told.slots
