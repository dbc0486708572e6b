"""`scripts/bench load` with tiny shapes: every subject that needs no peers runs, and the report has its shape."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
REPEATS = 5
RATIOS = {
    "cold.share_of_limit", "stock.share_of_optimized", "cold.cpu_s_per_gb", "cold.memory_beyond_pool_mib",
    "two.share_of_limit",
}  # fmt: skip
TMPFS = 0x01021994


def _is_tmpfs(folder: Path) -> bool:
    found = subprocess.run(["stat", "--file-system", "--format=%t", str(folder)], capture_output=True, check=True)
    return int(found.stdout, 16) == TMPFS


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("load")
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("the limits need a C compiler")
    if _is_tmpfs(folder):
        pytest.skip("files on tmpfs can't be made cold")
    written = folder / "report.json"
    subprocess.run(
        [
            sys.executable, "-m", "benchmarks", "load", "--tiny", "--without-peers",
            "--repeats", str(REPEATS), "--json", str(written), "--work-dir", str(folder),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT / "scripts")}, cwd=ROOT, check=True, timeout=300,
    )  # fmt: skip
    content: dict[str, Any] = json.loads(written.read_text())
    return content


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
