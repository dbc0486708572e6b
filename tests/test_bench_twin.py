"""The simulated twin of three real nodes is a world as others are; the real ones are for `scripts/bench twin`."""

from __future__ import annotations

import pytest
from benchmarks.twin import TwinWorld

from sllm_actor.testing.evaluation import evaluate
from sllm_actor.testing.simulated_engine import Speed
from sllm_actor.testing.workloads import Arrival


def test_the_twin_is_asked_as_any_simulated_cluster() -> None:
    speed = Speed(attach_s=0.05, prefill_s_per_token=0.001, step_s=0.002)
    world = TwinWorld(speed, ssd_bytes_per_s=1e9, size_bytes=10**7)
    run = evaluate(world, [Arrival(0.0, 0, 10, 20), Arrival(1.0, 0, 10, 20), Arrival(1.0, 1, 10, 20)], seed=1)
    assert not run.errors() and run.starts == 2
    # Ten milliseconds from the disk, fifty for the engine.
    assert run.start_times.least_mean_s == pytest.approx(0.06)
    assert run.summary()["start_over_least"] >= 1.0
