"""Why a model was started where it was: CLI and gateway to Router, Router to Scheduler."""

from __future__ import annotations

from sllm_actor.domain import ModelName, NodeId, RequestId
from sllm_actor.messages.declare import message


@message("explanation.term")
class Term:
    """One part of an estimate; `inputs` are the numbers that it was made of."""

    name: str
    seconds: float
    inputs: dict[str, float]


@message("explanation.candidate")
class Candidate:
    """What a node could have done. `leaving` are the instances that would have to leave it.

    What has failed for this request, or is not done for one of its kind, is not `possible`, whatever its estimate.
    """

    node: NodeId
    action: str
    tier: str
    estimate_s: float
    terms: tuple[Term, ...]
    leaving: tuple[str, ...]
    possible: bool


@message("explanation.moved")
class MovedAnswer:
    """A running answer that went on at `node` to make room: after so many tokens, prompt included, and rounds."""

    request_id: RequestId
    model: ModelName
    node: NodeId
    tokens: int
    rounds: int


@message("explanation.flip")
class Flip:
    """The smallest change of one term, relative to what it was, with which another candidate would have been chosen."""

    node: NodeId
    term: str
    from_s: float
    to_s: float
    text: str


@message("explanation.decision")
class Explanation:
    """One decision, best candidate first; `more` nodes are not shown. `chosen` is None where none could do it.

    `predicted_s` counts from the grant, as `observed_s` does, which is 0.0 until the start has ended; `outcome` is
    `making room`, `fetching`, `granted`, `started`, `failed`, `expired` (nobody used it), or `waited in vain`. Which
    answers have `moved` for it is known once they have. Of the time that it `waited_s` its bytes were on their way, or
    there, without a device for `fetched_s`.
    """

    request_id: RequestId
    model: ModelName
    policy: str
    reason: str
    candidates: tuple[Candidate, ...]
    more: int
    chosen: Candidate | None
    runner_up: Candidate | None
    flip: Flip | None
    given_up: tuple[str, ...] = ()
    waited_s: float = 0.0
    predicted_s: float = 0.0
    observed_s: float = 0.0
    outcome: str = ""
    moved: tuple[MovedAnswer, ...] = ()
    made_room_s: float = 0.0
    fetched_s: float = 0.0


@message("explanation.placement")
class ExplainPlacement:
    """Answered by the `Explanation` of the placement that `request_id` asked for, or fails with `RequestNotFound`."""

    request_id: RequestId


@message("explanation.ask")
class ExplainRequest:
    """Answered by `Explained`, or fails with `RequestNotFound`."""

    request_id: RequestId


@message("explanation.answer")
class Explained:
    """How a request came to its instance, `text` in words.

    One that came to a running instance has no `decision`; `beside` is how many requests that instance had already.
    `start_of` is the request whose start it waited for, often itself.
    """

    request_id: RequestId
    model: ModelName
    text: str
    instance_id: str = ""
    node: str = ""
    beside: int = 0
    start_of: str = ""
    decision: Explanation | None = None
