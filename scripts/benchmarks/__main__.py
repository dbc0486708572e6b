"""Choose a benchmark by its name and run it."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import (
    actors,
    cluster_live,
    coldstart,
    gateway,
    interference,
    load,
    lora,
    migrate,
    policy,
    recover,
    remote,
    serve,
    twin,
    weights,
)
from benchmarks.report import Report

BENCHES = (
    "actors", "cluster-live", "coldstart", "gateway", "interference", "load", "lora", "migrate", "policy", "recover",
    "remote", "serve", "twin", "weights",
)  # fmt: skip
SECONDS = 0.8


def wanted() -> argparse.Namespace:
    """Read what is to be measured from the command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure against peers in the same run.")
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--repeats", type=int, default=7, help="interleaved repeats (at least 5; of remote, 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, too")
    parser.add_argument("--work-dir", type=Path, default=Path(".demo"), help="where checkpoints and data are kept")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        choices=(*actors.NAMES, *load.NAMES, *weights.SHAPES, *cluster_live.POLICIES),
        metavar="PART",
        help="of actors, load, weights and cluster-live: these parts alone",
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="of cluster-live, load, interference, lora, migrate, recover, remote, serve, twin, weights: much less",
    )
    parser.add_argument("--without-peers", action="store_true", help="of load: ours and the limits alone")
    parser.add_argument(
        "--seconds",
        type=float,
        help="how long: of actors each measurement, of cluster-live each policy, of twin the requests",
    )
    parser.add_argument(
        "--trace", type=Path, metavar="CSV", help="of cluster-live, twin: invocations of functions by minute"
    )
    arguments = parser.parse_args()
    if arguments.repeats < (3 if arguments.name == "remote" else 5) and not arguments.tiny:
        parser.error("--repeats: a median of fewer than five (of remote, which takes minutes each, three) says little")
    return arguments


def main() -> None:
    """Run one benchmark, print its table, and write its JSON where that is asked for."""
    arguments = wanted()
    options = f" --only {' '.join(arguments.only)}" if arguments.only else ""
    options += f" --seconds {arguments.seconds:g}" if arguments.seconds is not None else ""
    options += f" --trace {arguments.trace.name}" if arguments.trace is not None else ""
    options += " --tiny" if arguments.tiny else ""
    options += " --without-peers" if arguments.without_peers else ""
    report = Report(arguments.name, arguments.repeats, options)
    if arguments.name == "actors":
        actors.run(report, arguments.repeats, arguments.only, arguments.seconds or SECONDS)
    elif arguments.name == "cluster-live":
        seconds = cluster_live.TINY_SECONDS if arguments.tiny else cluster_live.SECONDS
        cluster_live.run(report, arguments.seconds or seconds, arguments.trace, arguments.only)
    elif arguments.name == "twin":
        seconds = twin.TINY_SECONDS if arguments.tiny else twin.SECONDS
        twin.run(report, arguments.seconds or seconds, arguments.trace)
    elif arguments.name == "load":
        chosen = load.Options(arguments.work_dir, arguments.only, arguments.tiny, not arguments.without_peers)
        load.run(report, arguments.repeats, chosen)
    elif arguments.name == "interference":
        interference.run(report, arguments.repeats, arguments.work_dir, arguments.tiny)
    elif arguments.name == "migrate":
        migrate.run(report, arguments.repeats, arguments.work_dir, arguments.tiny)
    elif arguments.name == "recover":
        recover.run(report, arguments.repeats, arguments.work_dir, arguments.tiny)
    elif arguments.name == "gateway":
        gateway.run(report, arguments.repeats)
    elif arguments.name == "policy":
        policy.run(report, arguments.repeats, arguments.work_dir)
    elif arguments.name == "remote":
        remote.run(report, arguments.repeats, arguments.work_dir, arguments.tiny)
    elif arguments.name == "lora":
        lora.run(report, arguments.repeats, arguments.work_dir, coldstart.DATA, arguments.tiny)
    elif arguments.name == "serve":
        serve.run(report, arguments.repeats, arguments.tiny)
    elif arguments.name == "weights":
        weights.run(report, arguments.repeats, arguments.work_dir, arguments.only, arguments.tiny)
    else:
        coldstart.run(report, arguments.repeats, arguments.work_dir)
    report.print()
    if arguments.json:
        report.write(arguments.json)


if __name__ == "__main__":
    main()
