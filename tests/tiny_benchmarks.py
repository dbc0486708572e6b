"""Runs one of `scripts/bench` in its tiny shape, and gives its report."""

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
REPEATS = 3
TMPFS = 0x01021994
LIMIT_S = 300


def tiny_report(
    name: str, folder: Path, *options: str, needs_cold_files: bool = True, repeats: int = REPEATS
) -> dict[str, Any]:
    """Run it in `folder`, which stays; skip where its limits can't be compiled, or files not be made cold."""
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("the limits need a C compiler")
    if needs_cold_files and _is_tmpfs(folder):
        pytest.skip("files on tmpfs can't be made cold")
    written = folder / "report.json"
    words = ["--tiny", *options, "--repeats", str(repeats), "--json", str(written), "--work-dir", str(folder)]
    paths = [str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
    subprocess.run(
        [sys.executable, "-m", "benchmarks", name, *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=ROOT,
        check=True,
        timeout=LIMIT_S,
    )
    content: dict[str, Any] = json.loads(written.read_text())
    assert content.keys() == {"bench", "command", "versions", "machine", "rows", "ratios"}
    assert content["command"].startswith(f"scripts/bench {name} ")
    return content


def _is_tmpfs(folder: Path) -> bool:
    found = subprocess.run(["stat", "--file-system", "--format=%t", str(folder)], capture_output=True, check=True)
    return int(found.stdout, 16) == TMPFS
