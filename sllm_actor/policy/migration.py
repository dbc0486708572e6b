"""What a migration does when: one table of state and event, to state and commands. Pure.

Source: ServerlessLLM (OSDI '24), section 5 and its table of failures. Who carries out a command is in its text.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple


class State(enum.StrEnum):
    """How far a migration is. Those without a row in the table are its ends."""

    PLACING = "placing"
    RESUMING = "resuming"
    MOVED = "moved"
    ABORTED = "aborted"


class Event(enum.StrEnum):
    """What can happen to it."""

    READY = "ready"
    NO_PLACE = "no place"
    DESTINATION_LOST = "destination lost"
    HANDED_OVER = "handed over"
    ENDED = "answer ended"
    SOURCE_LOST = "source lost"
    COORDINATOR_LOST = "coordinator lost"


class Command(enum.StrEnum):
    """What is to be done then, and by whom."""

    PREPARE = "coordinator: have the source prepare the destination, round by round"
    CHOOSE_ANOTHER = "coordinator: ask for another destination"
    GO_ON = "source: go on, unaware to the client"
    DROP = "destination: drop what is prepared"
    SWITCH = "Router: go on at the destination, in the next epoch"
    RESUME_FROM_LOG = "Router: go on from its log, wherever that is soonest"
    GO_ON_ALONE = "source and destination: go on alone, to the hand-over or its failure"


class Step(NamedTuple):
    """Where an event leads."""

    state: State
    commands: tuple[Command, ...]


TABLE: Mapping[State, Mapping[Event, Step]] = {
    State.PLACING: {
        Event.READY: Step(State.RESUMING, (Command.PREPARE,)),
        Event.NO_PLACE: Step(State.ABORTED, (Command.GO_ON,)),
        Event.DESTINATION_LOST: Step(State.PLACING, (Command.CHOOSE_ANOTHER, Command.GO_ON)),
        Event.ENDED: Step(State.ABORTED, ()),
        Event.SOURCE_LOST: Step(State.ABORTED, (Command.RESUME_FROM_LOG,)),
        Event.COORDINATOR_LOST: Step(State.ABORTED, (Command.GO_ON,)),
    },
    State.RESUMING: {
        Event.HANDED_OVER: Step(State.MOVED, (Command.SWITCH,)),
        Event.NO_PLACE: Step(State.ABORTED, (Command.GO_ON,)),
        Event.DESTINATION_LOST: Step(State.PLACING, (Command.CHOOSE_ANOTHER, Command.GO_ON)),
        Event.ENDED: Step(State.ABORTED, (Command.DROP,)),
        Event.SOURCE_LOST: Step(State.ABORTED, (Command.DROP, Command.RESUME_FROM_LOG)),
        Event.COORDINATOR_LOST: Step(State.ABORTED, (Command.GO_ON_ALONE,)),
    },
}


def step(state: State, event: Event) -> Step:
    """Take an event; one that a state does not know is a mistake in the program."""
    return TABLE[state][event]


def diagram() -> str:
    """Draw the table as a Mermaid state diagram, for `docs/migration.md`."""
    lines = ["stateDiagram-v2", f"    [*] --> {State.PLACING.value}"]
    lines += [
        f"    {state.value} --> {to.state.value}: {event.value}"
        for state, events in TABLE.items()
        for event, to in events.items()
    ]
    lines += [f"    {state.value} --> [*]" for state in State if state not in TABLE]
    return "\n".join(lines)


def rows() -> str:
    """Write the table as Markdown, for `docs/migration.md`."""
    lines = ["| state | event | state | commands |", "|---|---|---|---|"]
    lines += [
        f"| {state.value} | {event.value} | {to.state.value} | {'; '.join(to.commands)} |"
        for state, events in TABLE.items()
        for event, to in events.items()
    ]
    return "\n".join(lines)
