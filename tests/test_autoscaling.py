"""Which of the models that lack instances gets the next one."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from sllm_actor.actors.autoscaler import Autoscaler
from sllm_actor.domain import Model, ModelName, NodeId, Scaling
from sllm_actor.messages.placement import InstanceView, NodeReport
from sllm_actor.policy.autoscaling import Short, by_need, wanted
from sllm_actor.policy.cluster_view import ClusterView
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.testing.simulated_node import model_of

A, B, C = map(ModelName, "abc")
INSTANCE_TAKES = 3


def test_the_next_instance_is_for_the_model_whose_instances_have_the_most_to_do() -> None:
    short = {A: Short(active=4, there=1, want=4, least=0), B: Short(active=30, there=1, want=3, least=0)}
    # 30 and 15 requests each for B, and then 4, 2 and 1 for A: not all of A's because of its name.
    assert list(by_need(short)) == [(B, 1), (B, 2), (A, 1), (A, 2), (A, 3)]


def test_models_with_equally_much_to_do_take_turns() -> None:
    alike = Short(active=8, there=1, want=3, least=0)
    assert list(by_need({B: alike, A: alike})) == [(A, 1), (B, 1), (A, 2), (B, 2)]


def test_what_is_to_run_at_all_times_comes_before_all_help() -> None:
    short = {A: Short(active=90, there=1, want=2, least=0), B: Short(active=0, there=0, want=2, least=2)}
    assert list(by_need(short)) == [(B, 0), (B, 1), (A, 1)]


def test_a_model_that_lacks_nothing_gets_nothing() -> None:
    assert list(by_need({A: Short(3, 3, 3, 0), B: Short(9, 4, 3, 0), C: Short(0, 0, 0, 0)})) == []


scalings = st.builds(
    Scaling, min_instances=st.integers(0, 2), max_instances=st.integers(2, 4), target_concurrency=st.integers(0, 4)
)
instances = st.tuples(st.sampled_from([A, B, C]), st.integers(0, 9), st.booleans())
awaited = st.dictionaries(st.sampled_from([A, B, C]), st.integers(1, 9))
reported = st.lists(st.tuples(st.sampled_from("mno"), st.lists(instances, max_size=4), awaited), max_size=6)


def report_of(node: str, running: list[tuple[ModelName, int, bool]], awaited: dict[ModelName, int]) -> NodeReport:
    return NodeReport(
        node=NodeId(node), manager="manager", slots=8, host_pool_bytes=1, pinned_host_bytes={}, ended_placements=(),
        starting=(), host_fingerprints=(), ssd_fingerprints=(), ssd_bytes_per_s=0.0, disk_queues_s={},
        remote_bytes_per_s=0.0, remote_queue_s=0.0, awaited=awaited,
        instances=tuple(
            InstanceView(
                instance_id=f"{model}-{node}{number}", model=model, active=active, idle_since_s=0.0, host_bytes=0,
                leaving=leaving,
            )
            for number, (model, active, leaving) in enumerate(running)
        ),
    )  # fmt: skip


def lacking(
    models: list[Model], view: ClusterView, starting: dict[ModelName, int], fetched: set[ModelName]
) -> list[ModelName]:
    """Look at every model."""
    short: dict[ModelName, Short] = {}
    for model in models:
        running = [one for _, one in view.running(model.name)]
        wait = sum(node.report.awaited.get(model.name, 0) for node in view.nodes.values())
        asking, least = sum(one.active for one in running) + wait, model.scaling.min_instances
        there = len(running) + starting.get(model.name, 0)
        want = wanted(model.scaling, asking, INSTANCE_TAKES)
        # Whoever has bytes fetched for a first one needs no help as long as that one is enough.
        is_missing = there or least or (model.name in fetched and want > 1)
        short[model.name] = Short(asking, there, want if is_missing else 0, least)
    return [name for name, _ in by_need(short)]


@given(
    st.tuples(scalings, scalings, scalings), reported, st.dictionaries(st.sampled_from([A, B, C]), st.just(1)),
    st.sets(st.sampled_from([A, B, C])), st.sets(st.sampled_from([A, B, C])),
)  # fmt: skip
def test_whoever_lacks_instances_is_found_among_those_that_are_looked_at(
    scaled: tuple[Scaling, ...],
    reports: list[tuple[str, list[tuple[ModelName, int, bool]], dict[ModelName, int]]],
    starting: dict[ModelName, int],
    fetched: set[ModelName],
    only: set[ModelName],
) -> None:
    models = [
        msgspec.structs.replace(model_of(name, 1, 1.0), scaling=scaling)
        for name, scaling in zip("abc", scaled, strict=True)
    ]
    by_name = {model.name: model for model in models}
    kept = [model for model in models if model.scaling.min_instances]
    autoscaler = Autoscaler(lambda: kept, by_name.get, SystemClock(), instance_takes=INSTANCE_TAKES)
    view = ClusterView()
    for node, running, waiting in reports:
        view.hear(report_of(node, running, waiting), 0.0)
    asked = [question.model for question in autoscaler.missing(view, view.awaited, starting, fetched)]
    assert asked == lacking(models, view, starting, fetched)
    # Of some alone: those that call because of what they are asked, and not those that should always run.
    calling = autoscaler.calling(view, {name: view.awaited.get(name, 0) for name in sorted(only)})
    asked = [question.model for question in autoscaler.missing(view, view.awaited, starting, fetched, only)]
    assert asked == lacking([by_name[name] for name in sorted(calling)], view, starting, fetched)
