"""How far the moves of running answers are in a simulated cluster, and which faults met them there.

Nothing of this is in production code: what an engine hears and says tells each step, and a prompt whose answer it is.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Mapping

from sllm_actor.domain import RequestId
from sllm_actor.testing.cluster_witness import Asked, Witness
from sllm_actor.testing.simulated_engine import Heard
from sllm_actor.testing.simulated_node import Home


class Step(enum.StrEnum):
    """How far a move is, as engines and clients see it."""

    PLACING = "placing"
    PREPARING = "preparing"
    PREPARED = "prepared"
    ROUND = "in a round"
    HANDED_OVER = "handed over"
    TAKEN_OVER = "taken over"
    AFTER = "after it"


class Met(enum.StrEnum):
    """What can happen to it: a kind of fault, and whom it hits."""

    CRASH_SOURCE = "crash of the source"
    CRASH_DESTINATION = "crash of the destination"
    CRASH_ROUTER = "crash of the router's node"
    CRASH_COORDINATOR = "crash of the coordinator"
    CRASH_LEADER = "crash of the leader"
    ENGINE_SOURCE = "death of the source's engine"
    ENGINE_DESTINATION = "death of the destination's engine"
    PAUSE_SOURCE = "pause of the source"
    PAUSE_DESTINATION = "pause of the destination"
    PAUSE_ROUTER = "pause of the router's node"
    LINK_BOTH = "link from source to destination"
    LINK_SOURCE = "link from router to source"
    LINK_DESTINATION = "link from router to destination"


# Where a destination is still being started, it has no engine for the answer.
NEVER = {(Step.PLACING, Met.ENGINE_DESTINATION)}
CELLS = [(step, met) for step in Step for met in Met if (step, met) not in NEVER]
LINKS = ("partition", "one way", "cut")


class Move:
    """One answer on its way from one node to another."""

    def __init__(self, asked: Asked, coordinator: str, source: Home, to: str) -> None:
        self.asked = asked
        self.router = asked.process.partition("/")[0]
        self.coordinator = coordinator
        self.source = source
        self.destination = Home(to, "", 0)
        self.step = Step.PLACING


class MoveWatch:
    """Follows every move, counts the faults that meet it, and tells those who aim at one."""

    def __init__(self, witness: Witness, leader: Callable[[], str | None]) -> None:
        self._witness = witness
        self._leader = leader
        self._asked: dict[bytes, Asked] = {}
        self._homes: dict[RequestId, Home] = {}
        self._owners: dict[tuple[RequestId, int], Home] = {}
        self._moves: dict[RequestId, Move] = {}
        self._aims: list[tuple[Step, Met, asyncio.Future[Move | None]]] = []
        witness.on_fault = self._meets

    # What happens.

    def asks(self, asked: Asked) -> None:
        """Know a request by its prompt."""
        assert asked.request.prompt not in self._asked, "prompts are long enough to be told apart"
        self._asked[asked.request.prompt] = asked

    def begins(self, asked: Asked, coordinator: str, to: str) -> None:
        """Note that an answer is to be moved, if it is generated anywhere."""
        request_id = asked.request.request_id
        source = self._homes.get(request_id)
        if source is not None and request_id not in self._moves and not asked.outcome:
            self._moves[request_id] = Move(asked, coordinator, source, to)
            self._reach(self._moves[request_id], Step.PLACING)

    def refused(self, asked: Asked) -> None:
        """Note that it stays where it is."""
        move = self._moves.get(asked.request.request_id)
        if move is not None and move.step in (Step.PLACING, Step.PREPARING, Step.PREPARED, Step.ROUND):
            del self._moves[asked.request.request_id]

    def drains(self, node: str) -> None:
        """Note that all that a node generates is to be moved."""
        for request_id, home in list(self._homes.items()):
            asked = next(one for one in self._asked.values() if one.request.request_id == request_id)
            if home.node == node:
                self.begins(asked, node, "")

    def given(self, asked: Asked) -> None:
        """Note that its client was given something, and what has come of it."""
        move = self._moves.get(asked.request.request_id)
        if move is not None and move.step is Step.TAKEN_OVER:
            self._reach(move, Step.AFTER)

    def over(self, asked: Asked) -> None:
        """Note that its stream has ended."""
        self._moves.pop(asked.request.request_id, None)
        self._homes.pop(asked.request.request_id, None)

    def hears(self, home: Home, heard: Heard, prompt: bytes, epoch: int) -> None:
        """Take what an engine heard or said of a request."""
        asked = self._asked.get(prompt)
        if asked is None:
            return
        request_id = asked.request.request_id
        if heard in (Heard.GENERATE, Heard.TAKE_OVER):
            self._owns(request_id, epoch, home)
            if not asked.outcome:
                self._homes[request_id] = home
        move = self._moves.get(request_id)
        if heard is Heard.GENERATE:
            self._moves.pop(request_id, None)
        elif heard is Heard.PARK and not asked.outcome and request_id in self._homes:
            if move is None:
                source = self._homes[request_id]
                move = self._moves[request_id] = Move(asked, source.node, source, home.node)
            elif move.step is Step.AFTER:
                move.source, move.coordinator = self._homes[request_id], self._homes[request_id].node
            move.destination = home
            self._reach(move, Step.PREPARING)
        elif move is None or home != move.destination:
            return  # It has begun anew.
        elif heard is not Heard.PARKED or move.step is Step.PREPARING:
            self._reach(move, _STEPS[heard])

    def _owns(self, request_id: RequestId, epoch: int, home: Home) -> None:
        owner = self._owners.setdefault((request_id, epoch), home)
        if owner != home:
            self._witness.problem(f"{request_id} is generated at {owner} and {home} in epoch {epoch}")

    def _reach(self, move: Move, step: Step) -> None:
        move.step = step
        self._witness.saw(move.source.node, f"move: {step}", move.asked.request.request_id, move.destination.node)
        for aim in self._aims:
            aimed, met, hit = aim
            if aimed is step and not hit.done() and self.target(move, met) is not None:
                hit.set_result(move)
                self._aims.remove(aim)
                return

    # Faults.

    def aim(self, step: Step, met: Met) -> asyncio.Future[Move | None]:
        """Give the next move that reaches a step and has whom to hit; nothing where there is none to the end."""
        hit: asyncio.Future[Move | None] = asyncio.get_running_loop().create_future()
        self._aims.append((step, met, hit))
        return hit

    def end_aims(self) -> None:
        """Wait for no more moves."""
        for _, _, hit in self._aims:
            hit.set_result(None)
        self._aims.clear()

    def target(self, move: Move, met: Met) -> tuple[str, str] | None:
        """Name the node that a fault hits, or the two ends of a link; nothing where that is nobody, or another fault.

        A crash of the router's node takes the client with it, and so counts as nothing else.
        """
        source, destination, router = move.source.node, move.destination.node, move.router
        leader = self._leader() if met is Met.CRASH_LEADER else None
        pairs = {
            Met.CRASH_SOURCE: (source, router), Met.CRASH_DESTINATION: (destination, router),
            Met.CRASH_ROUTER: (router, ""), Met.CRASH_COORDINATOR: (move.coordinator, router),
            Met.CRASH_LEADER: (leader or "", router), Met.ENGINE_SOURCE: (source, ""),
            Met.ENGINE_DESTINATION: (destination if move.destination.pid else "", ""),
            Met.PAUSE_SOURCE: (source, router), Met.PAUSE_DESTINATION: (destination, router),
            Met.PAUSE_ROUTER: (router, ""), Met.LINK_BOTH: (source, destination), Met.LINK_SOURCE: (router, source),
            Met.LINK_DESTINATION: (router, destination),
        }  # fmt: skip
        hit, other = pairs[met]
        needs_other = met in (Met.LINK_BOTH, Met.LINK_SOURCE, Met.LINK_DESTINATION)
        if not hit or hit == other or (needs_other and not other):
            return None
        return hit, other

    def _meets(self, kind: str, node: str, other: str) -> None:
        for move in self._moves.values():
            for met in _OF_KIND.get(kind, ()):
                target = self.target(move, met)
                if target is None:
                    continue
                if {node, other} == set(target) if kind in LINKS else target[0] == node:
                    self._count(move, met)

    def meets_engine(self, move: Move, met: Met) -> None:
        """Count the death of an engine that a move needs."""
        if self._moves.get(move.asked.request.request_id) is move:
            self._count(move, met)

    def _count(self, move: Move, met: Met) -> None:
        self._witness.saw(move.source.node, cell(move.step, met), move.asked.request.request_id)


_STEPS = {
    Heard.PARKED: Step.PREPARED,
    Heard.EXTEND: Step.ROUND,
    Heard.HANDED_OVER: Step.HANDED_OVER,
    Heard.TAKE_OVER: Step.TAKEN_OVER,
}
_OF_KIND: Mapping[str, tuple[Met, ...]] = {
    "crash": (Met.CRASH_SOURCE, Met.CRASH_DESTINATION, Met.CRASH_ROUTER, Met.CRASH_COORDINATOR, Met.CRASH_LEADER),
    "pause": (Met.PAUSE_SOURCE, Met.PAUSE_DESTINATION, Met.PAUSE_ROUTER),
    **dict.fromkeys(LINKS, (Met.LINK_BOTH, Met.LINK_SOURCE, Met.LINK_DESTINATION)),
}
_PREFIX = "met "


def kind_of(met: Met) -> str:
    """Name the kind of a fault; nothing for those of links, of which there are several."""
    if met in (Met.ENGINE_SOURCE, Met.ENGINE_DESTINATION):
        return "engine"
    return next((kind for kind in ("crash", "pause") if met in _OF_KIND[kind]), "")


def cell(step: Step, met: Met) -> str:
    """Name what is counted when a fault meets a move at a step."""
    return f"{_PREFIX}{step}: {met}"


def empty_cells(counts: Mapping[str, int]) -> list[str]:
    """Name what has never happened."""
    return [cell(step, met) for step, met in CELLS if not counts.get(cell(step, met))]


def table(counts: Mapping[str, int]) -> str:
    """Write how often each fault met a move at each step."""
    steps = [step.value for step in Step]
    lines = [f"{'':34}" + "".join(f"{step:>12}" for step in steps)]
    for met in Met:
        shown = ["-" if (step, met) in NEVER else str(counts.get(cell(step, met), 0)) for step in Step]
        lines.append(f"{met.value:34}" + "".join(f"{count:>12}" for count in shown))
    return "\n".join(lines)


def other_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """Give what is counted beside the table."""
    return {what: count for what, count in counts.items() if not what.startswith(_PREFIX)}
