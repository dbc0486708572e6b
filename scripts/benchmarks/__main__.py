"""Choose a benchmark by its name and run it."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import coldstart
from benchmarks.report import Report

BENCHES = {"coldstart": coldstart.run}


def main() -> None:
    """Run one benchmark, print its table, and write its JSON where that is asked for."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure against peers in the same run.")
    parser.add_argument("name", choices=sorted(BENCHES))
    parser.add_argument("--repeats", type=int, default=7, help="interleaved repeats (at least 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, too")
    parser.add_argument("--work-dir", type=Path, default=Path(".demo"), help="where checkpoints and data are kept")
    arguments = parser.parse_args()
    if arguments.repeats < 5:
        parser.error("--repeats: a median of fewer than five says little")
    report = Report(arguments.name, arguments.repeats)
    BENCHES[arguments.name](report, arguments.repeats, arguments.work_dir)
    report.print()
    if arguments.json:
        report.write(arguments.json)


if __name__ == "__main__":
    main()
