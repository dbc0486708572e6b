"""`scripts/bench remote` with a tiny shape: every case runs, and the report has its shape."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_bench_load import ROOT

REPEATS = 5
RATIOS = {"stream_over_transfer", "sequential_over_stream", "pull_then_load_over_stream"}


def test_remote_measures_every_case_and_stores_what_it_fetched(tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("the limits need a C compiler")
    written = tmp_path / "report.json"
    subprocess.run(
        [
            sys.executable, "-m", "benchmarks", "remote", "--tiny", "--repeats", str(REPEATS),
            "--json", str(written), "--work-dir", str(tmp_path),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT / "scripts")}, cwd=ROOT, check=True, timeout=300,
    )  # fmt: skip
    report = json.loads(written.read_text())
    assert report["ratios"].keys() == RATIOS
    assert all(spread["n"] == REPEATS for spread in report["ratios"].values())
    assert [row["n"] for row in report["rows"]] == [REPEATS] * 4
    assert all(row["min"] > 0 for row in report["rows"])
