"""The table of a migration: nothing is undefined, all ends, and what the manual shows is it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_actor.policy.migration import TABLE, Command, Event, State, diagram, rows, step

MANUAL = Path(__file__).parent.parent / "docs" / "migration.md"
ENDS = set(State) - set(TABLE)


def test_what_can_happen_is_answered_in_each_state() -> None:
    assert {State.MOVED, State.ABORTED} == ENDS
    only = {State.PLACING: {Event.READY}, State.RESUMING: {Event.HANDED_OVER}}
    for state, events in TABLE.items():
        others = set(Event) - {Event.READY, Event.HANDED_OVER}
        assert set(events) == others | only[state]


def test_an_event_that_can_not_happen_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        step(State.PLACING, Event.HANDED_OVER)
    with pytest.raises(KeyError):
        step(State.MOVED, Event.READY)


@given(st.data())
def test_without_another_destination_lost_every_migration_ends_in_two_steps(data: st.DataObject) -> None:
    state, taken = State.PLACING, 0
    while state not in ENDS:
        events = [event for event in TABLE[state] if event is not Event.DESTINATION_LOST]
        state, _ = step(state, data.draw(st.sampled_from(events)))
        taken += 1
    assert taken <= 2


def test_where_it_does_not_move_somebody_goes_on_with_the_answer_unless_it_has_ended() -> None:
    going_on = {Command.GO_ON, Command.RESUME_FROM_LOG, Command.GO_ON_ALONE}
    for events in TABLE.values():
        for event, (state, commands) in events.items():
            if state is State.ABORTED:
                assert bool(going_on & set(commands)) == (event is not Event.ENDED)


def test_the_manual_shows_this_table() -> None:
    manual = MANUAL.read_text()
    assert f"```mermaid\n{diagram()}\n```" in manual
    assert rows() in manual
