"""Where a model starts: soonest first, within slots and memory, giving up what has been idle longest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sllm_actor.domain import ModelName, NodeId, RequestId
from sllm_actor.messages.placement import InstanceView, NodeReport, PlaceModel
from sllm_actor.policy.bandwidth import SMALLEST_BYTES, WEIGHT, corrected
from sllm_actor.policy.cluster_view import ClusterView
from sllm_actor.policy.estimator import FIRST_LEAVE_S, Estimator
from sllm_actor.policy.node_view import Grant
from sllm_actor.policy.offers import Action
from sllm_actor.policy.placement import ABLE, QUIET, Decision, Evict, MakeRoom, Start, Wait
from sllm_actor.policy.placement import decide as decide_in
from sllm_actor.policy.placement import fits_nowhere as fits_nowhere_in
from sllm_actor.policy.policies import Situation
from sllm_actor.units import GIB

NOBODY: frozenset[str] = frozenset()


def question(size_bytes: int = GIB, host_bytes: int = GIB, **more: Any) -> PlaceModel:
    return PlaceModel(
        request_id=RequestId("r"),
        model=ModelName("m"),
        fingerprint="print",
        size_bytes=size_bytes,
        host_bytes=host_bytes,
        timeout_s=1.0,
        **more,
    )


def instance(
    instance_id: str, *, active: int = 0, idle_since_s: float = 0.0, host_bytes: int = GIB, **more: Any
) -> InstanceView:
    return InstanceView(
        instance_id=instance_id,
        model=ModelName(f"model-of-{instance_id}"),
        active=active,
        idle_since_s=idle_since_s,
        host_bytes=host_bytes,
        **more,
    )


def node(
    name: str,
    *,
    instances: Sequence[InstanceView] = (),
    pinned: dict[str, int] | None = None,
    slots: int = 4,
    pool_bytes: int = 16 * GIB,
    in_host_memory: bool = False,
    ssd_bytes_per_s: float = 1e9,
    queue_s: float = 0.0,
    on_ssd: bool = True,
    remote_bytes_per_s: float = 1e8,
    remote_queue_s: float = 0.0,
    host_fingerprints: tuple[str, ...] = ("other",),
) -> NodeReport:
    return NodeReport(
        node=NodeId(name),
        manager=f"manager-{name}",
        slots=slots,
        host_pool_bytes=pool_bytes,
        instances=tuple(instances),
        pinned_host_bytes=pinned or {},
        ended_placements=(),
        starting=(),
        host_fingerprints=("print",) if in_host_memory else host_fingerprints,
        ssd_fingerprints=("print",) if on_ssd else (),
        ssd_bytes_per_s=ssd_bytes_per_s,
        disk_queues_s={"print": queue_s, "other": 999.0},
        remote_bytes_per_s=remote_bytes_per_s,
        remote_queue_s=remote_queue_s,
    )


def view_of(
    nodes: Iterable[NodeReport], grants: Iterable[Grant] = (), leaving: Iterable[str] = (), now_s: float = 0.0
) -> ClusterView:
    view, gone = ClusterView(), set(leaving)
    for report in nodes:
        view.hear(report, now_s)
        view.give_up(report.node, [one.instance_id for one in report.instances if one.instance_id in gone])
    for number, grant in enumerate(grants):
        view.grant(f"placement-{number}", grant)
    return view


def decide(
    asked: PlaceModel,
    nodes: Iterable[NodeReport],
    grants: Iterable[Grant] = (),
    leaving: frozenset[str] = NOBODY,
    *,
    policy: str = "startup_time",
    estimator: Estimator | None = None,
    waited_s: float = 0.0,
    able: frozenset[Action] = ABLE,
    **more: Any,
) -> Decision:
    situation = Situation(
        view_of(nodes, grants, leaving), estimator or Estimator(), asked, now_s=0.0, waited_s=waited_s,
        locality_wait_s=10.0, able=able, **more,
    )  # fmt: skip
    return decide_in(situation, policy)


def fits_nowhere(asked: PlaceModel, nodes: Sequence[NodeReport]) -> str:
    return fits_nowhere_in(asked, view_of(nodes))


def started_on(decision: Decision) -> str:
    assert isinstance(decision, Start)
    return decision.report.node


def test_a_node_that_holds_the_model_in_memory_starts_it_soonest() -> None:
    nodes = [node("a", ssd_bytes_per_s=9e9), node("b", in_host_memory=True)]
    decision = decide(question(), nodes, [], NOBODY)
    assert isinstance(decision, Start)
    assert (decision.report.node, decision.estimate_s) == ("b", 0.0)
    assert decision.explanation.reason == "b holds it in host memory"


def test_of_two_disks_the_faster_one_wins_and_the_estimate_says_why() -> None:
    nodes = [node("a", ssd_bytes_per_s=1e9), node("b", ssd_bytes_per_s=2e9)]
    decision = decide(question(size_bytes=4 * 10**9), nodes, [], NOBODY)
    assert isinstance(decision, Start)
    assert (decision.report.node, decision.estimate_s) == ("b", 2.0)
    assert "4.0 GB at 2.00 GB/s" in decision.explanation.reason


def test_a_long_queue_loses_to_a_slower_disk_and_a_short_one_does_not() -> None:
    slower = node("a", ssd_bytes_per_s=1e9)
    assert started_on(decide(question(), [slower, node("b", ssd_bytes_per_s=4e9, queue_s=9.0)], [], NOBODY)) == "a"
    assert started_on(decide(question(), [slower, node("b", ssd_bytes_per_s=4e9, queue_s=0.1)], [], NOBODY)) == "b"


def test_a_node_that_has_seen_no_bandwidth_is_expected_to_be_as_the_middle_one_of_the_others() -> None:
    unseen = node("a", ssd_bytes_per_s=0.0)
    others = [node(name, queue_s=1.0, ssd_bytes_per_s=seen) for name, seen in (("b", 2e9), ("c", 4e9), ("d", 1e9))]
    decision = decide(question(size_bytes=4 * 10**9), [unseen, *others], [], NOBODY)
    assert isinstance(decision, Start) and (decision.report.node, decision.estimate_s) == ("a", 2.0)
    assert "4.0 GB at 2.00 GB/s" in decision.explanation.reason
    fetching = [node("a", on_ssd=False, remote_bytes_per_s=0.0), node("b", on_ssd=False, remote_bytes_per_s=1e9)]
    fetched = decide(question(size_bytes=4 * 10**9), fetching, [], NOBODY)
    assert isinstance(fetched, Start) and (fetched.report.node, fetched.estimate_s) == ("a", 4.0)


def test_where_no_node_has_seen_a_bandwidth_one_is_assumed_and_without_that_the_start_takes_for_ever() -> None:
    unseen, view = node("a", ssd_bytes_per_s=0.0), ClusterView(2e9, 1e8)
    only = decide(question(), [unseen])
    assert isinstance(only, Start) and only.estimate_s == float("inf")
    view.hear(unseen, 0.0)
    situation = Situation(view, Estimator(), question(size_bytes=4 * 10**9), now_s=0.0)
    assumed = decide_in(situation, "startup_time")
    assert isinstance(assumed, Start) and assumed.estimate_s == 2.0
    # One that others have told of counts as long as they are there.
    view.hear(node("b", on_ssd=False, ssd_bytes_per_s=4e9), 0.0)
    assert view.nodes[NodeId("a")].ssd_bytes_per_s == 4e9
    view.forget(NodeId("b"))
    assert view.nodes[NodeId("a")].ssd_bytes_per_s == 2e9


def test_equal_nodes_are_chosen_by_name_whatever_their_order() -> None:
    nodes = [node("b"), node("a"), node("c")]
    assert started_on(decide(question(), nodes, [], NOBODY)) == "a"
    assert started_on(decide(question(), nodes[::-1], [], NOBODY)) == "a"


def test_a_full_node_loses_to_a_slower_one_with_a_slot() -> None:
    full = node("a", in_host_memory=True, slots=1, instances=[instance("i", active=1, running_s=99.0)])
    assert started_on(decide(question(), [full, node("b", queue_s=60.0)], [], NOBODY, able=QUIET)) == "b"


def test_memory_is_room_too() -> None:
    tight = node("a", pool_bytes=2 * GIB, instances=[instance("i", active=1)])
    assert started_on(decide(question(host_bytes=GIB), [tight], [], NOBODY)) == "a"
    assert isinstance(decide(question(host_bytes=GIB + 1), [tight], [], NOBODY), Wait)


def test_what_is_pinned_in_memory_takes_its_room_from_all_but_itself() -> None:
    tight = node("a", pool_bytes=2 * GIB, pinned={"another": GIB})
    assert started_on(decide(question(host_bytes=GIB), [tight], [], NOBODY)) == "a"
    assert isinstance(decide(question(host_bytes=GIB + 1), [tight], [], NOBODY), Wait)
    # An idle instance of what is pinned would leave its memory where it is.
    full = node("a", pool_bytes=2 * GIB, pinned={"another": 2 * GIB}, instances=[instance("i", host_bytes=0)])
    assert isinstance(decide(question(), [full], [], NOBODY), Wait)
    own = node("a", pool_bytes=2 * GIB, pinned={"print": 2 * GIB})
    assert started_on(decide(question(host_bytes=2 * GIB), [own], [], NOBODY)) == "a"


def test_what_would_fit_one_day_waits_and_what_never_would_is_told_why() -> None:
    busy = [instance("i", active=1, host_bytes=2 * GIB)]
    nodes = [node("a", pool_bytes=GIB), node("b", pool_bytes=2 * GIB, instances=busy)]
    assert fits_nowhere(question(host_bytes=2 * GIB), nodes) == ""
    assert (
        fits_nowhere(question(host_bytes=2 * GIB + 1), nodes)
        == "m needs 2.1 GB of host memory, the pool has 2.1 GB: raise host_pool_bytes"
    )
    assert fits_nowhere(question(), []) == "", "no node has told of itself yet"


def test_pins_count_where_it_is_asked_whether_a_model_ever_fits() -> None:
    nodes = [node("a", pool_bytes=GIB), node("b", pool_bytes=2 * GIB, pinned={"another": GIB, "print": GIB})]
    assert fits_nowhere(question(host_bytes=GIB), nodes) == ""
    assert "of which other models have 1.1 GB pinned: unpin one" in fits_nowhere(question(host_bytes=2 * GIB), nodes)
    own = node("b", pool_bytes=2 * GIB, pinned={"print": 2 * GIB})
    assert fits_nowhere(question(host_bytes=2 * GIB), [own]) == ""


def test_grants_take_slots_and_memory_of_their_node_until_its_report_shows_them() -> None:
    alone = [node("a", slots=2, pool_bytes=2 * GIB)]
    one = Grant(NodeId("a"), GIB, expires_s=0.0)
    assert started_on(decide(question(), alone, [one], NOBODY)) == "a"
    assert isinstance(decide(question(), alone, [one, one], NOBODY), Wait)
    assert isinstance(decide(question(), alone, [Grant(NodeId("a"), 2 * GIB, 0.0)], NOBODY), Wait)
    assert started_on(decide(question(), alone, [Grant(NodeId("b"), 2 * GIB, 0.0)] * 9, NOBODY)) == "a"


def test_grants_that_come_as_an_iterator_count_for_every_node() -> None:
    nodes = [node("a", slots=1), node("b", slots=1)]
    grants = iter([Grant(NodeId("a"), GIB, 0.0), Grant(NodeId("b"), GIB, 0.0)])
    assert isinstance(decide(question(), nodes, grants, NOBODY), Wait)


def test_the_instance_that_has_been_idle_longest_is_given_up() -> None:
    instances = [
        instance("new", idle_since_s=50.0),
        instance("busy", active=1, idle_since_s=0.0),
        instance("old", idle_since_s=10.0),
    ]
    decision = decide(question(), [node("a", slots=3, instances=instances)], [], NOBODY)
    assert isinstance(decision, Evict)
    assert decision.victims[0].instance_id == "old"
    assert "model-of-old" in decision.explanation.reason


def test_an_idle_instance_is_given_up_where_that_is_sooner_than_a_slot_that_is_free_elsewhere() -> None:
    full = node("a", slots=1, instances=[instance("idle")])
    assert isinstance(decide(question(), [full, node("b", queue_s=60.0)]), Evict)
    assert started_on(decide(question(), [full, node("b", queue_s=FIRST_LEAVE_S / 2)])) == "b"


def test_an_instance_that_generates_is_never_given_up() -> None:
    full = node("a", slots=2, instances=[instance("x", active=1), instance("y", active=3)])
    assert isinstance(decide(question(), [full], [], NOBODY), Wait)


def test_an_instance_that_is_leaving_is_waited_for_and_no_second_one_given_up() -> None:
    full = node("a", slots=2, instances=[instance("leaving"), instance("idle")])
    assert isinstance(decide(question(), [full], [], NOBODY), Evict)
    decision = decide(question(), [full], [], frozenset({"leaving"}))
    assert isinstance(decision, Wait)
    assert "leaving a" in decision.reason


def test_an_instance_whose_end_would_not_make_room_is_left_alone() -> None:
    full = node("a", pool_bytes=4 * GIB, instances=[instance("busy", active=1, host_bytes=3 * GIB), instance("idle")])
    assert isinstance(decide(question(host_bytes=2 * GIB), [full], [], NOBODY), Wait)
    assert isinstance(decide(question(host_bytes=GIB), [full], [], NOBODY), Evict)
    assert isinstance(
        decide(question(host_bytes=5 * GIB), [node("a", pool_bytes=4 * GIB, instances=[instance("idle")])], [], NOBODY),
        Wait,
    )


def test_without_nodes_there_is_nothing_but_to_wait() -> None:
    assert isinstance(decide(question(), [], [], NOBODY), Wait)


instances = st.builds(
    instance,
    st.integers(0, 99).map(str),
    active=st.integers(0, 2),
    idle_since_s=st.floats(0, 100),
    host_bytes=st.integers(0, 4),
)
nodes = st.builds(
    node,
    st.sampled_from("abc"),
    instances=st.lists(instances, max_size=5, unique_by=lambda one: one.instance_id),
    slots=st.integers(0, 5),
    pool_bytes=st.integers(0, 12),
    in_host_memory=st.booleans(),
    ssd_bytes_per_s=st.floats(0, 1e10),
    queue_s=st.floats(0, 100),
)
grants = st.builds(Grant, st.sampled_from("abc").map(NodeId), st.integers(0, 4), st.just(0.0), st.integers(1, 2))


@given(
    st.lists(nodes, max_size=3, unique_by=lambda one: one.node),
    st.lists(grants, max_size=5),
    st.integers(1, 10**12),
    st.integers(0, 6),
    st.frozensets(st.integers(0, 99).map(str), max_size=40),
)
def test_a_start_never_exceeds_slots_or_pool_and_a_victim_is_always_idle_and_of_use(
    reports: list[NodeReport], open_grants: list[Grant], size_bytes: int, host_bytes: int, leaving: frozenset[str]
) -> None:
    decision = decide(question(size_bytes, host_bytes), reports, open_grants, leaving)
    assert decision == decide(question(size_bytes, host_bytes), reports[::-1], open_grants[::-1], leaving)
    if isinstance(decision, Wait):
        return
    report = decision.report
    here = [grant for grant in open_grants if grant.node == report.node]
    held_bytes = host_bytes + sum(grant.host_bytes for grant in here)
    if isinstance(decision, Start):
        assert len(report.instances) + sum(grant.slots for grant in here) + 1 <= report.slots
        assert held_bytes + sum(one.host_bytes for one in report.instances) <= report.host_pool_bytes
        assert decision.estimate_s >= 0
    elif isinstance(decision, MakeRoom):
        assert all(move.instance.active and move.to != report.node for move in decision.offer.moves)
        assert {move.instance for move in decision.offer.moves} <= set(decision.offer.leaving) <= set(report.instances)
        assert {one.instance_id for one in decision.offer.leaving}.isdisjoint(leaving)
    else:
        assert decision.victims
        assert set(decision.victims) <= set(report.instances)
        assert all(one.active == 0 and one.instance_id not in leaving for one in decision.victims)
        gone = {one.instance_id for one in decision.victims} | leaving
        stays = [one for one in report.instances if one.instance_id not in gone]
        assert len(stays) + sum(grant.slots for grant in here) + 1 <= report.slots
        assert held_bytes + sum(one.host_bytes for one in stays) <= report.host_pool_bytes


def test_a_bandwidth_moves_towards_what_was_seen_and_ignores_what_tells_nothing() -> None:
    assert corrected(1e9, 10**9, 0.5) == (1 - WEIGHT) * 1e9 + WEIGHT * 2e9
    assert corrected(1e9, 10**9, 2.0) < 1e9
    assert corrected(1e9, SMALLEST_BYTES - 1, 1e-9) == 1e9
    assert corrected(1e9, 10**9, 0.0) == 1e9
    # The first that is seen is not mixed with anything.
    assert corrected(0.0, 10**9, 0.5) == 2e9 and corrected(0.0, SMALLEST_BYTES - 1, 0.5) == 0.0
    learned = 1e9
    for _ in range(50):
        learned = corrected(learned, 10**9, 0.25)
    assert abs(learned - 4e9) < 1e6


def test_a_node_whose_disk_has_the_model_starts_it_sooner_than_one_that_must_fetch_it() -> None:
    nodes = [node("a", on_ssd=False), node("b", ssd_bytes_per_s=5e8)]
    decision = decide(question(), nodes, [], NOBODY)
    assert started_on(decision) == "b"
    assert isinstance(decision, Start)
    assert "reads" in decision.explanation.reason


def test_a_fetch_has_its_own_queue_and_bandwidth() -> None:
    busy = node("a", queue_s=500.0, on_ssd=False, remote_bytes_per_s=2e8, remote_queue_s=3.0)
    decision = decide(question(10**9), [busy], [], NOBODY)
    assert isinstance(decision, Start)
    assert decision.estimate_s == 3.0 + 5.0
    assert "fetches" in decision.explanation.reason
    assert "at 0.20 GB/s after a queue of 3.0" in decision.explanation.reason
    stuck = node("b", on_ssd=False, remote_bytes_per_s=0.0)
    alone = decide(question(1), [stuck])
    assert isinstance(alone, Start) and alone.estimate_s == float("inf")
