"""The tables of docs/evaluation.md, with every simulated run that they are made of: `scripts/evaluation_tables`."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import msgspec

from sllm_actor.cli.simulation import Workload
from sllm_actor.testing.evaluation import evaluate
from sllm_actor.testing.workloads import CV
from sllm_actor.testing.world import SYSTEMS, Description, Models, World, changed

RATES = (0.2, 0.8, 1.4)
POLICIES = ("ours", "preempt", "availability", "locality_wait")
# How the paper's recipe can be read: the coefficient of variation, and the seconds of the trace's intervals.
READINGS: dict[str, tuple[float, int | None]] = {
    "Poisson": (1.0, None), "60 s": (CV, 60), "300 s": (CV, 300), "one process": (CV, None),
}  # fmt: skip
# On how many of the four SSDs each model is in the beginning.
COPIES = {"one copy": "copies=1", "four copies": ""}
# Where so many of the requests have no answer, the others' mean is compared with no mean of all.
TOO_MANY_FAILED = 0.01

Summary = dict[str, Any]


class Case(NamedTuple):
    """What is simulated, but for its seed: so many `models`. `changes` are those of `--what-if`."""

    models: int
    shape: str
    lengths: str
    rate: float = 0.8
    reading: str = "one process"
    system: str = "ours"
    changes: str = ""

    @property
    def label(self) -> str:
        """What is served, and how long it is."""
        lengths = {"gsm8k": "GSM8K", "sharegpt": "ShareGPT"}[self.lengths]
        return f"{self.models} \N{MULTIPLICATION SIGN} {self.shape.upper()}, {lengths}"


SMALL = Case(32, "opt-6.7b", "gsm8k")
ROWS = (
    SMALL, Case(16, "opt-13b", "gsm8k"), Case(8, "opt-30b", "gsm8k"),
    Case(32, "opt-6.7b", "sharegpt"), Case(16, "opt-13b", "sharegpt"), Case(8, "opt-30b", "sharegpt"),
)  # fmt: skip

# Says in a cell what the runs of its cases come to, each a run for each seed.
Show = Callable[..., str]


class Cell(NamedTuple):
    """One cell of a table."""

    show: Show
    cases: tuple[Case, ...]


class Table(NamedTuple):
    """One table: its head, and its rows, which begin with their names."""

    head: tuple[str, ...]
    rows: list[tuple[str, list[Cell]]]


def tables() -> dict[str, Table]:
    """Give all tables by name."""
    found = {
        "readings": _table("models, lengths", READINGS, ROWS, lambda row, name: _cell(_wait, row, reading=name)),
        "others": _table(
            "models, lengths", READINGS, ROWS,
            lambda row, name: Cell(_each(_mean), tuple(
                row._replace(reading=name, system=one) for one in ("ray_serve_cache", "ray_serve", "kserve")
            )),
        ),
        "references": _table(
            "models, lengths", READINGS, ROWS, lambda row, name: _cell(_references, row, reading=name)
        ),
        "made": _table(
            "models, lengths", ("no device", "bytes, engine", "no slot", "all", "oracle's", "times"), ROWS[:4],
            lambda row, name: _cell(_MADE[name], row),
        ),
        "starts": _table(
            "models, lengths", tuple(product(COPIES, ("Poisson", "one process"))), ROWS[:5],
            lambda row, one: _cell(_start, row, changes=COPIES[one[0]], reading=one[1]),
        ),
        "schedulers": _table(
            "copies, requests a second", POLICIES, tuple(product(COPIES, RATES)),
            lambda row, policy: _cell(_p99s, SMALL, changes=COPIES[row[0]], rate=row[1], system=policy),
        ),
        "schedulers, means": _table(
            "copies, requests a second", POLICIES, tuple(product(COPIES, RATES)),
            lambda row, policy: _cell(_mean, SMALL, changes=COPIES[row[0]], rate=row[1], system=policy),
        ),
        "schedulers, Poisson": _table(
            "copies, requests a second", POLICIES, tuple(product(COPIES, RATES)),
            lambda row, policy: _cell(
                _p99_and_mean, SMALL, changes=COPIES[row[0]], rate=row[1], system=policy, reading="Poisson"
            ),
        ),
        "devices": _table(
            "devices a server", _BESIDE, (1, 2, 3, 4), lambda devices, name: _beside(name, changes=f"devices={devices}")
        ),
        "models": _table(
            "models", (*_BESIDE, "starts"), (16, 32, 64, 128), lambda models, name: _beside(name, models=models)
        ),
    }  # fmt: skip
    what_if = ("", "copies=1", "concurrency=8", "copies=1,concurrency=8")
    rows = [(changes or "nothing", SMALL._replace(changes=changes)) for changes in what_if]
    rows += [
        ("concurrency=8, at 0.2", SMALL._replace(changes="concurrency=8", rate=0.2)),
        ("concurrency=8, ray_serve_cache", SMALL._replace(changes="concurrency=8", system="ray_serve_cache")),
    ]
    cells = [(name, [_cell(show, case) for show in (_mean, _p99, _over_least)]) for name, case in rows]
    return found | {"what if": Table(("what is changed", "mean", "p99", "times the oracle"), cells)}


def _table(
    corner: str, columns: Sequence[Any] | dict[str, Any], rows: Sequence[Any], cell: Callable[..., Cell]
) -> Table:
    return Table(
        (corner, *map(_name, columns)), [(_name(row), [cell(row, column) for column in columns]) for row in rows]
    )


def _name(one: Any) -> str:
    if isinstance(one, Case):
        return one.label
    return ", ".join(map(str, one)) if isinstance(one, tuple) else str(one)


def _cell(show: Show, case: Case, **changes: Any) -> Cell:
    return Cell(show, (case._replace(**changes),))


_BESIDE = ("ours", "Ray Serve with cache", "ours over the oracle")


def _beside(name: str, **changes: Any) -> Cell:
    shows: dict[str, Show] = {"ours over the oracle": _over_least, "starts": lambda runs: f"{_of(runs, 'starts'):.0f}"}
    system = "ray_serve_cache" if name == "Ray Serve with cache" else "ours"
    return _cell(shows.get(name, _mean_and_p99), SMALL, system=system, **changes)


# What cells say.


def _of(runs: Sequence[Summary], name: str) -> float:
    return fmean(float(run[name]) for run in runs)


def _failed(runs: Sequence[Summary]) -> float:
    return _of(runs, "failed") / _of(runs, "requests")


def number(value: float) -> str:
    """Give a number with as many digits as say something."""
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _mean(runs: Sequence[Summary]) -> str:
    failed = _failed(runs)
    share = f" ({100 * failed:.0f} %)" if failed >= TOO_MANY_FAILED else " (<1 %)" if failed else ""
    return number(_of(runs, "wait_mean_s")) + share


def _wait(runs: Sequence[Summary]) -> str:
    if _failed(runs) >= TOO_MANY_FAILED:
        return _mean(runs)
    return f"{_mean(runs)}; {number(_of(runs, 'over_least'))}, {number(_of(runs, 'over_on_demand'))}"


def _each(show: Show) -> Show:
    return lambda *each: "; ".join(map(show, each))


def _references(runs: Sequence[Summary]) -> str:
    return ", ".join(number(_of(runs, f"{name}_s")) for name in ("least", "first_come", "on_demand"))


def _value(name: str) -> Show:
    return lambda runs: number(_of(runs, name))


_p99, _over_least = _value("wait_p99_s"), _value("over_least")


def _p99s(runs: Sequence[Summary]) -> str:
    return f"{_p99(runs)} ({', '.join(format(run['wait_p99_s'], '.0f') for run in runs)})"


def _p99_and_mean(runs: Sequence[Summary]) -> str:
    return f"{_p99(runs)}, {_mean(runs)}"


def _mean_and_p99(runs: Sequence[Summary]) -> str:
    return f"{_mean(runs)} ({_p99(runs)})"


def _start(runs: Sequence[Summary]) -> str:
    return f"{number(_of(runs, 'start_mean_s'))} s, {_of(runs, 'start_over_least'):.2f}"


_MADE: dict[str, Show] = {
    "no device": _value("wait_place_s"), "bytes, engine": _value("wait_load_s"), "no slot": _value("wait_slot_s"),
    "all": _mean, "oracle's": _value("least_s"), "times": _over_least,
}  # fmt: skip


class Job(NamedTuple):
    """One run."""

    case: Case
    seed: int
    functions: Path
    seconds: float


def run(job: Job) -> Summary:
    """Simulate it."""
    case = job.case
    served = (Models(shape=case.shape, count=case.models),)
    world = World(changed(msgspec.structs.replace(Description(), models=served), case.changes), SYSTEMS[case.system])
    cv, bin_s = READINGS[case.reading]
    workload = Workload(None, job.functions, case.lengths, case.rate, job.seconds, job.seed, cv, bin_s)
    found = evaluate(world, workload.arrivals(len(world.models)), job.seed)
    return found.summary() | found.references._asdict()


def markdown(table: Table, found: dict[Case, list[Summary]]) -> str:
    """Give a table as docs/evaluation.md has it."""
    lines = [table.head, ("---",) * len(table.head)]
    lines += [(name, *(cell.show(*map(found.__getitem__, cell.cases)) for cell in cells)) for name, cells in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def written(command: str, runs: Iterable[Summary]) -> bytes:
    """Give runs as JSON, one a line, with as many digits as anybody looks at."""
    head = {"bench": "evaluation_tables", "command": command, "python": platform.python_version()}
    rounded = (
        {name: round(value, 4) if isinstance(value, float) else value for name, value in run.items()} for run in runs
    )
    lines = b",\n".join(map(msgspec.json.encode, rounded))
    return msgspec.json.encode(head)[:-1] + b',"runs":[\n' + lines + b"\n]}\n"


def main() -> None:
    """Simulate what the tables need, and print them."""
    every = tables()
    parser = argparse.ArgumentParser(prog="scripts/evaluation_tables", description=__doc__)
    parser.add_argument("--functions", type=Path, required=True, metavar="CSV", help="Azure's functions trace of 2019")
    parser.add_argument("--seconds", type=float, default=900.0, help="how long requests come")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=every, default=list(every), metavar="TABLE", help=", ".join(every))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run here, too")
    wanted = parser.parse_args()
    chosen = {name: every[name] for name in wanted.only}
    cases = dict.fromkeys(
        case for table in chosen.values() for _, cells in table.rows for cell in cells for case in cell.cases
    )
    jobs = [Job(case, seed, wanted.functions, wanted.seconds) for case in cases for seed in wanted.seeds]
    # What simulated nodes say of their lives is no result.
    with ProcessPoolExecutor(
        os.cpu_count(), mp_context=get_context("spawn"), initializer=logging.disable, initargs=(logging.ERROR,)
    ) as workers:
        summaries = list(workers.map(run, jobs))
    found: dict[Case, list[Summary]] = {}
    for job, summary in zip(jobs, summaries, strict=True):
        found.setdefault(job.case, []).append(summary)
    if wanted.json is not None:
        runs = (
            {**job.case._asdict(), "seed": job.seed, **summary} for job, summary in zip(jobs, summaries, strict=True)
        )
        command = f"scripts/evaluation_tables {' '.join(sys.argv[1:])}"
        wanted.json.write_bytes(written(command, runs))
    for name, table in chosen.items():
        print(f"\n**{name}**\n\n{markdown(table, found)}", flush=True)


if __name__ == "__main__":
    main()
