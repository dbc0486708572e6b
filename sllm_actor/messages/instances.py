"""Starting and stopping instances: Router and Scheduler to ModelManager, ModelManager to Router."""

from __future__ import annotations

from sllm_actor.domain import ModelName, NodeId, Span
from sllm_actor.messages.declare import message


@message("instances.start")
class StartInstance:
    """Load the model and give it an engine, under a placement.

    The bytes of an `adapter` that is wanted with it come beside its own; empty for none.
    Answered by a stream of `StartProgress` that ends with `InstanceStarted`; fails with the typed error of whatever
    went wrong, everything given back, and with `Fenced` where the placement's `epoch` is an earlier leader's.
    """

    placement_id: str
    model: ModelName
    adapter: str = ""
    epoch: int = 0


@message("instances.start_progress")
class StartProgress:
    """A start goes on: so much of the model is in host memory, or something came for those whose turn is first."""

    done_bytes: int
    total_bytes: int


@message("instances.fetch")
class FetchModel:
    """Bring the model's bytes to host memory, for a start that is to have a device when they are there.

    Answered by a stream of `StartProgress`, which ends when they are; whoever closes it ends that. Fails with the typed
    error of whatever went wrong, and with `Fenced` where the `epoch` is an earlier leader's.
    """

    model: ModelName
    epoch: int = 0


@message("instances.started")
class InstanceStarted:
    """A running instance; `worker` is the name of its InferenceWorker, `address` where its node is, empty for here."""

    instance_id: str
    model: ModelName
    node: NodeId
    worker: str
    spans: tuple[Span, ...]
    address: str = ""


@message("instances.hold_adapter")
class HoldAdapter:
    """Have an adapter in the engine of an instance, which stays there as long as the stream of this is open.

    Answered by a stream of one `AdapterHeld`; fails with the typed error of whatever went wrong, or with `Draining`
    where the instance is leaving.
    """

    instance_id: str
    adapter: ModelName


@message("instances.adapter_held")
class AdapterHeld:
    """Requests name the adapter by this `key`; `spans` is what its load took, where it had to be waited for."""

    key: str
    spans: tuple[Span, ...]


@message("instances.no_slot")
class NoSlot:
    """All slots of the instance are taken: the request waits for one, and what follows comes when it has it."""


@message("instances.end_start")
class EndStart:
    """End the start of `model` that is under way: those who wait for it fail with `Conflict`, which says `why`.

    Answered by whether there was one.
    """

    model: ModelName
    why: str


@message("instances.end_starts")
class EndStarts:
    """End all starts of this node that are under way: they fail with `Draining`, and may be made elsewhere.

    Answered by how many there were.
    """


@message("instances.stop")
class StopInstances:
    """Stop instances of `model`; with `instance_id` that one alone, with `only_idle` none that generates.

    Running answers are finished first, or, with `preempt`, fail with `Preempted`, to be resumed elsewhere or later.
    Answered by the number of instances stopped.
    """

    model: ModelName
    instance_id: str = ""
    only_idle: bool = False
    preempt: bool = False


@message("instances.gone")
class InstanceGone:
    """Told to the Router: this instance takes no more requests."""

    instance_id: str
    model: ModelName


@message("instances.answered")
class Answered:
    """What one answer took: its prompt, less what was computed already, and then its tokens."""

    computed_tokens: int
    prefill_s: float
    tokens: int
    decode_s: float


@message("instances.activity")
class InstanceActivity:
    """Told to the ModelManager by a worker whenever its number of running generations changes.

    Of those that run: their prompts together, how long they have been running together, the most urgent one's priority.
    `answered` is of the one that has just ended well. Idle, the worker stays for `keep_alive_s`.
    """

    instance_id: str
    active: int
    prompt_tokens: int = 0
    running_s: float = 0.0
    priority: int = 0
    answered: Answered | None = None
    keep_alive_s: float = 0.0


@message("instances.expired")
class InstanceExpired:
    """Told to the ModelManager by a worker whose keep-alive has passed."""

    instance_id: str


@message("instances.died")
class InstanceDied:
    """Told to the ModelManager by a worker whose engine process has ended unasked."""

    instance_id: str
    reason: str


@message("instances.retire")
class Retire:
    """Finish running answers, take no more, stop the engine. Answered by None once the engine has left.

    Where the instance `was_idle` when it was chosen, those who have come meanwhile and wait for a slot are sent away
    with `Draining`; else they are answered first, too.
    """

    was_idle: bool = False


@message("instances.end_answers")
class EndAnswers:
    """Told to a worker: end running answers with `Preempted`, to be resumed elsewhere or later, and take no more."""


@message("instances.list")
class ListInstances:
    """Answered by a tuple of `InstanceStatus`."""


@message("instances.status")
class InstanceStatus:
    """A running instance as `ps` shows it; `expires_in_s` is 0.0 while it generates, inf if it is kept.

    `late_imports` names the modules of torch and their like that its engine had to import for it: none, if
    the fork server did its work.
    """

    instance_id: str
    model: ModelName
    node: NodeId
    pid: int
    active: int
    size_bytes: int
    expires_in_s: float
    late_imports: tuple[str, ...]
