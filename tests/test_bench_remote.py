"""`scripts/bench remote` with a tiny shape: every case runs, and the report has its shape."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_benchmarks import tiny_report

pytestmark = [
    pytest.mark.usefixtures("warm_starts"),
    pytest.mark.skipif("SLLM_NIGHTLY" not in os.environ, reason="scripts/test --nightly runs it"),
]

RATIOS = {
    "stream_over_transfer",
    "sequential_over_stream",
    "pull_then_load_over_stream",
    "plain_then_our_load_over_stream",
    "fresh_process_over_stream",
}
REPEATS = 1  # Each imports transformers anew.


def test_remote_measures_every_case_and_stores_what_it_fetched(tmp_path: Path) -> None:
    report = tiny_report("remote", tmp_path, needs_cold_files=False, repeats=REPEATS)
    assert report["ratios"].keys() == RATIOS
    assert all(spread["n"] == REPEATS for spread in report["ratios"].values())
    assert [row["n"] for row in report["rows"]] == [REPEATS] * 6
    assert all(row["min"] > 0 for row in report["rows"])
