"""What is kept of all nodes is what their newest reports say, whatever was told before."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from node_parts import parts

from sllm_actor.domain import ModelName, NodeId
from sllm_actor.messages.placement import InstanceView, NodeChange, NodeReport
from sllm_actor.policy.cluster_view import ClusterView
from sllm_actor.policy.node_view import Grant

NODES = [NodeId(name) for name in "abc"]
IDS = [f"{model}-{number}" for model in "xyz" for number in (1, 2)]


def instance(instance_id: str, active: int, leaving: bool, kept: bool) -> InstanceView:
    return InstanceView(
        instance_id=instance_id, model=ModelName(instance_id[0]), active=active, idle_since_s=1.0, host_bytes=1,
        leaving=leaving, kept=kept,
    )  # fmt: skip


def report(
    node: NodeId, instances: list[InstanceView], on_host: list[str], on_ssd: list[str], queue_s: float,
    bandwidth: float, awaited: dict[ModelName, int],
) -> NodeReport:  # fmt: skip
    return NodeReport(
        node=node, manager="manager", slots=4, host_pool_bytes=10, instances=tuple(instances),
        pinned_host_bytes={"p": 1}, ended_placements=(), starting=(), host_fingerprints=tuple(on_host),
        ssd_fingerprints=tuple(on_ssd), ssd_bytes_per_s=bandwidth, disk_queues_s={},
        remote_bytes_per_s=bandwidth, remote_queue_s=queue_s, awaited=awaited,
    )  # fmt: skip


nodes = st.sampled_from(NODES)
ids = st.sampled_from(IDS)
prints = st.lists(st.sampled_from("pqr"), max_size=3, unique=True)
instances = st.lists(
    st.builds(instance, ids, st.integers(0, 2), st.booleans(), st.booleans()),
    max_size=4, unique_by=lambda one: one.instance_id,
)  # fmt: skip
awaited = st.dictionaries(st.sampled_from([ModelName("x"), ModelName("w")]), st.integers(1, 3))
placements = st.sampled_from(["first", "second"])
steps = st.one_of(
    st.builds(
        report, nodes, instances, prints, prints, st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1e9, 2e9]), awaited
    ),
    st.builds(
        NodeChange,
        node=nodes,
        epoch=st.just(0),
        told_s=st.just(2.0),
        instances=instances.map(tuple),
        awaited=st.none() | awaited,
    ),
    st.tuples(st.just("forget"), nodes),
    st.tuples(st.just("give_up"), nodes, ids.map(lambda one: [one])),
    st.tuples(st.sampled_from(["keep", "hold", "let_go"]), nodes, ids),
    st.tuples(st.just("grant"), placements, st.builds(Grant, nodes, st.just(1), st.just(9.0))),
    st.tuples(st.just("release"), placements),
)


def anew(view: ClusterView) -> ClusterView:
    """Make a view that was told nothing but what holds now."""
    fresh = ClusterView()
    for node in view.nodes.values():
        fresh.hear(node.report, 0.0)
    for name, instance_ids in view.leaving.items():
        fresh.give_up(name, instance_ids)
    for name, instance_ids in view.held.items():
        for instance_id in instance_ids:
            fresh.hold(name, instance_id)
    for placement_id, grant in view.grants.items():
        fresh.grant(placement_id, grant)
    return fresh


@given(st.lists(steps, max_size=20))
def test_whatever_was_told_before_a_view_is_that_of_the_newest_reports(history: list[Any]) -> None:
    view = ClusterView()
    for step in history:
        if isinstance(step, NodeReport):
            view.hear(step, 0.0)
        elif isinstance(step, NodeChange):
            before = view.nodes.get(step.node)
            if before is not None:
                parts(before)  # What was counted before is counted anew.
            known = {one.instance_id for one in before.report.instances} if before is not None else set()
            has_news = step.awaited is not None or not known.isdisjoint(one.instance_id for one in step.instances)
            assert view.hear_of_change(step) is (before is not None and has_news)
        else:
            what, *arguments = step
            if what == "grant":
                view.release(arguments[0])  # An id is given once.
            getattr(view, what)(*arguments)
    fresh, reports = anew(view), [node.report for node in view.nodes.values()]
    assert {name: parts(node) for name, node in view.nodes.items()} == {
        name: parts(node) for name, node in fresh.nodes.items()
    }
    assert view.names == sorted(view.nodes)
    assert view.by_remote_queue == sorted((one.remote_queue_s, one.node) for one in reports)
    assert view.usual_remote_bytes_per_s == fresh.usual_remote_bytes_per_s
    for fingerprint in "pqr":
        assert set(view.holders(fingerprint)) == {
            one.node for one in reports if fingerprint in (*one.host_fingerprints, *one.ssd_fingerprints)
        }
    all_instances = [one for report in reports for one in report.instances]
    assert set(view.models()) == {one.model for one in all_instances}
    active: Counter[ModelName] = Counter()
    for one in all_instances:
        active[one.model] += one.active
    assert view.active == +active
    all_awaited = sum((Counter(report.awaited) for report in reports), Counter[ModelName]())
    assert dict(view.awaited) == dict(all_awaited)
    for model in view.models():
        assert sorted(view.running(model), key=repr) == sorted(fresh.running(model), key=repr)
