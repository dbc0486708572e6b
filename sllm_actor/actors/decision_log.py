"""The Scheduler's memory: why each of the last requests was placed where it was, and how its start then went."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from sllm_actor.domain import ModelName, NodeId, RequestId
from sllm_actor.errors import RequestNotFound
from sllm_actor.messages.explanation import Explanation
from sllm_actor.messages.placement import PlaceModel, StartingView
from sllm_actor.policy.estimator import Estimator
from sllm_actor.policy.node_view import NodeView
from sllm_actor.policy.offers import is_guess
from sllm_actor.policy.placement import Start


class Granted(NamedTuple):
    """A placement whose start has not ended: what was expected of it."""

    request_id: RequestId
    model: ModelName
    node: NodeId
    tier: str
    fingerprint: str
    size_bytes: int
    predicted_s: float
    # Of it, what the queue and the bytes were to take.
    moving_s: float
    granted_s: float
    # How many it had beside it on the machine.
    beside: int = 0
    # Its node had not seen yet how fast such bytes come.
    is_guess: bool = False

    def teach(self, estimator: Estimator, observed_s: float, node: NodeView | None) -> None:
        """Have the estimator learn from what it took, compared with what was expected of its queue and its bytes.

        Where these were guessed, and have shown how fast they come, the difference is the guess's.
        """
        if not self.is_guess or node is None or is_guess(node.report, self.tier):
            constant_s = observed_s - self.moving_s
            estimator.learn_start(self.node, self.tier, self.fingerprint, self.size_bytes, constant_s, self.beside)


def granted(question: PlaceModel, start: Start, now_s: float) -> Granted:
    """Note what is expected of a start that begins now."""
    (engine,) = (term for term in start.terms if term.name == "engine")
    return Granted(
        request_id=question.request_id,
        model=question.model,
        node=start.report.node,
        tier=start.tier,
        fingerprint=question.fingerprint,
        size_bytes=question.size_bytes,
        predicted_s=start.estimate_s,
        moving_s=start.estimate_s - engine.seconds,
        granted_s=now_s,
        beside=int(engine.inputs["beside"]),
        is_guess=is_guess(start.report, start.tier),
    )


def adopted(start: StartingView, node: NodeId, now_s: float) -> Granted:
    """Note a start that somebody else has granted: nothing is expected of it."""
    return Granted(
        request_id=RequestId(""),
        model=start.model,
        node=node,
        tier="",
        fingerprint="",
        size_bytes=0,
        predicted_s=float("inf"),
        moving_s=0.0,
        granted_s=now_s,
    )


class DecisionLog:
    """Owns the explanations of the last `history` decisions, packed: ten thousand of them take a few megabytes."""

    def __init__(self, history: int) -> None:
        self._history = history
        self._packed: OrderedDict[RequestId, bytes] = OrderedDict()

    def __iter__(self) -> Iterator[Explanation]:
        """Give those that are remembered, the latest decision last."""
        return (msgspec.msgpack.decode(packed, type=Explanation) for packed in self._packed.values())

    def note(self, explanation: Explanation) -> None:
        """Keep the explanation in the place of an earlier one of its request; the oldest is forgotten."""
        self._packed.pop(explanation.request_id, None)
        self._packed[explanation.request_id] = msgspec.msgpack.encode(explanation)
        if len(self._packed) > self._history:
            self._packed.popitem(last=False)

    def end(self, request_id: RequestId, outcome: str, observed_s: float = 0.0) -> None:
        """Add how the start went, if its decision is remembered still."""
        packed = self._packed.get(request_id)
        if packed is not None:
            # It is a struct, which a type checker does not see of messages.
            explanation: Any = msgspec.msgpack.decode(packed, type=Explanation)
            ended = msgspec.structs.replace(explanation, outcome=outcome, observed_s=observed_s)
            self._packed[request_id] = msgspec.msgpack.encode(ended)

    def find(self, request_id: RequestId) -> Explanation:
        """Give the explanation of a request's placement.

        Raises:
            RequestNotFound: it asked for none, or that is forgotten.
        """
        packed = self._packed.get(request_id)
        if packed is None:
            raise RequestNotFound(f"no placement of a request {request_id} is remembered", param="request_id")
        return msgspec.msgpack.decode(packed, type=Explanation)
