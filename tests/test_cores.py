"""How many want the cores is what the kernel says, less whoever asks, and smoothed."""

from __future__ import annotations

from pathlib import Path

import pytest

from sllm_actor.runtime.clock import SystemClock
from sllm_actor.runtime.cores import LOADAVG, CoreDemand


def test_it_comes_near_to_what_stays_and_passes_over_what_does_not(tmp_path: Path) -> None:
    loadavg = tmp_path / "loadavg"
    demand = CoreDemand(SystemClock(), loadavg)
    loadavg.write_text("0.50 0.40 0.30 9/200 1234\n")
    demand.look(0.05)
    assert 1.5 < demand.threads < 2.0
    for _ in range(100):
        demand.look(0.05)
    assert demand.threads == pytest.approx(8.0, rel=0.01)
    loadavg.write_text("0.50 0.40 0.30 1/200 1234\n")
    for _ in range(100):
        demand.look(0.05)
    assert demand.threads == pytest.approx(0.0, abs=0.01)


def test_the_kernel_of_this_machine_is_understood() -> None:
    demand = CoreDemand(SystemClock(), LOADAVG)
    demand.look(1e9)
    assert demand.threads >= 0.0
