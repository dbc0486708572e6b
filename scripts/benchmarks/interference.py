"""A cold load while something is written to its disk: alone, beside a download at full speed, and beside ours.

All by turns in one run, on the checkpoint that `load` reads. The download is a process of two threads that write
blocks of 16 MiB past the page cache as fast as they can; ours are the same two writers behind the node's write gate.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import load_limits
from benchmarks.actors_process import Child
from benchmarks.load_cases import OPTIMIZED_COLD
from benchmarks.load_folders import Folders
from benchmarks.load_systems import COLD_SHARE
from benchmarks.report import Report
from sllm_actor.cli.show import out
from sllm_actor.config import Config
from sllm_actor.units import GIB, KIB, MIB, format_rate

ALONE, UNTHROTTLED, OURS, WRITER = (
    "cold load, alone", "cold load, beside a download at full speed", "cold load, beside ours", "download, alone",
)  # fmt: skip
CASES = (ALONE, WRITER, UNTHROTTLED, OURS)
THREADS = 2
WRITER_S, TINY_WRITER_S = 1.0, 0.05
_SIGNIFICANT = 4


class Sizes(NamedTuple):
    """How much is written where."""

    chunk_bytes: int = 16 * MIB
    scratch_bytes: int = GIB
    writer_s: float = WRITER_S


TINY = Sizes(64 * KIB, 8 * MIB, TINY_WRITER_S)
Found = dict[str, dict[str, float]]


def run(report: Report, repeats: int, work_dir: Path, tiny: bool) -> None:
    """Measure every case in each repeat, each time from another one on."""
    sizes = TINY if tiny else Sizes()
    root = work_dir / ("load-tiny" if tiny else "load")
    folders = Folders(root, load_limits.Machine(load_limits.build(root)))
    folders.make([OPTIMIZED_COLD], tiny, None)
    found: list[Found] = []
    with ExitStack() as stack:
        bench = _Bench(stack, folders, sizes)
        bench.measure(ALONE)  # What only the first time costs.
        for repeat in range(repeats):
            first = repeat % len(CASES)
            each: Found = {}
            for case in (*CASES[first:], *CASES[:first]):
                each[case] = bench.measure(case)
                rate = format_rate(each[case]["bytes_per_s"], 1)
                out.print(f"{repeat + 1}/{repeats} {case}: {rate}")
            found.append(each)
    _write_rows(report, found)
    report.ratio("beside_unthrottled_share", [_over(each, UNTHROTTLED, ALONE) for each in found])
    report.ratio("beside_ours_share", [_over(each, OURS, ALONE) for each in found])
    report.ratio(
        "ours_write_share", [each[OURS]["written_bytes_per_s"] / each[WRITER]["bytes_per_s"] for each in found]
    )


def _over(each: Found, case: str, other: str) -> float:
    return each[case]["bytes_per_s"] / each[other]["bytes_per_s"]


class _Bench:
    """The processes, and one measurement after another in them."""

    def __init__(self, stack: ExitStack, folders: Folders, sizes: Sizes) -> None:
        self._folders = folders
        self._sizes = sizes
        root, chunk_bytes, scratch_bytes = str(folders.root), str(sizes.chunk_bytes), str(sizes.scratch_bytes)
        weights = folders.weights(OPTIMIZED_COLD.folder)
        pool_bytes = sum(-(-path.stat().st_size // sizes.chunk_bytes) * sizes.chunk_bytes for path in weights)
        node = (str(pool_bytes), chunk_bytes, str(THREADS), root, scratch_bytes)
        self._node = Child(stack, "interference_ours", "node", *node)
        self._download = Child(stack, "interference_writer", "writer", root, scratch_bytes, chunk_bytes)
        # What the device writes alone, as a profile would say; the latest measurement of it counts.
        self._write_bytes_per_s = 0.0
        self._measure_writer()

    def measure(self, case: str) -> dict[str, float]:
        """Take one measurement."""
        cases: dict[str, Callable[[], dict[str, float]]] = {
            ALONE: self._measure_alone,
            WRITER: self._measure_writer,
            UNTHROTTLED: self._measure_unthrottled,
            OURS: self._measure_ours,
        }
        return cases[case]()

    def _measure_alone(self) -> dict[str, float]:
        return self._load("load")

    def _measure_ours(self) -> dict[str, float]:
        allowed = self._write_bytes_per_s * Config().background_write_percent / 100
        return self._load("load_beside_writes", bytes_per_s=allowed)

    def _measure_unthrottled(self) -> dict[str, float]:
        self._download.call("begin", threads=THREADS)
        try:
            before_bytes, begun_s = self._download.call("look")
            found = self._load("load")
            after_bytes, ended_s = self._download.call("look")
        finally:
            self._download.call("end")
        return found | {"written_bytes_per_s": (after_bytes - before_bytes) / (ended_s - begun_s)}

    def _measure_writer(self) -> dict[str, float]:
        self._download.call("begin", threads=THREADS)
        before_bytes, begun_s = self._download.call("look")
        time.sleep(self._sizes.writer_s)
        after_bytes, ended_s = self._download.call("look")
        self._download.call("end")
        self._write_bytes_per_s = (after_bytes - before_bytes) / (ended_s - begun_s)
        return {"bytes_per_s": self._write_bytes_per_s}

    def _load(self, command: str, **arguments: Any) -> dict[str, float]:
        folder = OPTIMIZED_COLD.folder
        self._folders.evict(folder)
        answer = self._node.call(command, folder=self._folders.path(folder), **arguments)
        if answer["ssd_bytes"] < COLD_SHARE * answer["size_bytes"]:
            raise SystemExit(f"not cold: {answer['ssd_bytes']} of {answer['size_bytes']} bytes were read from the disk")
        return {
            "bytes_per_s": answer["size_bytes"] / answer["s"],
            "written_bytes_per_s": answer.get("written_bytes", 0) / answer["s"],
        }


def _write_rows(report: Report, found: Sequence[Found]) -> None:
    for case in CASES:
        _row(report, case, "moved", [each[case]["bytes_per_s"] for each in found])
    for case in (UNTHROTTLED, OURS):
        _row(report, case, "written meanwhile", [each[case]["written_bytes_per_s"] for each in found])


def _row(report: Report, case: str, what: str, values: Sequence[float]) -> None:
    spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    rounded = {name: float(f"{number / 1e9:.{_SIGNIFICANT}g}") for name, number in spread.items()}
    report.row(measured=case, what=what, unit="GB/s", **rounded, n=len(values))
