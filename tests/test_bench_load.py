"""`scripts/bench load` with tiny shapes: every subject that needs no peers runs, and the report has its shape."""

from __future__ import annotations

import os
from typing import Any

import pytest
from benchmarks import load_cases
from tiny_benchmarks import REPEATS, tiny_report

pytestmark = pytest.mark.skipif("SLLM_NIGHTLY" not in os.environ, reason="scripts/test --nightly runs it")

RATIOS = {
    "cold.share_of_limit", "stock.share_of_optimized", "cold.cpu_s_per_gb", "cold.memory_beyond_pool_mib",
    "two.share_of_limit",
}  # fmt: skip
PEERS = "safetensors", "fastsafetensors"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_report("load", tmp_path_factory.mktemp("load"), "--without-peers")


def test_load_gives_every_ratio_that_needs_no_peers(report: dict[str, Any]) -> None:
    ratios = report["ratios"]
    assert ratios.keys() >= RATIOS
    assert all(ratios[name]["n"] == REPEATS for name in RATIOS)
    assert all(0 < spread["min"] <= spread["median"] <= spread["max"] for spread in ratios.values())


def test_load_measures_ours_in_every_repeat(report: dict[str, Any]) -> None:
    rows = [row for row in report["rows"] if row["system"].startswith("ours, optimized") and row["unit"] == "s"]
    states = {row["measured"].partition(",")[0] for row in rows}
    assert {"cold", "page-cached", "host pool", "two at once"} <= states
    assert all(row["n"] == REPEATS for row in rows)


def test_load_says_of_every_system_without_figures_why(report: dict[str, Any]) -> None:
    empty = [row for row in report["rows"] if row["n"] == 0]
    assert {"safetensors", "tensorizer", "torch.load"} <= {row["system"] for row in empty}
    assert all(row["note"] for row in empty)


def test_the_best_peer_is_the_one_of_the_lowest_median_and_not_the_luckiest_of_single_measurements() -> None:
    ours = load_cases.OPTIMIZED_COLD
    steady, lucky = (load_cases.Case(load_cases.COLD, load_cases.MAIN, load_cases.STOCK, peer) for peer in PEERS)
    seconds = {ours: (2.0, 2.0, 2.0), steady: (3.0, 3.0, 3.0), lucky: (1.0, 9.0, 9.0)}
    run = [{case: {"s": values[repeat]} for case, values in seconds.items()} for repeat in range(3)]
    assert load_cases.RATIOS["cold.over_best_peer"](run) == [1.5, 1.5, 1.5]
    without = [{case: answer for case, answer in found.items() if case is not ours} for found in run]
    assert load_cases.RATIOS["cold.over_best_peer"](without) == []
