"""The rooms that a Scheduler has made for those who wait: reserved from the decision to the start, or given back."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Collection, Mapping
from math import inf

from sllm_actor.actors.decision_log import DecisionLog
from sllm_actor.actors.making_room import MakingRoom, NotIdle, Room
from sllm_actor.errors import NoCapacity, SllmError
from sllm_actor.messages.declare import changed
from sllm_actor.messages.placement import InstanceView, NodeReport, Placement, PlaceModel, RunsAlready
from sllm_actor.policy.cluster_view import ClusterView
from sllm_actor.policy.node_view import Grant
from sllm_actor.policy.offers import Action, Move
from sllm_actor.policy.placement import ABLE, QUIET, Decision, MakeRoom, Start, Wait
from sllm_actor.policy.taking_turns import TakingTurns
from sllm_actor.runtime import ActorContext, Clock

log = logging.getLogger(__name__)

# A node tells so soon that an instance has left it, or that a start has begun.
TOLD_WITHIN_S = 2.0
# Who lets a place go for a better one is decided anew so often at most.
STAND_BACK_S = 0.05


class Waiting:
    """A question, since when it waits, and whose instances were given up for it.

    What runs is left alone for it where `able` says so: for one that is moved itself, and once making room has failed
    for another reason than that an idle instance was so no more.
    Its bytes have been on their way, without a device, since `fetched_from_s`, if that is not 0.
    """

    def __init__(self, question: PlaceModel, asked_s: float, able: Collection[Action]) -> None:
        self.question = question
        self.able = able
        self.room: Room | None = None
        self.asked_s = asked_s
        self.answer: asyncio.Future[Placement | RunsAlready] = asyncio.get_running_loop().create_future()
        self.given_up: tuple[str, ...] = ()
        self.why = ""
        # What it waited for when it was looked at last is a start that had begun.
        self.is_settled = False
        self.fetched_from_s = 0.0
        # What was decided last, where that is to wait, and when.
        self.decided: Wait | None = None
        self.decided_s = -inf
        # Since when it has let places go for a better one, if that is not 0, and how many do so ahead of it.
        self.stood_back_from_s = 0.0
        self.ahead = 0
        # It is looked at again at that moment.
        self.recheck: asyncio.Task[None] | None = None
        self.recheck_s = 0.0

    @property
    def leaves_places(self) -> bool:
        """Tell whether it takes no place that there is: it waits for a better one, or for one of some alone."""
        return self.room is not None or (self.decided is not None and not self.decided.holds_up)

    @property
    def stands_back(self) -> bool:
        """Tell whether it has let a place go for a better one."""
        return self.decided is not None and self.decided.again_s > 0

    def has_stood_back(self, now_s: float) -> bool:
        """Tell whether it has done so just now."""
        return self.stands_back and now_s < self.decided_s + STAND_BACK_S

    def note(self, decision: Decision, now_s: float) -> None:
        """Note what was decided, and since when it has stood back."""
        self.decided, self.decided_s = decision if isinstance(decision, Wait) else None, now_s
        if self.stands_back:
            self.stood_back_from_s = self.stood_back_from_s or now_s


class Rooms:
    """Belongs to one Scheduler, whose view it changes, and which decides and grants; `life` is in the rooms' names."""

    def __init__(
        self,
        context: ActorContext,
        view: ClusterView,
        clock: Clock,
        making: MakingRoom,
        turns: TakingTurns,
        decisions: DecisionLog,
        *,
        decide: Callable[[Waiting, float], Decision],
        grant: Callable[[Waiting, Start, float], Placement],
        serve: Callable[[], None],
        life: str,
    ) -> None:
        self._context = context
        self._view = view
        self._clock = clock
        self._making = making
        self._turns = turns
        self._decisions = decisions
        self._decide = decide
        self._grant = grant
        self._serve = serve
        self._life = life
        self._numbers = itertools.count(1)
        # For whom room is being made, or was made.
        self._waiting: set[Waiting] = set()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def make(self, waiting: Waiting, decision: MakeRoom, now_s: float) -> None:
        """Keep the room that is to be made for who waits, and the places of those who move for it."""
        waiting.able = QUIET  # It is tried once.
        question, node, offer = waiting.question, decision.report.node, decision.offer
        self._waiting.add(waiting)
        room = waiting.room = Room(f"room-{self._life}-{next(self._numbers)}", decision, now_s)
        self._view.give_up(node, [one.instance_id for one in offer.leaving])
        expires_s = now_s + self._making.longest_s
        self._view.grant(room.room_id, Grant(node, question.host_bytes, expires_s, question.slots))
        waiting.why = decision.explanation.reason
        self._decisions.note(changed(decision.explanation, outcome="making room"))
        to = {move.instance.instance_id: self._destination(move, now_s) for move in offer.moves}
        self._context.tasks.spawn(self._until_made(waiting, room, decision, to), f"make-{room.room_id}")

    def _destination(self, move: Move, now_s: float) -> Placement | RunsAlready | None:
        """Give a moving instance its place elsewhere, where there is one still."""
        if move.load is None:
            running = self._view.running(move.instance.model)
            return next((runs_already(*one) for one in running if one[0].node == move.to), None)
        wish = Waiting(changed(move.load, only_on=move.to), now_s, QUIET)
        decision = self._decide(wish, now_s)
        return self._grant(wish, decision, now_s) if isinstance(decision, Start) else None

    async def _until_made(
        self, waiting: Waiting, room: Room, decision: MakeRoom, to: Mapping[str, Placement | RunsAlready | None]
    ) -> None:
        node, offer = room.node, decision.offer
        there = {instance_id: place for instance_id, place in to.items() if place is not None}
        try:
            if len(there) < len(to):
                raise NoCapacity("there is no place any more for what would move", retry_after_s=1.0)
            room.moved = await self._making.make(self._context.system, decision, there)
        except (SllmError, NotIdle) as error:
            log.warning("no room is made on %s for %s: %s", node, waiting.question.model, error)
            for one in offer.leaving:
                self._view.keep(node, one.instance_id)
            if isinstance(error, NotIdle):
                waiting.able = ABLE  # It was tried with what was not true any more.
            if waiting.room is room:
                self.leave(waiting)
        else:
            waiting.given_up += tuple(one.instance_id for one in offer.leaving)
            room.made = True
            self._view.extend(room.room_id, self._clock.monotonic_s() + TOLD_WITHIN_S)
            for one in offer.leaving:
                self._turns.gave_up(node, one.model, self._clock.monotonic_s())
        self._serve()

    def leave(self, waiting: Waiting) -> None:
        """Let others have the room that is being made for one."""
        if waiting.room is not None:
            self._view.release(waiting.room.room_id)
            self._used(waiting)

    def _used(self, waiting: Waiting) -> None:
        waiting.room = None
        self._waiting.discard(waiting)

    def start_in(self, waiting: Waiting, now_s: float) -> Start | None:
        """Have one start in the room that was made for it; None where there is none, or none yet."""
        room = waiting.room
        if room is None:
            return None
        held = self._view.release(room.room_id)
        if held is None:  # Its node has gone, or it took too long.
            self._used(waiting)
            return None
        if room.made:
            question = changed(waiting.question, only_on=room.node)
            decision = self._decide(Waiting(question, waiting.asked_s, QUIET), now_s)
            if isinstance(decision, Start):
                self._used(waiting)
                return _in_room(decision, room, waiting, now_s)
        self._view.grant(room.room_id, held)
        return None


def runs_already(report: NodeReport, instance: InstanceView) -> RunsAlready:
    """Say where an instance runs."""
    return RunsAlready(
        model=instance.model,
        instance_id=instance.instance_id,
        node=report.node,
        worker=instance.worker,
        address=report.address,
    )


def _in_room(start: Start, room: Room, waiting: Waiting, now_s: float) -> Start:
    """Give a start whose explanation is that of making room for it."""
    explanation = changed(
        room.explanation, predicted_s=start.estimate_s, waited_s=now_s - waiting.asked_s, moved=room.moved,
        given_up=waiting.given_up, made_room_s=now_s - room.begin_s, outcome="granted",
    )  # fmt: skip
    return start._replace(explanation=explanation)
