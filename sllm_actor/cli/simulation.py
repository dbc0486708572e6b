"""`sllm-node simulate`: a cluster that is described, asked as a workload says, on virtual time; systems by turns."""

from __future__ import annotations

import random
import shlex
import sys
from math import ceil
from pathlib import Path
from typing import NamedTuple

from sllm_actor.cli.show import err, out, print_json, table
from sllm_actor.errors import InvalidInput
from sllm_actor.testing import traces, workloads
from sllm_actor.testing.evaluation import Run, evaluate
from sllm_actor.testing.evaluation_report import COLUMNS, check_figures, page, rows
from sllm_actor.testing.workloads import Arrival
from sllm_actor.testing.world import SYSTEMS, Description, World, calibrated, changed, read_description

MINUTE_S = 60
# So much longer than it is needed is a workload drawn, and its beginning taken: few bursts make many requests or few.
DRAWN = 4


class Workload(NamedTuple):
    """What is asked for, as the command's options have it."""

    trace: Path | None
    functions: Path | None
    lengths: str
    rate_per_s: float
    seconds: float
    seed: int
    cv: float = workloads.CV
    bin_s: int | None = None

    def arrivals(self, models: int) -> list[Arrival]:
        """Give the requests, for so many models.

        Raises:
            InvalidInput: a trace can't be read, or there are no such lengths, or intervals where there can be none.
        """
        dice = random.Random(self.seed)
        functions, trace = self.functions, self.trace
        if self.bin_s is not None:
            return self._binned(dice, models, self.bin_s)
        parts = workloads.spread(traces.function_counts(functions), models) if functions else workloads.zipf(models)
        if trace is not None:
            found = traces.read_trace(trace)
            drawn = dice.choices(range(models), weights=parts, k=len(found))
            found = [one._replace(model=model) for one, model in zip(found, drawn, strict=True)]
        else:
            found = workloads.gamma_arrivals(
                dice, seconds=DRAWN * self.seconds, per_s=self.rate_per_s, parts=parts, lengths=self._draw(),
                cv=self.cv, most=max(1, round(self.rate_per_s * self.seconds)),
            )  # fmt: skip
        return [one for one in workloads.rate_scaled(found, self.rate_per_s) if one.at_s <= self.seconds]

    def _binned(self, dice: random.Random, models: int, bin_s: int) -> list[Arrival]:
        if self.functions is None or self.trace is not None:
            raise InvalidInput("--bin-s joins the minutes of --functions, without --trace")
        if bin_s % MINUTE_S:
            raise InvalidInput(f"--bin-s is of whole minutes, as the trace is: 60, 120, …, not {bin_s}")
        each = bin_s // MINUTE_S
        minutes = traces.function_minutes(self.functions, each * ceil(self.seconds / bin_s))
        return workloads.binned_arrivals(
            dice, workloads.binned(minutes, models, each), bin_s=bin_s, seconds=self.seconds, per_s=self.rate_per_s,
            lengths=self._draw(), cv=self.cv,
        )  # fmt: skip

    def _draw(self) -> workloads.DrawLength:
        if self.lengths in workloads.LENGTHS:
            return workloads.LENGTHS[self.lengths]
        if Path(self.lengths).is_file():
            return workloads.one_of(traces.seen_lengths(Path(self.lengths)))
        raise InvalidInput(f"lengths are {', '.join(workloads.LENGTHS)} or a trace's file, not {self.lengths!r}")


def run(
    cluster: Path | None, calibration: Path | None, what_if: list[str], systems: str, workload: Workload,
    html: Path | None, *, as_json: bool,
) -> None:  # fmt: skip
    """Run every system in the cluster, and in each of its variants, and print what they came to.

    Raises:
        InvalidInput: what is described can't be.
        ConfigInvalid: the calibration can't be read.
    """
    described = read_description(cluster) if cluster else Description()
    if calibration is not None:
        described = calibrated(described, calibration)
    variants = {"": described} | {changes: changed(described, changes) for changes in what_if}
    names = [name.strip() for name in systems.split(",")]
    if unknown := [name for name in names if name not in SYSTEMS]:
        raise InvalidInput(f"there is no system {unknown[0]!r}; there are {', '.join(SYSTEMS)}")
    if html is not None:
        # Before minutes are spent.
        check_figures()
        if not html.parent.is_dir():
            raise InvalidInput(f"{html.parent} is no folder to write {html.name} into")
    runs: dict[str, Run] = {}
    for changes, variant in variants.items():
        worlds = {f"{name} {changes}".strip(): World(variant, SYSTEMS[name]) for name in names}
        arrivals = workload.arrivals(sum(one.count for one in variant.models))
        runs |= {
            label: _one(label, world, arrivals, workload.seed, shown=not as_json) for label, world in worlds.items()
        }
    if html is not None:
        command = "sllm-node simulate " + shlex.join(sys.argv[2:])
        html.write_text(page("A cluster, simulated", command, described, runs), encoding="utf-8")
    if as_json:
        print_json({name: one.summary() | {"tiers": dict(one.tiers())} for name, one in runs.items()})
        return
    table(("SYSTEM", *(name.upper() for name in COLUMNS.values())), rows(runs))
    if html is not None:
        out.print(f"figures: {html}")


def _one(label: str, world: World, arrivals: list[Arrival], seed: int, *, shown: bool) -> Run:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not shown) as progress:
        task = progress.add_task(label, total=len(arrivals))
        return evaluate(world, arrivals, seed, lambda ended: progress.update(task, completed=ended))
