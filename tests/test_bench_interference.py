"""`scripts/bench interference` with a tiny shape: every case runs, and the report has its shape."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_benchmarks import REPEATS, tiny_report

pytestmark = [
    pytest.mark.usefixtures("warm_starts"),
    pytest.mark.skipif("SLLM_NIGHTLY" not in os.environ, reason="scripts/test --nightly runs it"),
]

RATIOS = {"beside_unthrottled_share", "beside_ours_share", "ours_write_share"}


def test_interference_measures_every_case_and_leaves_no_file(tmp_path: Path) -> None:
    report = tiny_report("interference", tmp_path)
    assert report["command"] == f"scripts/bench interference --repeats {REPEATS} --tiny"
    assert report["ratios"].keys() == RATIOS
    assert all(spread["n"] == REPEATS for spread in report["ratios"].values())
    assert all(report["ratios"][name]["min"] > 0 for name in RATIOS - {"ours_write_share"})
    assert [row["n"] for row in report["rows"]] == [REPEATS] * 6
    assert all(path.is_dir() or path.suffix == ".so" for path in (tmp_path / "load-tiny").iterdir())
