"""What a benchmark prints when it ends: nothing that was measured is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUN = """
from benchmarks.report import Report
report = Report("none", 5)
report.row(policy="first", requests=7)
report.row(policy="first", beside="2-3", starts=9)
report.ratio("error.median", [0.25])
report.print()
"""


def test_rows_of_several_kinds_are_several_tables() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "scripts")}
    ran = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, check=True)
    lines = [line.split() for line in ran.stdout.splitlines() if line.strip()]
    assert lines[-6:] == [
        ["policy", "requests"], ["first", "7"],
        ["policy", "beside", "starts"], ["first", "2-3", "9"],
        ["RATIO", "MEDIAN", "MIN", "MAX", "N"], ["error.median", "0.25", "0.25", "0.25", "1"],
    ]  # fmt: skip
