"""The simulated twin of three real nodes is a world as others are; the real ones are for `scripts/bench twin`."""

from __future__ import annotations

import pytest
from benchmarks.twin import Calibrated, TwinWorld

from sllm_actor.testing.evaluation import evaluate
from sllm_actor.testing.simulated_engine import Speed
from sllm_actor.testing.workloads import Arrival

SPEED = Speed(prefill_s=0.001, prefill_s_per_token=0.001, step_s=0.002, leave_s=0.02)
FAST = Calibrated(SPEED, (0.05,), request_s=0.003, ssd_bytes_per_s=1e9, size_bytes=10**7)


def test_the_twin_is_asked_as_any_simulated_cluster() -> None:
    asked = [Arrival(0.0, 0, 10, 20), Arrival(1.0, 0, 10, 20), Arrival(1.0, 1, 10, 20)]
    run = evaluate(TwinWorld(FAST), asked, seed=1)
    assert not run.errors() and run.starts == 2
    # Ten milliseconds from the disk, fifty for the engine.
    assert run.start_times.least_mean_s == pytest.approx(0.06)
    assert run.summary()["start_over_least"] >= 1.0
    # Three for the request, and eleven for the prompt.
    assert min(one.wait_s for one in run.seen) == pytest.approx(0.014, abs=0.001)


def test_all_nodes_of_the_twin_share_the_cores_of_one_machine() -> None:
    world = TwinWorld(FAST)
    assert world.means().cores is world.means().cores


def test_each_start_of_the_twin_takes_what_one_of_those_measured_took() -> None:
    world = TwinWorld(FAST._replace(attaches_s=(0.05, 0.5)))
    asked = [Arrival(float(model), model, 10, 20) for model in range(4)]
    waits_s = [one.wait_s for one in evaluate(world, asked, seed=1).seen]
    assert {round(wait_s - 0.024, 2) for wait_s in waits_s} == {0.05, 0.5}
