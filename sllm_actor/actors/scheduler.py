"""Grants each cold model the node that can start it soonest."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Collection, Mapping, Set

from sllm_actor.actors.autoscaler import Autoscaler
from sllm_actor.actors.decision_log import DecisionLog, granted
from sllm_actor.actors.estimate_book import EstimateBook
from sllm_actor.actors.fetching import LOOK_LEAST_S, Fetching, with_bytes
from sllm_actor.actors.granted_starts import GrantedStarts
from sllm_actor.actors.holding import Holding
from sllm_actor.actors.making_room import MakingRoom
from sllm_actor.actors.rooms import STAND_BACK_S, TOLD_WITHIN_S, Rooms, Waiting, runs_already
from sllm_actor.actors.scaling_up import ScalingUp
from sllm_actor.actors.scheduler_limits import Limits as Limits
from sllm_actor.actors.start_counts import StartCounts
from sllm_actor.actors.waiting_starts import WaitingStarts
from sllm_actor.domain import ModelName, NodeId
from sllm_actor.errors import NoCapacity, QueueFull
from sllm_actor.loader.tiers import FIRST_REMOTE_BYTES_PER_S, FIRST_SSD_BYTES_PER_S
from sllm_actor.messages.explanation import ExplainPlacement, Explanation
from sllm_actor.messages.placement import (
    HurryPlacement,
    InstanceView,
    ListNodes,
    MembersChanged,
    NodeChange,
    NodeReport,
    Placement,
    PlaceModel,
    RunsAlready,
    StartingView,
)
from sllm_actor.policy.cluster_view import ClusterView
from sllm_actor.policy.estimator import Estimator
from sllm_actor.policy.explaining import refused, why_in_vain
from sllm_actor.policy.node_view import Grant
from sllm_actor.policy.offers import allows, is_restricted
from sllm_actor.policy.placement import ABLE, QUIET, Decision, Evict, MakeRoom, Start, Wait, Waiter, decide, in_order
from sllm_actor.policy.policies import Situation
from sllm_actor.policy.retrying import Pace, placement_s
from sllm_actor.policy.taking_turns import TakingTurns
from sllm_actor.runtime import Actor, Clock, handles

log = logging.getLogger(__name__)

# A placement whose start has not begun by then was given to somebody who has left.
BEGIN_WITHIN_S = 10.0
# A new leader waits so long for what the other members report before it decides.
GATHER_S = 1.0


class Scheduler(Actor):
    """Owns the cluster view, what was learned of starts, the last decisions, and who waits.

    One leads at a time, in an `epoch` of its own; `members` are the nodes in theirs, none where a node is alone. Those
    that are `gone` are members as long as their leases last, but nobody waits for what they report.
    """

    def __init__(
        self,
        clock: Clock,
        limits: Limits,
        counts: StartCounts,
        epoch: int = 0,
        members: Mapping[NodeId, int] | None = None,
        autoscaler: Autoscaler | None = None,
        book: EstimateBook | None = None,
        gone: Collection[NodeId] = (),
    ) -> None:
        self._clock = clock
        self._limits = limits
        self._counts = counts
        self._view = ClusterView(FIRST_SSD_BYTES_PER_S, FIRST_REMOTE_BYTES_PER_S)
        self._estimator = Estimator()
        self._decisions = DecisionLog(limits.decision_history)
        self._granted = GrantedStarts()
        self._waiting = WaitingStarts()
        # One that came after another of its epoch, which is 0 for a lone node's, has names of its own.
        self._life = str(epoch) if epoch else f"{round(clock.monotonic_s() * 1e6):x}"
        self._placements = itertools.count(1)
        self._pace = Pace()
        self._epoch = epoch
        self._members = dict(members or {})
        self._gone = set(gone)
        self._awaited = self._members.keys() - self._gone
        self._newest_epoch = max(self._members.values(), default=0)
        self._turns = TakingTurns(limits.switch_hold_s)
        self._autoscaler = autoscaler
        self._scaling: ScalingUp | None = None
        self._book = book
        self._making = MakingRoom(
            self._view, self._estimator, clock, counts, evict_timeout_s=limits.evict_timeout_s,
            move_timeout_s=limits.move_timeout_s,
        )  # fmt: skip

    async def started(self) -> None:
        self._rooms = Rooms(
            self.context, self._view, self._clock, self._making, self._turns, self._decisions,
            decide=self._decide, grant=self._grant, serve=self._serve, life=self._life,
        )  # fmt: skip
        self._fetching = Fetching(
            self.context, self._view, self._clock, self._waiting, self._decisions, self._counts, self._serve,
            bytes_first_s=self._limits.bytes_first_s, epoch=self._epoch, life=self._life,
        )  # fmt: skip
        self._holding = Holding(self.context, self._view, self._clock, self._turns, self._serve)
        if self._autoscaler is not None:
            self._scaling = scaling = ScalingUp(
                self.context, self._view, self._clock, self._autoscaler, self._waiting, self._granted, self._fetching,
                decide=self._decide, grant=self._grant, give_up=self._give_up, evict=self._evict,
                may_look=self._may_scale,
            )  # fmt: skip
            self.context.tasks.spawn(scaling.keep_looking(), "scale")
        if self._book is not None:
            self.context.tasks.spawn(self._book.keep(self._estimator), "estimates")
        if self._awaited:
            self.context.tasks.spawn(self._decide_anyway(), "gather")

    async def stopped(self) -> None:
        if self._book is not None:
            await self._book.write(self._estimator)

    async def _decide_anyway(self) -> None:
        """Wait no longer for those who have not reported."""
        await self._clock.sleep(GATHER_S)
        self._awaited.clear()
        self._serve()

    def _may_scale(self, now_s: float) -> bool:
        """Let requests that wait for a place go first; and what is not known is not to be started again."""
        with_room = self._waiting.models_with_room()
        return not self._awaited and all(
            one.leaves_places or self._fetching.nodes(one.question.model) or self._coming(one, now_s, with_room)
            for one in self._waiting
        )

    @handles(NodeReport)
    def hear(self, report: NodeReport) -> None:
        if self._has_left(report):
            return
        now_s = self._clock.monotonic_s()
        self._awaited.discard(report.node)
        self._gone.discard(report.node)
        before = self._view.nodes.get(report.node)
        self._view.hear(report, now_s)
        self._waiting.hear(before.report if before is not None else None, report)
        self._holding.hear(report, now_s)
        if self._scaling is not None:
            self._scaling.hear(report)
        for placement_id in report.ended_placements:
            if placement_id not in self._view.grants and placement_id not in self._granted:
                continue  # It was told before.
            self._view.release(placement_id)
            self._ended(placement_id, "failed" if placement_id in report.failed_placements else "started", now_s)
        for start in report.starting:
            self._goes_on(report.node, start, now_s)
        if report.cordoned:
            self._fetching.end_on(report.node)
        self._serve()

    @handles(NodeChange)
    def hear_of_change(self, change: NodeChange) -> None:
        if not self._has_left(change) and self._view.hear_of_change(change):
            self._holding.hear_of(change.node, change.instances, self._clock.monotonic_s())
            if self._scaling is not None:
                self._scaling.hear(change)
            self._serve()

    def _has_left(self, report: NodeReport | NodeChange) -> bool:
        """Tell whether a report is from before its node left: who comes later has a higher epoch than all so far."""
        known = self._members.get(report.node)
        return 0 < report.epoch <= self._newest_epoch if known is None else report.epoch < known

    def _goes_on(self, node: NodeId, start: StartingView, now_s: float) -> None:
        """Let a start keep its room; one that an earlier leader has granted gets it."""
        placement_id, expires_s = start.placement_id, now_s + self._limits.lease_s
        if placement_id in self._view.grants:
            self._view.extend(placement_id, expires_s)
        else:
            self._view.grant(placement_id, Grant(node, start.host_bytes, expires_s, start.slots))
        self._granted.goes_on(placement_id, node, start, now_s)

    @handles(MembersChanged)
    async def members_changed(self, message: MembersChanged) -> None:
        """Forget who has left or is gone, and what was to start there. One that lives after all reports again."""
        now_s = self._clock.monotonic_s()
        for node, view in list(self._view.nodes.items()):
            if node not in message.gone and view.report.epoch >= message.epochs.get(node, float("inf")):
                continue
            for placement_id in self._granted.on(node):
                self._ended(placement_id, "failed", now_s)
            self._fetching.end_on(node)
            self._view.forget(node)
            self._turns.forget(node)
        self._members, self._gone = dict(message.epochs), set(message.gone)
        self._newest_epoch = max(self._newest_epoch, *self._members.values(), 0)
        self._awaited &= message.epochs.keys() - self._gone
        self._waiting.doubt_all()
        self._serve()

    def _ended(self, placement_id: str, outcome: str, now_s: float) -> None:
        """Learn from what a start took, compared with what was expected."""
        self._waiting.ended(placement_id)
        if (start := self._granted.end(placement_id)) is None:
            return
        observed_s = now_s - start.granted_s
        self._decisions.end(start.request_id, outcome, observed_s)
        if outcome != "started" or start.predicted_s == float("inf"):
            return
        self._counts.estimated(start.tier, start.predicted_s, observed_s)
        start.teach(self._estimator, observed_s, self._view.nodes.get(start.node))

    @handles(ListNodes)
    async def list_nodes(self, _: ListNodes) -> tuple[NodeReport, ...]:
        return tuple(node.report for node in self._view.nodes.values())

    @handles(ExplainPlacement)
    async def explain(self, message: ExplainPlacement) -> Explanation:
        return self._decisions.find(message.request_id)

    @handles(PlaceModel, concurrent=True)
    async def place(self, question: PlaceModel) -> Placement | RunsAlready:
        now_s = self._clock.monotonic_s()
        if len(self._waiting) >= self._limits.max_waiting:
            raise QueueFull(f"{len(self._waiting)} starts are waiting already", retry_after_s=self._pace.next_s(now_s))
        waiting = Waiting(question, now_s, QUIET if is_restricted(question) else ABLE)
        self._waiting.add(waiting)
        try:
            self._serve()
            if not waiting.answer.done() and self._scaling is not None:
                self._scaling.asked({question.model})
            async with asyncio.timeout(question.timeout_s):
                return await waiting.answer
        except TimeoutError:
            waited_s, why = self._clock.monotonic_s() - waiting.asked_s, waiting.why or "others waited before it"
            self._decisions.note(refused(waiting.question, self._limits.placement_policy, why, waited_s))
            raise NoCapacity(
                f"no node could start {question.model} within {question.timeout_s:g} s: "
                f"{why_in_vain(question, self._view)}",
                retry_after_s=placement_s(question, self._view.nodes.values()),
            ) from None
        finally:
            self._waiting.leave(waiting)
            self._rooms.leave(waiting)
            if waiting.answer.cancelled():
                self._fetching.leave(waiting)
            self._pace.note(self._clock.monotonic_s())

    @handles(HurryPlacement)
    async def hurry(self, message: HurryPlacement) -> None:
        self._waiting.hurry(message)
        self._serve()

    async def _serve_later(self, wait_s: float) -> None:
        """Look again after a while, whatever is reported until then."""
        await self._clock.sleep(wait_s)
        self._serve()

    def _serve(self) -> None:
        """Grant by priority and then in the order of asking, until someone has to wait."""
        if self._awaited:
            return
        now_s = self._clock.monotonic_s()
        for placement_id in self._view.expired(now_s):
            self._ended(placement_id, "expired", now_s)
        if not self._waiting:
            return
        self._waiting.refuse(self._view, self._members.keys(), self._gone)
        if self._rooms:
            self._start_in_rooms(now_s)
        with_room = self._waiting.models_with_room() if self._rooms else set()
        unsettled = self._waiting.unsettled(self._granted.begun, self._view.models())
        asking = [one for one in unsettled if not self._is_answered(one, now_s, with_room) and one.room is None]
        if not asking:
            return
        ahead = 0
        for place in in_order([Waiter(one.question, one.asked_s) for one in asking], now_s):
            waiting = asking[place]
            if self._is_answered(waiting, now_s, with_room):  # One before it has asked for the same.
                continue
            self._fetching.hasten(waiting, now_s)
            waiting.ahead = ahead
            if waiting.has_stood_back(now_s):
                self._look_again(waiting, STAND_BACK_S)
                ahead += 1
                continue
            decision = self._decide(waiting, now_s)
            waiting.note(decision, now_s)
            if self._fetching.waits(waiting, decision, now_s):
                self._look_again(waiting, TOLD_WITHIN_S)
                continue
            if isinstance(decision, MakeRoom):
                self._rooms.make(waiting, decision, now_s)
                with_room.add(waiting.question.model)
                continue
            if isinstance(decision, Wait):
                waiting.why = decision.reason
                if waiting.stands_back:
                    self._look_again(waiting, decision.again_s)
                    ahead += 1
                self._fetching.meanwhile(waiting, now_s)
                if decision.holds_up:
                    return
                continue
            if isinstance(decision, Evict):
                self._give_up(waiting, decision)
                return
            self._waiting.answer(waiting, self._grant(waiting, decision, now_s))

    def _start_in_rooms(self, now_s: float) -> None:
        """Answer those whom room has been made for."""
        for waiting in self._waiting.with_room():
            in_room = self._rooms.start_in(waiting, now_s)
            if in_room is not None:
                self._waiting.answer(waiting, self._grant(waiting, in_room, now_s))

    def _is_answered(self, waiting: Waiting, now_s: float, with_room: Set[ModelName]) -> bool:
        """Spare a start where an instance runs, is starting, or has room made, that somebody else has asked for."""
        question = waiting.question
        for report, instance in self._view.running(question.model):
            if instance.instance_id not in question.failed and allows(question, report.node):
                self._waiting.answer(waiting, runs_already(report, instance))
                return True
        coming = self._coming(waiting, now_s, with_room)
        self._waiting.settle(waiting, question.model in self._granted.begun)
        if coming:
            waiting.why = coming
            if waiting.recheck is None:
                self._look_again(waiting, TOLD_WITHIN_S)
        return bool(coming)

    def _look_again(self, waiting: Waiting, wait_s: float) -> None:
        """Serve again in a while, whatever is reported until then: nobody waits for what may never be for ever."""
        wait_s, recheck = max(wait_s, LOOK_LEAST_S), waiting.recheck
        at_s = self._clock.monotonic_s() + wait_s
        if recheck is not None and not recheck.done() and recheck is not asyncio.current_task():
            if at_s >= waiting.recheck_s:
                return
            recheck.cancel()
        waiting.recheck, waiting.recheck_s = self.context.tasks.spawn(self._serve_later(wait_s), "recheck"), at_s

    def _coming(self, waiting: Waiting, now_s: float, with_room: Set[ModelName]) -> str:
        """Say why what one waits for comes without a place of its own: another one has that already; else nothing."""
        model = waiting.question.model
        if self._granted.comes(model, now_s):
            return f"{model} is being started already"
        return f"room is being made for {model} already" if waiting.room is None and model in with_room else ""

    def _decide(self, waiting: Waiting, now_s: float) -> Decision:
        situation = Situation(
            view=self._view,
            estimator=self._estimator,
            question=waiting.question,
            now_s=now_s,
            waited_s=now_s - waiting.asked_s,
            stood_back_s=now_s - (waiting.stood_back_from_s or now_s),
            ahead=waiting.ahead,
            locality_wait_s=self._limits.locality_wait_s,
            able=waiting.able,
        )
        return decide(situation, self._limits.placement_policy, waiting.given_up)

    def _grant(self, waiting: Waiting, start: Start, now_s: float) -> Placement:
        question, start = waiting.question, with_bytes(start, waiting, now_s)
        placement_id = f"placement-{self._life}-{next(self._placements)}"
        lease_s = min(self._limits.lease_s, BEGIN_WITHIN_S)
        room = Grant(start.report.node, question.host_bytes, now_s + lease_s, question.slots)
        self._view.grant(placement_id, room)
        self._granted.grant(placement_id, granted(question, start, now_s))
        self._decisions.note(start.explanation)
        return Placement(
            placement_id=placement_id,
            node=start.report.node,
            manager=start.report.manager,
            estimate_s=start.estimate_s,
            lease_s=lease_s,
            reason=start.explanation.reason,
            address=start.report.address,
            epoch=self._epoch,
            made_room_s=start.explanation.made_room_s,
            fetched_s=start.explanation.fetched_s,
        )

    def _give_up(self, waiting: Waiting, decision: Evict) -> None:
        self._view.give_up(decision.report.node, [victim.instance_id for victim in decision.victims])
        waiting.given_up += tuple(victim.instance_id for victim in decision.victims)
        for victim in decision.victims:
            self._turns.gave_up(decision.report.node, victim.model, self._clock.monotonic_s())
            self._evict(decision.report, victim)

    def _evict(self, report: NodeReport, victim: InstanceView) -> None:
        self.context.tasks.spawn(self._evicted(report, victim), f"evict-{victim.instance_id}")

    async def _evicted(self, report: NodeReport, victim: InstanceView) -> None:
        if not await self._making.evict(self.context.system, report, victim):
            self._serve()
