"""Room is made in a simulated cluster, by moving answers and by ending them, and no promise breaks whatever fails."""

from __future__ import annotations

from collections import Counter

import pytest

from sllm_actor.testing.cluster_simulation import check_seed
from sllm_actor.testing.simulated_cluster import Plan

SEEDS = 8
# One slot a node, more models than nodes, and answers that last: hardly a start without room being made for it.
CROWDED = Plan(models=5, requests=24, max_tokens=300, slots=1)
PREEMPT = Plan(
    models=5, requests=24, max_tokens=300, slots=1, placement_policy="preempt", priorities=(0, 5, 9)
)  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "outcomes"),
    [(CROWDED, {"room migrate"}), (PREEMPT, {"room preempt", "preempted"})],
    ids=["migrate", "preempt"],
)
def test_promises_hold_while_room_is_made_and_everything_breaks(plan: Plan, outcomes: set[str]) -> None:
    seen: Counter[str] = Counter()
    for seed in range(SEEDS):
        seen.update(check_seed(seed, plan).counts)
    assert outcomes <= {what for what, number in seen.items() if number}
