"""Huge pages that a benchmark reserves are given back, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIMIT_S = 60.0
RUN = """
import sys
from contextlib import ExitStack
from pathlib import Path
from benchmarks.huge_pages import keep
with ExitStack() as stack:
    print(repr(keep(stack, 5, Path(sys.argv[1]))), flush=True)
    sys.stdin.read()
"""


def begun(reserved: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(reserved)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("killed", [False, True])
def test_reserved_pages_are_given_back_when_a_run_ends_and_when_it_is_killed(tmp_path: Path, killed: bool) -> None:
    reserved = tmp_path / "nr_hugepages"
    reserved.write_text("3\n")
    run = begun(reserved)
    assert run.stdout is not None
    assert run.stdout.readline() == "''\n"
    assert reserved.read_text() == "8"
    if killed:
        run.send_signal(signal.SIGKILL)
    run.communicate(timeout=LIMIT_S)
    assert run.returncode == (-signal.SIGKILL if killed else 0)
    ends = time.monotonic() + LIMIT_S
    while reserved.read_text() != "3\n":
        assert time.monotonic() < ends, "they are still reserved"


def test_a_machine_that_gives_none_is_named_with_its_reason(tmp_path: Path) -> None:
    run = begun(tmp_path / "nothing")
    said, _ = run.communicate(timeout=LIMIT_S)
    assert said == '"huge pages can\'t be reserved: No such file or directory"\n'
