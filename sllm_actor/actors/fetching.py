"""The bytes that nodes fetch before a device is taken for them: meanwhile those go on with what is on them."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Set
from contextlib import aclosing
from math import inf
from typing import Any, cast

import msgspec

from sllm_actor.actors.decision_log import DecisionLog
from sllm_actor.actors.rooms import Waiting
from sllm_actor.actors.start_counts import StartCounts
from sllm_actor.actors.waiting_starts import WaitingStarts
from sllm_actor.domain import ModelName, NodeId
from sllm_actor.errors import SllmError
from sllm_actor.messages.instances import FetchModel
from sllm_actor.messages.placement import NodeReport, PlaceModel
from sllm_actor.policy.bytes_first import (
    AHEAD_S,
    Arrival,
    bytes_s,
    come_first,
    has_room,
    soonest_to_fetch,
    waits_for_bytes,
)
from sllm_actor.policy.cluster_view import ClusterView
from sllm_actor.policy.node_view import Grant
from sllm_actor.policy.offers import is_restricted
from sllm_actor.policy.placement import Decision, Evict, Start
from sllm_actor.runtime import ActorContext, Clock

log = logging.getLogger(__name__)

# What a node has fetched, or could not, it is not asked to fetch again so soon: a start there has its device at once.
REST_S = 15.0
# Of its time a start waits so much for bytes; then it may have a device where they are on their way.
SHARE = 0.5
# It is looked at so often whether bytes are about to be there.
LOOK_EVERY_S = 0.5
LOOK_LEAST_S = 0.01


class Fetch:
    """One under way, the grant that stands for its room, and whether it was begun for a request that waits: else it is
    for a further instance."""

    def __init__(self, question: PlaceModel, report: NodeReport, room_id: str, arrival: Arrival, asked: bool) -> None:
        self.question = question
        self.report = report
        self.room_id = room_id
        self.arrival = arrival
        self.is_asked_for = asked
        # A device may be taken for it.
        self.is_near = False
        self.task: asyncio.Task[None]


class Fetching:
    """Owns the fetches under way. What they bring has its room in the view's host memory, and takes no slot.

    Belongs to one Scheduler. When bytes are about to be there, the view has them in host memory, and it decides anew.
    """

    def __init__(
        self, context: ActorContext, view: ClusterView, clock: Clock, waiting: WaitingStarts, decisions: DecisionLog,
        counts: StartCounts, serve: Callable[[], None], *, bytes_first_s: float, epoch: int, life: str,
    ) -> None:  # fmt: skip
        self._context = context
        self._view = view
        self._clock = clock
        self._waiting = waiting
        self._decisions = decisions
        self._counts = counts
        self._serve = serve
        self._bytes_first_s = bytes_first_s
        self._epoch = epoch
        self._life = life
        self._numbers = itertools.count(1)
        self._under_way: dict[ModelName, dict[NodeId, Fetch]] = {}
        self._rests: dict[tuple[ModelName, NodeId], float] = {}

    def nodes(self, model: ModelName) -> tuple[NodeId, ...]:
        """List the nodes that fetch a model, and where no device is to be taken for it yet."""
        return tuple(node for node, fetch in self._under_way.get(model, {}).items() if not fetch.is_near)

    def models(self) -> Set[ModelName]:
        """List the models that are fetched."""
        return self._under_way.keys()

    def come_first(self, decision: Decision) -> bool:
        """Tell whether what was decided would have a device wait for bytes for long."""
        return come_first(decision, self._bytes_first_s)

    def begin(self, question: PlaceModel, decision: Decision, now_s: float, *, is_asked_for: bool = False) -> bool:
        """Have bytes come first where a decision would have a device wait for them; tell whether they do."""
        if not isinstance(decision, Start | Evict) or not self.come_first(decision):
            return False
        return self._begin(question, decision.report, bytes_s(decision), now_s, is_asked_for=is_asked_for)

    def _begin(
        self, question: PlaceModel, report: NodeReport, takes_s: float, now_s: float, *, is_asked_for: bool
    ) -> bool:
        model = question.model
        is_there = report.node in self._under_way.get(model, {})
        rests = self._rests.get((model, report.node), -inf) > now_s
        if is_there or rests or not has_room(self._view.nodes[report.node], question):
            return False
        room_id = f"fetch-{self._life}-{next(self._numbers)}"
        self._view.grant(room_id, Grant(report.node, question.host_bytes, inf, slots=0))
        fetch = Fetch(question, report, room_id, Arrival(now_s, now_s + takes_s), is_asked_for)
        self._under_way.setdefault(model, {})[report.node] = fetch
        fetch.task = self._context.tasks.spawn(self._fetch(fetch), room_id)
        # And not in the task itself alone: one that is ended at once never runs.
        fetch.task.add_done_callback(lambda _: self._over(fetch))
        self._context.tasks.spawn(self._await_nearness(fetch), f"near-{room_id}")
        return True

    async def _fetch(self, fetch: Fetch) -> None:
        model, report = fetch.question.model, fetch.report
        manager = self._context.system.ref(report.manager, report.address or None)
        try:
            async with aclosing(manager.stream(FetchModel(model=model, epoch=self._epoch))) as steps:
                async for step in steps:
                    fetch.arrival.hear(step.done_bytes, step.total_bytes, self._clock.monotonic_s())
            self._counts.fetches["come"] += 1
        except SllmError as error:
            self._counts.fetches["failed"] += 1
            log.warning("%s could not be fetched by %s: %s", model, report.node, error.message)
        self._over(fetch)
        self._serve()

    async def _await_nearness(self, fetch: Fetch) -> None:
        while not fetch.is_near and not fetch.task.done():
            left_s = fetch.arrival.left_s(self._clock.monotonic_s())
            if left_s <= AHEAD_S:
                self._is_near(fetch)
                self._serve()
            else:
                await self._clock.sleep(min(LOOK_EVERY_S, max(LOOK_LEAST_S, left_s - AHEAD_S)))

    def _is_near(self, fetch: Fetch) -> None:
        """Have starts be decided as if the bytes were there."""
        if not fetch.is_near and self._is_known(fetch):
            fetch.is_near = True
            self._view.expect(fetch.report.node, fetch.question.fingerprint, fetch.question.host_bytes)

    def _is_known(self, fetch: Fetch) -> bool:
        return self._under_way.get(fetch.question.model, {}).get(fetch.report.node) is fetch

    def _over(self, fetch: Fetch) -> None:
        if not self._is_known(fetch):
            return
        self._forget(fetch)
        now_s = self._clock.monotonic_s()
        self._rests = {pair: until_s for pair, until_s in self._rests.items() if until_s > now_s}
        self._rests[fetch.question.model, fetch.report.node] = now_s + REST_S

    def _forget(self, fetch: Fetch) -> None:
        model, node = fetch.question.model, fetch.report.node
        del self._under_way[model][node]
        if not self._under_way[model]:
            del self._under_way[model]
        self._view.release(fetch.room_id)
        if fetch.is_near:
            self._view.expect_no_more(node, fetch.question.fingerprint)

    def hasten(self, waiting: Waiting, now_s: float) -> None:
        """Let one that can't wait for all of its bytes have a device where they are on their way."""
        if self._is_late(waiting, now_s) and not is_restricted(waiting.question):
            for fetch in self._under_way.get(waiting.question.model, {}).values():
                self._is_near(fetch)

    def waits(self, waiting: Waiting, decision: Decision, now_s: float) -> bool:
        """Let one wait for its bytes, which come first; false where it does not, or has waited for long enough."""
        question, nodes = waiting.question, self.nodes(waiting.question.model)
        if is_restricted(question) or self._is_late(waiting, now_s):
            return False
        if nodes:
            left_s = min(self._under_way[question.model][node].arrival.left_s(now_s) for node in nodes)
            if not waits_for_bytes(decision, left_s, self._bytes_first_s):
                return False
        elif not waiting.fetched_from_s and self.begin(question, decision, now_s, is_asked_for=True):
            assert isinstance(decision, Start | Evict), "it has begun"
            noted: Any = msgspec.structs.replace(cast(Any, decision.explanation), outcome="fetching")
            self._decisions.note(noted)
        else:
            return False
        waiting.fetched_from_s = waiting.fetched_from_s or now_s
        waiting.why = f"the bytes of {question.model} are on their way"
        return True

    def meanwhile(self, waiting: Waiting, now_s: float) -> None:
        """Have the bytes that no node has come while their start waits for a device anywhere."""
        question = waiting.question
        if waiting.fetched_from_s or is_restricted(question) or self._is_late(waiting, now_s):
            return
        found = soonest_to_fetch(self._view, question, self._bytes_first_s)
        if found is not None and self._begin(question, found.node.report, found.seconds, now_s, is_asked_for=True):
            waiting.fetched_from_s = now_s

    def _is_late(self, waiting: Waiting, now_s: float) -> bool:
        return now_s - waiting.asked_s >= SHARE * waiting.question.timeout_s

    def leave(self, waiting: Waiting) -> None:
        """End what was begun for a request that has left without an answer, unless others wait for the same."""
        model = waiting.question.model
        if not any(one.question.model == model for one in self._waiting):
            self._end([one for one in self._under_way.get(model, {}).values() if one.is_asked_for])

    def end_on(self, node: NodeId) -> None:
        """End the fetches of a node on which nothing starts."""
        self._end([of_model[node] for of_model in self._under_way.values() if node in of_model])

    def _end(self, fetches: list[Fetch]) -> None:
        for fetch in fetches:
            self._counts.fetches["ended"] += 1
            self._forget(fetch)
            fetch.task.cancel()


def with_bytes(start: Start, waiting: Waiting, now_s: float) -> Start:
    """Give a start whose explanation says for how long its bytes came first."""
    if not waiting.fetched_from_s:
        return start
    explanation: Any = msgspec.structs.replace(cast(Any, start.explanation), fetched_s=now_s - waiting.fetched_from_s)
    return start._replace(explanation=explanation)
