"""`sllm-node simulate` and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sllm_actor.cli.asking import Json, refusals
from sllm_actor.testing.workloads import CV


def simulate(
    cluster: Annotated[Path | None, typer.Argument(help="TOML file that describes it; else four of 4 A40.")] = None,
    what_if: Annotated[
        list[str] | None, typer.Option("--what-if", metavar="NAME=VALUE,…", help="A variant beside it; repeatable.")
    ] = None,
    systems: Annotated[str, typer.Option(help="Who serves: our policies, and other systems, with commas.")] = "ours",
    calibration: Annotated[
        Path | None, typer.Option(help="The disk_profile.json of a real node, whose SSD each has: sllm-node calibrate.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Requests of a trace: Azure's .csv, Mooncake's .jsonl.")] = None,
    functions: Annotated[Path | None, typer.Option(help="Azure's functions trace: each model's popularity.")] = None,
    lengths: Annotated[str, typer.Option(help="gsm8k, sharegpt, or a trace whose lengths are drawn.")] = "gsm8k",
    rate: Annotated[float, typer.Option(min=0.001, max=100_000, help="Requests a second, of all models.")] = 0.8,
    seconds: Annotated[float, typer.Option(min=1, max=604_800, help="How long they come.")] = 600.0,
    cv: Annotated[
        float, typer.Option(min=0.1, max=32, help="How bursty each model's are: 1 is Poisson's, 8 as in the paper.")
    ] = CV,
    bin_s: Annotated[
        int | None, typer.Option(min=60, max=86_400, help="Replay --functions in intervals of so many seconds each.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same run.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write a page with figures (needs the extra 'simulate').")] = None,
    as_json: Json = False,
) -> None:
    """Ask a cluster that does not exist, on virtual time, with this program's own actors: what would it do?

    Example: sllm-node simulate --systems ours,availability,ray_serve --what-if nodes=+2 --html report.html
    """
    from sllm_actor.cli.simulation import Workload, run

    workload = Workload(trace, functions, lengths, rate, seconds, seed, cv, bin_s)
    with refusals(as_json=as_json):
        run(cluster, calibration, what_if or [], systems, workload, html, as_json=as_json)
