"""How long starts took, beside the least that they could have: `sllm_actor.testing.start_times`."""

from __future__ import annotations

from math import isnan

import pytest

from sllm_actor.domain import NodeId, RequestId
from sllm_actor.messages.explanation import Candidate, Explanation
from sllm_actor.policy.estimator import HOST, SOURCE, SSD
from sllm_actor.testing.evaluation import evaluate
from sllm_actor.testing.start_times import start_times
from sllm_actor.testing.workloads import Arrival
from sllm_actor.testing.world import SYSTEMS, Description, Models, World

DESCRIBED = Description(nodes=2, copies=1, models=(Models(shape="opt-6.7b", count=4),))
SMALL = World(DESCRIBED, SYSTEMS["ours"])
MODEL = SMALL.models[0]
# 13.3 GB: over PCIe at 25 GB/s, from the SSD at 6 GB/s; and a tenth of a second for the engine.
ATTACH_S = SMALL.speed(0).attach_s
HOST_S, SSD_S = MODEL.size_bytes / 25e9 + ATTACH_S, MODEL.size_bytes / 6e9 + ATTACH_S


def decision(
    tiers: dict[str, str], *, waited_s: float, fetched_s: float = 0.0, outcome: str = "started"
) -> Explanation:
    """One whose first node was chosen, and whose start has taken 3 s."""
    found = tuple(
        Candidate(node=NodeId(node), action="start", tier=tier, estimate_s=1.0, terms=(), leaving=(), possible=True)
        for node, tier in tiers.items()
    )
    return Explanation(
        request_id=RequestId("r0"), model=MODEL.name, policy="startup_time", reason="", candidates=found, more=0,
        chosen=found[0], runner_up=None, flip=None, waited_s=waited_s, observed_s=3.0, outcome=outcome,
        fetched_s=fetched_s,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tiers", "fetched_s", "least_s"),
    [
        ({"n1": HOST}, 0.0, HOST_S),
        ({"n1": SSD}, 0.0, SSD_S),
        # A better one was there, and another was chosen; each model is on an SSD, whether that has a place or not.
        ({"n1": SSD, "n2": HOST}, 0.0, HOST_S),
        ({"n1": SOURCE}, 0.0, SSD_S),
        # What is in host memory since it was fetched for this start was not there.
        ({"n1": HOST}, 10.0, SSD_S),
        ({"n1": HOST, "n2": HOST}, 10.0, HOST_S),
    ],
)
def test_the_least_is_of_the_fastest_tier_that_had_the_bytes(
    tiers: dict[str, str], fetched_s: float, least_s: float
) -> None:
    times = start_times([decision(tiers, waited_s=2.0, fetched_s=fetched_s)], SMALL)
    assert times.mean_s == 5.0
    assert times.least_mean_s == pytest.approx(least_s)


def test_starts_that_have_failed_or_go_on_do_not_count() -> None:
    decisions = [
        decision({"n1": HOST}, waited_s=1.0),
        decision({"n1": HOST}, waited_s=2.0),
        decision({"n1": HOST}, waited_s=9.0, outcome="failed"),
        decision({"n1": HOST}, waited_s=9.0, outcome="fetching"),
    ]
    assert start_times(decisions, SMALL).mean_s == 4.5
    assert all(map(isnan, start_times(decisions[2:], SMALL)))


def test_a_start_alone_takes_the_least_and_one_that_waits_for_a_device_more() -> None:
    alone = evaluate(SMALL, [Arrival(0.0, 0, 50, 10)], seed=1).summary()
    assert alone["start_mean_s"] == pytest.approx(SSD_S, rel=0.02)
    assert 1.0 <= alone["start_over_least"] < 1.02
    one_device = World(Description(nodes=1, devices=1, models=DESCRIBED.models), SYSTEMS["ours"])
    in_turn = evaluate(one_device, [Arrival(0.0, 0, 50, 100), Arrival(0.5, 1, 50, 100)], seed=1).summary()
    assert in_turn["start_over_least"] > 1.5
