"""The view of a cluster says what a scan of all reports would; four policies choose by it, and each says why."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from node_parts import parts
from test_placement import NOBODY, decide, grants, instance, node, nodes, question, started_on, view_of

from sllm_actor.domain import NodeId
from sllm_actor.messages.declare import changed
from sllm_actor.messages.explanation import Explanation
from sllm_actor.messages.placement import NodeReport
from sllm_actor.policy import moving
from sllm_actor.policy.cluster_view import ClusterView
from sllm_actor.policy.estimator import FIRST_LEAVE_S, HOST, SOURCE, SSD, Estimator
from sllm_actor.policy.explaining import explain
from sllm_actor.policy.node_view import Grant
from sllm_actor.policy.offers import Action, Offer, offer_of
from sllm_actor.policy.placement import ABLE, QUIET, Decision, Evict, MakeRoom, Start, Wait
from sllm_actor.policy.policies import POLICIES, SHOWN, Choice, Situation
from sllm_actor.policy.soonest import soonest
from sllm_actor.units import GIB

ALL = frozenset(Action)


def busy(name: str, **more: Any) -> Any:
    given = {"active": 1, "fingerprint": f"print-of-{name}", "size_bytes": GIB, "prompt_tokens": 100, **more}
    return instance(name, **given)


def choose(policy: str, reports: list[NodeReport], estimator: Estimator | None = None, **more: Any) -> Choice:
    asked = more.pop("asked", question())
    situation = Situation(view_of(reports), estimator or Estimator(), asked, now_s=0.0, locality_wait_s=10.0, **more)
    return POLICIES[policy](situation)


def taken(choice: Choice) -> Offer:
    assert choice.taken is not None, choice.why
    return choice.taken


# The view.


def scanned(view: ClusterView, estimator: Estimator, asked: Any) -> list[Offer]:
    offers = [offer_of(one, estimator, asked) for one in view.nodes.values()]
    return sorted((one for one in offers if one is not None), key=lambda one: one[:2])


many_nodes = st.lists(
    st.builds(
        node,
        st.sampled_from([f"node-{number}" for number in range(20)]),
        instances=st.lists(
            st.builds(instance, st.integers(0, 9).map(str), active=st.integers(0, 1), host_bytes=st.integers(0, 4)),
            max_size=3,
            unique_by=lambda one: one.instance_id,
        ),
        slots=st.integers(0, 4),
        pool_bytes=st.integers(0, 12),
        in_host_memory=st.booleans(),
        on_ssd=st.booleans(),
        ssd_bytes_per_s=st.floats(0, 1e10),
        queue_s=st.sampled_from([0.0, 0.5, 7.0]),
        remote_bytes_per_s=st.sampled_from([0.0, 1e8, 1e9]),
        remote_queue_s=st.sampled_from([0.0, 1.0, 5.0, 100.0]),
    ),
    max_size=30,
)
starts = st.lists(
    st.tuples(
        st.integers(0, 19).map(lambda number: NodeId(f"node-{number}")),
        st.sampled_from([HOST, SSD, SOURCE]),
        st.floats(-5, 5),
    ),
    max_size=9,
)


@settings(max_examples=200)
@given(many_nodes, starts, st.integers(1, 10**10), st.integers(0, 6), st.integers(1, 2), st.integers(1, 5))
def test_the_indexes_find_what_a_scan_of_every_node_finds(
    reports: list[NodeReport], seen: list[tuple[NodeId, str, float]], size_bytes: int, host_bytes: int, slots: int,
    most: int,
) -> None:  # fmt: skip
    estimator, asked = Estimator(), question(size_bytes, host_bytes, slots=slots)
    for name, tier, constant_s in seen:
        estimator.learn_start(name, tier, "print", size_bytes, constant_s)
    view = view_of(reports)
    assert soonest(view, estimator, asked, most) == scanned(view, estimator, asked)[:most]


few_names = st.sampled_from([NodeId(f"node-{number}") for number in range(3)])
few_reports = st.builds(
    node,
    few_names,
    instances=st.lists(
        st.builds(instance, st.integers(0, 3).map(str), active=st.integers(0, 1), host_bytes=st.integers(0, 4)),
        max_size=2,
        unique_by=lambda one: one.instance_id,
    ),
    slots=st.integers(1, 3),
    in_host_memory=st.booleans(),
    on_ssd=st.booleans(),
    remote_bytes_per_s=st.sampled_from([0.0, 1e8, 1e9]),
    remote_queue_s=st.sampled_from([0.0, 1.0]),
)
changes = st.one_of(
    st.tuples(st.just("report"), few_reports),
    st.tuples(st.just("forget"), few_names),
    st.tuples(st.just("grant"), few_names, st.integers(0, 2)),
    st.tuples(st.sampled_from(["hold", "let_go", "keep"]), few_names, st.integers(0, 3).map(str)),
    st.tuples(st.just("leave"), few_names, st.floats(0, 5)),
    st.tuples(st.just("start"), few_names, st.sampled_from([HOST, SSD, SOURCE]), st.sampled_from(["print", "other"])),
)
wishes = st.tuples(
    st.sampled_from([0, 3]),
    st.sampled_from([{}, {}, {"not_on": ("node-1",)}, {"only_on": "node-2"}, {"holders_only": True}]),
)


@settings(max_examples=200)
@given(st.lists(st.tuples(changes, wishes), min_size=10, max_size=30), st.booleans())
def test_whatever_is_learned_and_reported_between_two_questions_a_scan_would_find_the_same(
    history: list[tuple[Any, Any]], knows_a_bandwidth: bool
) -> None:
    view = ClusterView(2e9, 1e9) if knows_a_bandwidth else ClusterView()
    estimator = Estimator(max_nodes=2, max_checkpoints=1)
    for number, ((what, *arguments), (host_bytes, more)) in enumerate(history):
        if what == "report":
            view.hear(arguments[0], 0.0)
        elif what == "grant":
            view.release(f"placement-{arguments[1]}")
            view.grant(f"placement-{arguments[1]}", Grant(arguments[0], 1, 9.0))
        elif what == "leave":
            estimator.learn_leave(*arguments)
        elif what == "start":
            name, tier, fingerprint = arguments
            estimator.learn_start(name, tier, fingerprint, 10**9, number / 7, number % 3)
        else:
            getattr(view, what)(*arguments)
        asked = question(10**9, host_bytes, **more)
        assert soonest(view, estimator, asked, 3) == scanned(view, estimator, asked)[:3]


@given(st.lists(nodes, max_size=8), st.lists(grants, max_size=4), st.frozensets(st.sampled_from("abc"), max_size=2))
def test_a_view_that_was_kept_up_to_date_is_one_that_was_made_anew(
    reports: list[NodeReport], open_grants: list[Grant], gone: frozenset[str]
) -> None:
    kept = ClusterView()
    for number, grant in enumerate(open_grants):
        kept.grant(f"early-{number}", grant)
    for report in reports:
        kept.hear(report, 1.0)
    for number in range(len(open_grants)):
        assert kept.release(f"early-{number}") is not None
    for name in gone:
        kept.forget(NodeId(name))
    newest = {report.node: report for report in reports if report.node not in gone}
    anew = view_of(newest.values())
    assert kept.nodes.keys() == anew.nodes.keys()
    for name, there in kept.nodes.items():
        assert parts(there) == parts(anew.nodes[name])
    assert kept.names == anew.names
    assert kept.by_remote_queue == anew.by_remote_queue
    assert kept.usual_remote_bytes_per_s == anew.usual_remote_bytes_per_s
    for fingerprint in ("print", "other", "none"):
        assert set(kept.holders(fingerprint)) == set(anew.holders(fingerprint))


# The policies.


def test_what_was_seen_of_starts_decides_between_nodes_that_seem_alike() -> None:
    reports, estimator = [node("a"), node("b")], Estimator()
    assert started_on(decide(question(), reports, estimator=estimator)) == "a"
    estimator.learn_start(NodeId("a"), SSD, "print", GIB, 3.0)
    assert started_on(decide(question(), reports, estimator=estimator)) == "b"


def test_availability_takes_the_first_free_place_wherever_the_model_is() -> None:
    reports = [node("a", on_ssd=False), node("b", in_host_memory=True)]
    assert started_on(decide(question(), reports, policy="startup_time")) == "b"
    assert started_on(decide(question(), reports, policy="availability")) == "a"
    full = [node("a", slots=1, instances=[instance("idle")]), *reports[1:]]
    assert started_on(decide(question(), full, policy="availability")) == "b"
    assert isinstance(decide(question(), full[:1], policy="availability"), Evict)


# From an SSD it takes a second longer than where it is in host memory, and an idle instance leaves first.
SLOW = node("b", ssd_bytes_per_s=GIB / (1.0 + FIRST_LEAVE_S))


def holder(*running_s: float, **more: Any) -> NodeReport:
    instances = [busy(f"x{number}", running_s=each, **more) for number, each in enumerate(running_s)]
    return node("a", slots=len(instances), in_host_memory=True, instances=instances)


def in_host_memory_at(*others: NodeReport, asked: Any = None, **more: Any) -> Decision:
    return decide(asked or changed(question(size_bytes=GIB), timeout_s=60.0), others, able=QUIET, **more)


@pytest.mark.parametrize(
    ("full", "stood_back_s", "ahead", "again_s"),
    [
        # One that has run for 0.4 s is expected to run as long: it will not be worth it when it has run for 0.7.
        (holder(0.4), 0.0, 0, 0.3),
        (holder(0.5), 0.1, 0, 0.2),
        # The first of three ends sooner; the second one as late as one of 1.5.
        (holder(0.3, 0.6, 0.9), 0.0, 0, 0.6),
        (holder(0.3, 0.6, 0.9), 0.0, 1, 0.36),
        (holder(2.4, 2.4, 2.4, 2.4), 0.2, 0, 0.16),
        # As long as it would save, or longer, or for others.
        (holder(1.1), 0.0, 0, None),
        (holder(0.1), 0.9, 0, None),
        (holder(0.2), 0.77, 0, None),
        (holder(0.1), 0.0, 1, None),
    ],
)
def test_a_place_where_host_memory_has_it_is_waited_for_where_it_is_expected_to_be_sooner(
    full: NodeReport, stood_back_s: float, ahead: int, again_s: float | None
) -> None:
    # What it has waited while there was no place at all counts for nothing.
    decision = in_host_memory_at(full, SLOW, waited_s=2.0, stood_back_s=stood_back_s, ahead=ahead)
    if again_s is None:
        assert started_on(decision) == "b"
    else:
        assert isinstance(decision, Wait) and not decision.holds_up
        assert decision.again_s == pytest.approx(again_s)
        later = node("a", slots=full.slots, in_host_memory=True, instances=aged(full, again_s + 0.01))
        then_s = stood_back_s + again_s + 0.01
        assert started_on(in_host_memory_at(later, SLOW, stood_back_s=then_s, ahead=ahead)) == "b"


def aged(report: NodeReport, seconds: float) -> list[Any]:
    return [changed(one, running_s=one.running_s + seconds) for one in report.instances]


@pytest.mark.parametrize(
    "more",
    [{"active": 2}, {"kept": True}, {"model": question().model}],
    ids=["others wait for its place", "it never leaves", "it is one of the same model"],
)
def test_a_place_that_will_not_be_free_is_not_waited_for(more: dict[str, Any]) -> None:
    one = changed(holder(0.1).instances[0], **more)
    assert started_on(in_host_memory_at(node("a", slots=1, in_host_memory=True, instances=[one]), SLOW)) == "b"


def test_what_would_not_be_room_is_not_waited_for() -> None:
    large = busy("kept", kept=True, host_bytes=4 * GIB)
    full = node("a", slots=3, pool_bytes=8 * GIB, in_host_memory=True, instances=[large, busy("x", running_s=0.1)])
    for host_bytes, waits in ((5 * GIB, False), (4 * GIB, True)):
        asked = question(size_bytes=GIB, host_bytes=host_bytes)
        assert isinstance(in_host_memory_at(full, SLOW, asked=asked), Wait) == waits


def test_who_waits_for_a_better_place_has_one_in_half_of_its_time() -> None:
    full, slow = holder(1.0), node("b", ssd_bytes_per_s=GIB / 100.0)
    for timeout_s, waited_s, again_s in ((20.0, 4.0, 6.0), (20.0, 10.0, None), (0.0, 10.0, 49.4)):
        asked = changed(question(size_bytes=GIB), timeout_s=timeout_s)
        decision = in_host_memory_at(full, slow, asked=asked, waited_s=waited_s)
        if again_s is None:
            assert started_on(decision) == "b"
        else:
            assert isinstance(decision, Wait) and decision.again_s == pytest.approx(again_s)


def test_what_is_guessed_fetched_or_in_host_memory_has_no_better_place_that_it_waits_for() -> None:
    full = holder(0.1)
    assert started_on(in_host_memory_at(full, node("b", in_host_memory=True, queue_s=9.0))) == "b"
    # Bytes from afar come before a device is taken: whatever is better meanwhile is taken then.
    assert started_on(in_host_memory_at(full, node("b", on_ssd=False))) == "b"
    on_ssd = node("a", slots=1, instances=[busy("x", running_s=0.1)])
    assert started_on(in_host_memory_at(on_ssd, node("b", queue_s=9.0))) == "b"
    # Nobody has seen yet how fast the SSD is; and a move has its place at once.
    assert started_on(in_host_memory_at(full, node("b", ssd_bytes_per_s=0.0, queue_s=9.0))) == "b"
    elsewhere = changed(question(size_bytes=GIB), not_on=(NodeId("c"),))
    assert started_on(in_host_memory_at(full, SLOW, asked=elsewhere)) == "b"


def test_locality_wait_waits_for_the_node_that_holds_the_model_and_not_for_ever() -> None:
    reports = [node("a", slots=1, in_host_memory=True, instances=[busy("x")]), node("b", on_ssd=False)]
    waits = decide(question(), reports, policy="locality_wait")
    assert waits == Wait("a holds it, and has no place yet", holds_up=False, again_s=10.0)
    assert started_on(decide(question(), reports, policy="locality_wait", waited_s=10.0)) == "b"
    assert started_on(decide(question(), reports, policy="startup_time")) == "b"
    free = [node("a", slots=2, in_host_memory=True, queue_s=99.0, instances=[busy("x")]), node("b")]
    assert started_on(decide(question(), free, policy="locality_wait")) == "a"
    assert started_on(decide(question(), [node("b", on_ssd=False)], policy="locality_wait")) == "b"


def test_preempt_ends_what_is_less_urgent_where_the_model_is_and_nothing_else() -> None:
    def there(priority: int) -> list[NodeReport]:
        running = busy("x", priority=priority)
        return [node("a", slots=1, in_host_memory=True, instances=[running]), node("b", on_ssd=False)]

    offer = taken(choose("preempt", there(priority=5)))
    assert (offer.node, offer.action, [one.instance_id for one in offer.leaving]) == ("a", Action.PREEMPT, ["x"])
    assert taken(choose("preempt", there(priority=0))).node == "b"
    decision = decide(question(), there(priority=5), policy="preempt")
    assert isinstance(decision, MakeRoom) and decision.report.node == "a"
    # For one for which what runs is left alone:
    decision = decide(question(), there(priority=5), policy="preempt", able=QUIET)
    assert started_on(decision) == "b"
    assert isinstance(decision, Start)
    assert "to preempt x on a would have taken" in decision.explanation.reason
    assert "which is not tried" in decision.explanation.reason
    assert (
        taken(choose("preempt", [node("a", slots=1, instances=[busy("x", priority=5, kept=True)]), there(0)[1]])).node
        == "b"
    )


def test_an_inference_moves_where_that_is_sooner_than_all_else_and_it_has_somewhere_to_go() -> None:
    moving = busy("x", resume_s_per_token=0.001, resume_s=0.05, running_s=6.0, token_s=0.02)
    full = node("a", slots=1, in_host_memory=True, instances=[moving])
    slow = node("b", on_ssd=False, remote_bytes_per_s=1e8)
    quick_for_it = node("b", on_ssd=False, remote_bytes_per_s=1e8, host_fingerprints=("print-of-x",))
    offer = taken(choose("startup_time", [full, quick_for_it]))
    assert (offer.node, offer.action) == ("a", Action.MIGRATE)
    # 100 tokens of the prompt and 6 s / 20 ms of the answer.
    assert offer.estimate_s == pytest.approx(0.001 * 400 + 0.05 + FIRST_LEAVE_S)
    assert [(one.instance.instance_id, one.to, one.tokens) for one in offer.moves] == [("x", "b", 400)]
    assert taken(choose("startup_time", [full, slow])).node == "b"
    assert choose("startup_time", [full]).taken is None
    assert started_on(decide(question(), [full, quick_for_it], able=QUIET)) == "b"
    assert isinstance(decide(question(), [full, quick_for_it]), MakeRoom)
    kept = node("a", slots=1, in_host_memory=True, instances=[busy("x", kept=True)])
    assert taken(choose("startup_time", [kept, quick_for_it])).node == "b"
    elsewhere = question(not_on=(NodeId("a"),))
    assert taken(choose("startup_time", [full, quick_for_it], asked=elsewhere)).node == "b"


def test_an_inference_moves_to_where_its_model_runs_and_else_to_where_its_bytes_may_come_from() -> None:
    moving = busy("x", resume_s_per_token=0.001)
    full = node("a", slots=1, in_host_memory=True, instances=[moving])
    same = busy("y", active=0, kept=True)
    runs = node("b", slots=1, on_ssd=False, instances=[msgspec.structs.replace(same, model=moving.model)])
    (move,) = taken(choose("startup_time", [full, runs])).moves
    assert (str(move.to), move.load, move.load_s) == ("b", None, 0.0)
    assert move.resume_s == pytest.approx(0.1)
    folder = node("a", slots=1, in_host_memory=True, instances=[msgspec.structs.replace(moving, holders_only=True)])
    without, with_it = node("b", on_ssd=False), node("c", on_ssd=False, host_fingerprints=("print-of-x",))
    assert taken(choose("startup_time", [folder, without])).action is not Action.MIGRATE
    (move,) = taken(choose("startup_time", [folder, without, with_it])).moves
    assert move.to == "c"


def test_two_that_move_go_to_nodes_of_their_own_and_none_moves_where_there_are_too_few() -> None:
    asked = question(slots=2)
    full = node("a", slots=2, in_host_memory=True, instances=[busy("x"), busy("y")])
    there = [node(name, slots=1, on_ssd=False, host_fingerprints=("print-of-x", "print-of-y")) for name in "bc"]
    assert sorted(move.to for move in taken(choose("startup_time", [full, *there], asked=asked)).moves) == ["b", "c"]
    assert choose("startup_time", [full, there[0]], asked=asked).taken is None


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 2)), min_size=1, max_size=4), st.integers(1, 3))
def test_what_moves_is_the_cheapest_of_all_choices(running: list[tuple[int, int]], slots: int) -> None:
    here = [
        busy(f"i{number}", prompt_tokens=tokens, slots=wide, resume_s_per_token=0.001)
        for number, (tokens, wide) in enumerate(running)
    ]
    in_all = sum(one.slots for one in here)
    full = node("a", slots=in_all, in_host_memory=True, instances=here, pool_bytes=64 * GIB)
    prints = tuple(one.fingerprint for one in here)
    others = [node(f"b{number}", slots=2, on_ssd=False, host_fingerprints=prints) for number in range(4)]
    offer = moving_offer([full, *others], question(slots=min(slots, in_all)))
    subsets = [chosen for size in range(1, 5) for chosen in itertools.combinations(here, size)]
    enough = [chosen for chosen in subsets if sum(one.slots for one in chosen) >= min(slots, in_all)]
    cheapest_s = min(sum(0.001 * one.prompt_tokens for one in chosen) for chosen in enough)
    assert sum(move.seconds for move in offer.moves) == pytest.approx(cheapest_s)


def moving_offer(reports: list[NodeReport], asked: Any) -> Offer:
    view = view_of(reports)
    offer = moving.migrate(view, Estimator(), asked, view.nodes[NodeId("a")], now_s=0.0)
    assert offer is not None
    return offer


def test_nobody_waits_for_the_answers_of_an_instance_that_leaves_where_an_idle_one_would_leave_at_once() -> None:
    """Its node holds the checkpoint; that of the other fetches it."""
    for active, action in ((0, Wait), (2, Evict)):
        going = node("a", slots=1, in_host_memory=True, instances=[instance("x", active=active, leaving=True)])
        other = node("b", slots=1, on_ssd=False, instances=[instance("y")])
        assert isinstance(decide(question(), [going, other], able=QUIET), action)


def test_room_that_is_being_made_is_neither_free_nor_missing_twice() -> None:
    """What leaves for somebody else still answers, and a grant stands for its room."""
    instances = [busy("x"), busy("w"), instance("y", idle_since_s=1.0), instance("z", idle_since_s=2.0)]
    view = view_of([node("a", slots=4, instances=instances)])
    view.give_up(NodeId("a"), ["x"])
    view.grant("room", Grant(NodeId("a"), GIB, expires_s=9.0))
    assert [one.instance_id for one in moving.victims(view.nodes[NodeId("a")], question())] == ["y"]


def test_a_model_of_several_devices_needs_as_many_slots_of_one_node() -> None:
    asked = question(slots=2)
    halves = [node("a", slots=2, instances=[busy("x")]), node("b", slots=2, instances=[busy("y")])]
    assert isinstance(decide(asked, halves, able=QUIET), Wait)
    assert started_on(decide(asked, [*halves, node("c", slots=2)])) == "c"
    narrow = [instance("p", idle_since_s=5.0), instance("q", idle_since_s=6.0)]
    for wide_since_s, leaving in ((1.0, ["wide"]), (9.0, ["p", "q"])):
        wide = instance("wide", slots=2, idle_since_s=wide_since_s)
        decision = decide(asked, [node("a", slots=4, instances=[*narrow, wide])])
        assert isinstance(decision, Evict)
        assert [one.instance_id for one in decision.victims] == leaving


# Explanations.


def explained(reports: list[NodeReport], policy: str = "startup_time") -> Explanation:
    situation = Situation(view_of(reports), Estimator(), question(), now_s=0.0, able=ABLE)
    return explain(situation, policy, POLICIES[policy](situation))


def test_an_explanation_has_every_candidate_with_the_parts_of_its_estimate() -> None:
    reports = [node("a", queue_s=2.0), node("b", in_host_memory=True), node("c", on_ssd=False)]
    explanation = explained(reports)
    assert [one.node for one in explanation.candidates] == ["b", "a", "c"]
    for one in explanation.candidates:
        assert sum(term.seconds for term in one.terms) == pytest.approx(one.estimate_s)
    assert [term.name for term in explanation.candidates[1].terms] == ["queue", "bytes", "engine"]
    assert explanation.candidates[1].terms[1].inputs == {"size_bytes": GIB, "bytes_per_s": 1e9}
    assert (explanation.chosen, explanation.runner_up) == explanation.candidates[:2]


def test_no_more_candidates_are_shown_than_one_can_read() -> None:
    explanation = explained([node(f"n{number:02}") for number in range(30)])
    assert len(explanation.candidates) == SHOWN
    assert explanation.more == 30 - SHOWN


def test_what_would_have_changed_it_does() -> None:
    def reports(a_queue_s: float) -> list[NodeReport]:
        return [node("a", queue_s=a_queue_s, ssd_bytes_per_s=1e9), node("b", ssd_bytes_per_s=0.5e9, queue_s=0.2)]

    explanation = explained(reports(1.0))
    flip = explanation.flip
    assert flip is not None and explanation.chosen is not None and explanation.runner_up is not None
    assert (explanation.chosen.node, explanation.runner_up.node) == ("a", "b")
    gap_s = explanation.runner_up.estimate_s - explanation.chosen.estimate_s
    # The largest part changes the least in relation to itself.
    assert (flip.node, flip.term) == ("b", "bytes")
    assert flip.to_s == pytest.approx(2 * GIB / 1e9 - gap_s)
    assert "b would have been chosen had the bytes on b taken less than" in flip.text
    quicker = [reports(1.0)[0], node("b", ssd_bytes_per_s=GIB / (flip.to_s - 0.001), queue_s=0.2)]
    slower = [reports(1.0)[0], node("b", ssd_bytes_per_s=GIB / (flip.to_s + 0.001), queue_s=0.2)]
    assert started_on(decide(question(), quicker)) == "b"
    assert started_on(decide(question(), slower)) == "a"


def test_equal_nodes_say_that_their_names_decide_also_where_nothing_is_known_of_either() -> None:
    for reports in ([node("a"), node("b")], [node("a", ssd_bytes_per_s=0.0), node("b", ssd_bytes_per_s=0.0)]):
        flip = explained(reports).flip
        assert flip is not None and "their names decide" in flip.text
    fetches = node("b", on_ssd=False, remote_bytes_per_s=0.0)
    unknown = explained([node("a", remote_bytes_per_s=0.0), fetches]).flip
    assert unknown is not None and unknown.text == "b might have been chosen had its bandwidth been known"


def test_a_policy_that_ranks_by_something_else_says_so() -> None:
    explanation = explained([node("a", on_ssd=False), node("b")], "availability")
    assert explanation.flip is not None
    assert explanation.flip.text == "with no room on a, b would have been chosen"
    assert explained([node("a")]).flip is None


def test_the_same_questions_get_the_same_answers_from_every_policy_whatever_the_order_of_reports() -> None:
    reports = [node("b", queue_s=1.0), node("a", on_ssd=False), node("c", slots=1, instances=[instance("i")])]
    for policy in POLICIES:
        assert decide(question(), reports, [], NOBODY, policy=policy) == decide(
            question(), reports[::-1], [], NOBODY, policy=policy
        )
