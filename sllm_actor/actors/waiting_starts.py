"""The starts that a Scheduler has been asked for and has not answered, in the order in which they came."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any, cast

import msgspec

from sllm_actor.actors.rooms import Waiting
from sllm_actor.domain import ModelName, NodeId
from sllm_actor.messages.placement import HurryPlacement, NodeReport, Placement, RunsAlready
from sllm_actor.policy.cluster_view import ClusterView
from sllm_actor.policy.placement import limits_of, refusal


class WaitingStarts:
    """Answers them, or refuses them; who waits in vain is looked for only where something has changed by which one may.

    Iterating gives those that wait at its begin.
    """

    def __init__(self) -> None:
        self._waiting: list[Waiting] = []
        self._doubtful: list[Waiting] = []
        # How many have asked for a start of each model, and wait or were granted one that has not ended; these starts;
        # how many of those that wait are settled.
        self._asking: Counter[ModelName] = Counter()
        self._granted: dict[str, ModelName] = {}
        self._settled: Counter[ModelName] = Counter()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(tuple(self._waiting))

    @property
    def standing_back(self) -> int:
        """Count those who have let a place go for a better one."""
        return sum(waiting.stands_back for waiting in self._waiting)

    def add(self, waiting: Waiting) -> None:
        """Let one wait."""
        self._waiting.append(waiting)
        self._doubtful.append(waiting)
        self._asking[waiting.question.model] += 1

    def leave(self, waiting: Waiting) -> None:
        """Forget one, answered or not."""
        if waiting in self._waiting:
            self._remove(waiting)
        if waiting.recheck is not None:
            waiting.recheck.cancel()

    def answer(self, waiting: Waiting, answer: Placement | RunsAlready) -> None:
        """Answer one that waits."""
        self._remove(waiting)
        if isinstance(answer, Placement):
            model = self._granted[answer.placement_id] = waiting.question.model
            self._asking[model] += 1
        if not waiting.answer.done():
            waiting.answer.set_result(answer)

    def hurry(self, message: HurryPlacement) -> None:
        """Change what one waits for: how urgent it is, and where it would not go."""
        for waiting in self._waiting:
            if waiting.question.request_id == message.request_id:
                question = waiting.question
                failed = tuple(dict.fromkeys((*question.failed, *message.failed)))
                priority = min(question.priority, message.priority)
                waiting.question = msgspec.structs.replace(cast(Any, question), priority=priority, failed=failed)

    def hear(self, before: NodeReport | None, report: NodeReport) -> None:
        """Doubt all where a node's newest report says what those wait in vain for who do."""
        if before is None or report.cordoned or limits_of(before) != limits_of(report):
            self.doubt_all()

    def doubt_all(self) -> None:
        """Have the next `refuse` look at all."""
        self._doubtful = list(self._waiting)

    def refuse(self, view: ClusterView, members: Set[NodeId], gone: Set[NodeId]) -> None:
        """Tell those who would wait in vain, also behind others."""
        doubtful, self._doubtful = self._doubtful, []
        for waiting in doubtful:
            error = refusal(waiting.question, view, members, gone)
            if error is not None and waiting in self._waiting:
                self._remove(waiting)
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)

    def asking(
        self, beside: Mapping[ModelName, int], models: Iterable[ModelName] | None = None
    ) -> dict[ModelName, int]:
        """Tell how many requests wait for a start of each model, or of these: as many as nodes tell of `beside` those
        who have asked for it, and those themselves, whether they wait for an answer or for the start that they were
        granted.
        """
        asking, names = self._asking, {*self._asking, *beside} if models is None else models
        return {name: asking.get(name, 0) + beside.get(name, 0) for name in names}

    def ended(self, placement_id: str) -> None:
        """Hear that a start has ended: nobody waits for it any more."""
        if placement_id in self._granted:
            self._count_less(self._granted.pop(placement_id))

    def _count_less(self, model: ModelName) -> None:
        self._asking[model] -= 1
        if not self._asking[model]:
            del self._asking[model]

    def with_room(self) -> list[Waiting]:
        """List those that room is being made for."""
        return [waiting for waiting in self._waiting if waiting.room is not None]

    def models_with_room(self) -> set[ModelName]:
        """Name the models that room is being made for."""
        return {waiting.question.model for waiting in self.with_room()}

    def settle(self, waiting: Waiting, is_settled: bool) -> None:
        """Note whether one that waits does so for a start that has begun."""
        if waiting.is_settled == is_settled:
            return
        waiting.is_settled, model = is_settled, waiting.question.model
        self._settled[model] += 1 if is_settled else -1
        if not self._settled[model]:
            del self._settled[model]

    def unsettled(self, begun: Set[ModelName], running: Set[ModelName]) -> list[Waiting]:
        """List those that do not wait, as when they were looked at last, for a start that has `begun` and goes on."""
        models = self._settled.keys()
        if len(self._waiting) == self._settled.total() and models <= begun and models.isdisjoint(running):
            return []
        return [
            waiting
            for waiting in self._waiting
            if not waiting.is_settled or waiting.question.model not in begun or waiting.question.model in running
        ]

    def _remove(self, waiting: Waiting) -> None:
        self._waiting.remove(waiting)
        self.settle(waiting, False)
        self._count_less(waiting.question.model)
