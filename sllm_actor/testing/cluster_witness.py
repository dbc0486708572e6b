"""What is promised to clients and operators of a cluster, checked against what happens in a simulated one.

Each token once and in order; no request lost: one ends with its right answer, or with a typed error that faults
explain; one leader to an epoch, and no node follows one whose successor it has heard; nothing is left in the end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sllm_actor.actors.place import Place
from sllm_actor.domain import FinishReason
from sllm_actor.errors import SllmError
from sllm_actor.messages.generation import Finished, Generate, Tokens
from sllm_actor.runtime import Clock
from sllm_actor.testing.simulated_engine import answer_of
from sllm_actor.testing.simulated_node import SimulatedNode
from sllm_actor.testing.simulated_tiers import folder_of
from sllm_actor.testing.trace import Detail, TraceRecorder

MAX_PROBLEMS = 50
# What has happened shows for so long: a lease ends, a link is given up, a start is waited for in vain.
SHOWS_S = 12.0
# Faults of these kinds cost streams a pause alone, so many of them within the time that they show.
SURVIVED = ("engine", "crash of another")
MOST_SURVIVED = 1
# What may be seen of a node in which nothing is wrong.
AT_REST = ("model-manager", "node-keeper", "nodes", "router", "migration-coordinator")


class Fault:
    """Something that went wrong, from when to when, at which node."""

    def __init__(self, kind: str, node: str, begin_s: float) -> None:
        self.kind = kind
        self.node = node
        self.begin_s = begin_s
        self.end_s = float("inf")


class Asked:
    """One request of a client, and what has come of it."""

    def __init__(self, request: Generate, process: str, begin_s: float) -> None:
        path, sampling = str(folder_of(request.model)), request.sampling
        self.request = request
        self.process = process
        self.begin_s = begin_s
        self.right, self.reason = answer_of(path, request.prompt, sampling.seed, sampling.max_tokens)
        self.taken = 0
        self.outcome = ""


class Witness:
    """Is told everything, and judges it."""

    def __init__(self, clock: Clock, trace: TraceRecorder) -> None:
        self.problems: list[str] = []
        self.counts: dict[str, int] = {}
        self.faults: list[Fault] = []
        self.asked: list[Asked] = []
        # From then on nothing that happens counts.
        self.over = False
        self.on_event: Callable[[], None] = lambda: None
        self.on_fault: Callable[[str, str, str], None] = lambda kind, node, other: None
        self._clock = clock
        self._trace = trace
        self._leaders: dict[int, str] = {}

    def problem(self, text: str) -> None:
        """Note a broken promise."""
        if self.over:
            return
        self._trace.record("PROBLEM", text)
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(f"{self._clock.monotonic_s():.6f} {text}")

    def saw(self, who: str, what: str, *details: Detail) -> None:
        """Count and trace an event."""
        if self.over:
            return
        self.counts[what] = self.counts.get(what, 0) + 1
        self._trace.record(who, what, *details)
        self.on_event()

    # Faults.

    def begins(self, kind: str, node: str, other: str = "") -> Fault:
        """Note a fault that begins, of a node or of its link to another; whoever mends it says so."""
        self.on_fault(kind, node, other)
        self.saw(node, f"fault: {kind}")
        self.faults.append(Fault(kind, node, self._clock.monotonic_s()))
        return self.faults[-1]

    def ends(self, fault: Fault) -> None:
        """Note that a fault is mended."""
        fault.end_s = self._clock.monotonic_s()
        self.saw(fault.node, f"mended: {fault.kind}")

    # Clients.

    def asks(self, asked: Asked) -> None:
        """Note a request."""
        self.asked.append(asked)
        self.saw(asked.process, "asks", asked.request.request_id, asked.request.model, len(asked.right))

    def takes(self, asked: Asked, item: Any) -> None:
        """Judge an item of an answer: it must be the next one, and right."""
        name = f"{asked.request.request_id} at {asked.process}"
        if asked.outcome:
            self.problem(f"{name} goes on after its end")
        if isinstance(item, Tokens):
            self._take_tokens(asked, item, name)
        elif isinstance(item, Finished):
            if (asked.taken, item.reason, item.generated_tokens) != (len(asked.right), asked.reason, asked.taken):
                self.problem(f"{name} finishes after {asked.taken} of {len(asked.right)} tokens: {item.reason}")
            asked.outcome = "finished"
            self.saw(asked.process, "finished", asked.request.request_id)
        else:
            self.problem(f"{name} gets {type(item).__name__}")

    def _take_tokens(self, asked: Asked, item: Tokens, name: str) -> None:
        if item.index != asked.taken:
            self.problem(f"{name} gets token {item.index} and waits for {asked.taken}")
        right = asked.right[item.index : item.index + len(item.token_ids)]
        if item.token_ids != right:
            self.problem(f"{name} gets {item.token_ids} as token {item.index}, and not {right}")
        asked.taken = item.index + len(item.token_ids)
        self.saw(asked.process, "token", asked.request.request_id, item.index)

    def fails(self, asked: Asked, error: SllmError) -> None:
        """Judge an error: faults must explain it."""
        asked.outcome = error.code
        self.saw(asked.process, "failed", asked.request.request_id, error.code, error.message)
        if not self._explains(asked):
            shown = [f"{fault.kind} of {fault.node}" for fault in self._shown(asked)]
            text = f"{asked.request.request_id} at {asked.process} fails after {asked.taken} tokens"
            self.problem(f"{text}, which {shown or 'nothing'} does not explain: {error.code}: {error.message}")

    def _shown(self, asked: Asked) -> list[Fault]:
        return [fault for fault in self.faults if fault.end_s + SHOWS_S >= asked.begin_s]

    def _explains(self, asked: Asked) -> bool:
        """Tell whether more has gone wrong than may cost a stream no more than a pause."""
        shown, node = self._shown(asked), asked.process.partition("/")[0]
        kinds = ["crash of another" if one.kind == "crash" and one.node != node else one.kind for one in shown]
        return len(kinds) > MOST_SURVIVED or any(kind not in SURVIVED for kind in kinds)

    # Leaders.

    def look_at_epochs(self, node: SimulatedNode) -> None:
        """Have the node's acceptance of leaders judged from now on."""
        place: Place = node.cluster.place
        check, heard = place.check, 0

        def judged(leader_epoch: int) -> None:
            nonlocal heard
            check(leader_epoch)
            self.saw(node.process, "accepts", leader_epoch)
            if place.epoch is None:
                self.problem(f"{node.process} begins something and is no member")
            if leader_epoch < heard:
                self.problem(f"{node.process} follows the leader of epoch {leader_epoch} after that of {heard}")
            heard = max(heard, leader_epoch)

        place.check = judged  # type: ignore[method-assign]  # What it lets pass is what matters.

    def look_at_leaders(self, nodes: list[SimulatedNode]) -> None:
        """Judge who leads at this moment."""
        leading = []
        for node in nodes:
            leadership = node.cluster._leadership
            seat = leadership.seat if leadership is not None else None
            if seat is None:
                continue
            leading.append(node.process)
            if self._leaders.setdefault(seat.epoch, node.process) != node.process:
                self.problem(f"{node.process} and {self._leaders[seat.epoch]} have led in epoch {seat.epoch}")
        if len(leading) > 1:
            self.problem(f"{' and '.join(leading)} lead at once")

    # The end.

    def look_at_rest(self, node: SimulatedNode) -> None:
        """Judge what a node has after everybody was served and every keep-alive has passed."""
        manager, router, left = node.actor("model-manager"), node.actor("router"), dict[str, Any]()
        left["actors"] = [name for name in node.system.names() if name not in AT_REST and "scheduler-" not in name]
        left["instances"] = list(manager._instances)
        left["starts"] = [*manager._starting, *router._starts]
        left["routes"] = [*router._routes._by_model, *router._routes._outstanding]
        left["waiting"] = list(node.actors.room.waiting())
        left["leases"] = [] if node.tiers.loader.is_idle else [one.holders for one in node.tiers.loader.residents()]
        idle = node.pool.idle_engines
        left["engines"] = [one.pid for one in node.engines][idle:] if len(node.engines) > idle else []
        left["requests"] = [one.request_id for one in router._log.timelines() if one.outcome == "running"]
        for scheduler in [name for name in node.system.names() if "scheduler-" in name]:
            owner = node.actor(scheduler)
            left["placements"] = list(owner._granted)
            left["questions"] = [one.question.request_id for one in owner._waiting]
        for what, things in left.items():
            if things:
                self.problem(f"{node.process} still has {what}: {things}")


class LogWatch(logging.Handler):
    """Traces what the cluster logs; a task that failed and that nobody looked after is a problem."""

    def __init__(self, witness: Witness, trace: TraceRecorder) -> None:
        super().__init__(logging.WARNING)
        self._witness = witness
        self._trace = trace

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if self._witness.over:
            return
        self._trace.record("log", record.levelname, record.getMessage())
        if error is not None:
            self._witness.problem(f"logged: {record.getMessage()} {error!r}")


def ended_well(asked: Asked) -> bool:
    """Tell whether a request got its whole answer."""
    return asked.outcome == "finished" and asked.reason in FinishReason
