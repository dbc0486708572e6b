"""`scripts/bench interference` with a tiny shape: every case runs, and the report has its shape."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_bench_load import ROOT, TMPFS

REPEATS = 5
RATIOS = {"beside_unthrottled_share", "beside_ours_share", "ours_write_share"}


def test_interference_measures_every_case_and_leaves_no_file(tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("the limits need a C compiler")
    kind = subprocess.run(["stat", "--file-system", "--format=%t", str(tmp_path)], capture_output=True, check=True)
    if int(kind.stdout, 16) == TMPFS:
        pytest.skip("files on tmpfs can't be made cold")
    written = tmp_path / "report.json"
    subprocess.run(
        [
            sys.executable, "-m", "benchmarks", "interference", "--tiny", "--repeats", str(REPEATS),
            "--json", str(written), "--work-dir", str(tmp_path),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT / "scripts")}, cwd=ROOT, check=True, timeout=300,
    )  # fmt: skip
    report = json.loads(written.read_text())
    assert report.keys() == {"bench", "command", "versions", "machine", "rows", "ratios"}
    assert report["command"] == f"scripts/bench interference --repeats {REPEATS} --tiny"
    assert report["ratios"].keys() == RATIOS
    assert all(spread["n"] == REPEATS for spread in report["ratios"].values())
    assert all(report["ratios"][name]["min"] > 0 for name in RATIOS - {"ours_write_share"})
    assert [row["n"] for row in report["rows"]] == [REPEATS] * 6
    assert all(path.is_dir() or path.suffix == ".so" for path in (tmp_path / "load-tiny").iterdir())
