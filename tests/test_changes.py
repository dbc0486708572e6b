"""Which nodes have changed since somebody looked."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sllm_actor.domain import NodeId
from sllm_actor.policy.changes import Changes

NODES = [NodeId(name) for name in "abcdef"]


@given(st.lists(st.sampled_from(NODES), max_size=40), st.integers(1, 8), st.data())
def test_all_that_have_changed_since_are_named_or_it_says_that_it_can_not_tell(
    noted: list[NodeId], most: int, data: st.DataObject
) -> None:
    changes = Changes(most)
    for node in noted:
        changes.note(node)
    assert changes.revision == len(noted)
    since = data.draw(st.integers(-1, len(noted)))
    found = changes.since(since)
    if found is not None:
        assert since >= 0 and set(found) == set(noted[since:])
        assert len(found) == len(set(found)) <= most
    elif since >= 0:
        assert len({*noted}) > most


def test_who_has_never_looked_is_told_to_look_at_all() -> None:
    assert Changes().since(-1) is None
    assert Changes().since(0) == []
