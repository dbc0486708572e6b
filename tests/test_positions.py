"""Where a client is in a stream: whatever the order of its choices, it gets each event once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_actor.errors import InvalidRequest
from sllm_actor.frontend.positions import Place, place_behind

ORDERS = st.lists(st.integers(0, 2), max_size=30)


def told(place: Place, order: list[int]) -> list[tuple[str, int]]:
    """Make events of choices in this order, and the usage; give the ids of those that are sent, and the choices."""
    sent = [(place.event_id().decode(), choice) for choice in order if place.count(choice)]
    place.check_end()
    return [*sent, (place.event_id().decode(), -1)] if place.count_usage() else sent


@given(order=ORDERS, data=st.data())
def test_behind_each_event_the_rest_comes_in_any_order_and_nothing_twice(order: list[int], data: st.DataObject) -> None:
    whole = told(Place(3), order)
    assert len({event_id for event_id, _ in whole}) == len(whole)
    read = data.draw(st.integers(0, len(whole)))
    again = data.draw(st.permutations(order))
    behind = whole[read - 1][0] if read else ""
    rest = told(place_behind(behind, 3, usage=True), again)
    assert sorted(choice for _, choice in whole[:read] + rest) == sorted(choice for _, choice in whole)
    if rest:
        assert rest[-1][0] == whole[-1][0], "both clients are where all has been read"


def test_an_id_is_not_behind_what_its_client_had_before() -> None:
    place = place_behind("2,5", 2, usage=False)
    assert [place.count(0) for _ in range(3)] == [False, False, True]
    assert place.event_id() == b"3,5"


@pytest.mark.parametrize("text", ["1", "1,2,3", "1,", ",", "1,2+", "1,2+2", "1,2+1", "-1,2", "1,2 ", "0x1,2", "1" * 10])
def test_what_is_no_id_of_such_a_stream_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="no id") as refused:
        place_behind(text, 2, usage=False)
    assert refused.value.param == "Last-Event-ID"


def test_a_position_behind_the_end_is_refused_once_that_is_known() -> None:
    place = place_behind("3", 1, usage=True)
    assert not place.count(0)
    with pytest.raises(InvalidRequest, match="fewer events"):
        place.check_end()
