"""Cold starts of OPT-1.3B's shape (2.6 GB, fp16), from the host pool and from the disk, against their limits.

That is the prefill alone, measured on the running instance with a prompt of the same length that nobody has computed
before, and for the disk also the reading of the bytes: O_DIRECT, four threads, into memory that is faulted in. Both are
measured in each repeat.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import load_limits
from benchmarks.asking import first_token, part_rows, see_start
from benchmarks.load_folders import Folders
from benchmarks.report import Report
from sllm_actor.cli.show import out
from sllm_actor.testing.node_process import NodeProcess, running_node
from sllm_actor.units import MIB

NAME, SHAPE = "opt1.3b", "opt-1.3b"
# 157 chunks of 16 MiB.
POOL = "host_pool_bytes=2560MiB"
LIMIT_THREADS, LIMIT_BLOCK_BYTES = 4, 16 * MIB
HOST, SSD = "host memory", "ssd"
# What the issue of such a start allows: a share of the prefill and a constant; a share of the reading and the prefill.
PREFILL_SHARE, ALLOWED_S, READING_SHARE = 1.25, 0.15, 1.15
WORDS = ("river", "stone", "winter", "garden", "music", "paper", "silver", "window", "harbor", "summer")


class Start(NamedTuple):
    """One cold start: how long it took, the prefill alone, and its timeline."""

    took_s: float
    prefill_s: float
    timeline: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.took_s:.3f} s (prefill {self.prefill_s:.3f} s)"


def run(report: Report, repeats: int, work_dir: Path, data: Path) -> None:
    """Measure starts out of both tiers by turns, with the limits in between."""
    folder = work_dir / SHAPE
    command = [sys.executable, "-m", "sllm_actor.testing.shapes", str(folder), "--shape", SHAPE]
    command += ["--shapes", str(data / "model_layouts"), "--tokenizers", str(data / "tokenizers")]
    subprocess.run(command, check=True)
    machine = load_limits.Machine(load_limits.build(work_dir / "load"))
    folders = Folders(work_dir, machine)
    weights = folders.weights(SHAPE)
    size_bytes = sum(path.stat().st_size for path in weights)
    memory = machine.memory(max(path.stat().st_size for path in weights), True)

    def limit_s() -> float:
        folders.evict(SHAPE)
        return sum(
            machine.read_s(path, memory, path.stat().st_size, LIMIT_BLOCK_BYTES, LIMIT_THREADS, True)
            for path in weights
        )

    with running_node(work_dir / "bench-data-large", POOL, "keep_alive_s=inf") as node:
        node.deploy(folder.absolute(), NAME, replace=True)
        cold = _Cold(node, size_bytes)
        cold.start(SSD, lambda: folders.evict(SHAPE))  # Warms the machine, and is not counted.
        pool: list[Start] = []
        ssd: list[Start] = []
        limits: list[float] = []
        for repeat in range(repeats):
            pool.append(cold.start(HOST, lambda: None))
            limits.append(limit_s())
            ssd.append(cold.start(SSD, lambda: folders.evict(SHAPE)))
            out.print(f"{repeat + 1}/{repeats} {NAME}, pool: {pool[-1]}, disk: {ssd[-1]}, limit {limits[-1]:.3f} s")
    _rows(report, f"{NAME} from the host pool", pool)
    _rows(report, f"{NAME} from the disk", ssd)
    report.row(model=f"{NAME} from the disk", part="limit of the disk", ours_s=_median(limits), fresh_process_s="")
    report.ratio(
        f"{NAME}.pool_over_allowed",
        [start.took_s / (PREFILL_SHARE * start.prefill_s + ALLOWED_S) for start in pool],
    )
    report.ratio(
        f"{NAME}.ssd_over_allowed",
        [start.took_s / (READING_SHARE * limit + start.prefill_s) for start, limit in zip(ssd, limits, strict=True)],
    )


class _Cold:
    """Starts the model out of one tier, sees that it was that one, and measures the prefill behind it."""

    def __init__(self, node: NodeProcess, size_bytes: int) -> None:
        self._node = node
        self._size_bytes = size_bytes
        self._asked = 0

    def start(self, tier: str, make_cold: Callable[[], None]) -> Start:
        self._node.call("POST", f"/admin/models/{NAME}/unload", {})
        if tier == SSD:
            self._node.call("POST", f"/admin/models/{NAME}/evict", {"tier": "host"})
        make_cold()
        took_s, timeline = first_token(self._node, NAME, self._prompt())
        see_start(timeline, {tier: self._size_bytes})
        _, warm = first_token(self._node, NAME, self._prompt())
        (prefill_s,) = (span["end_s"] - span["begin_s"] for span in warm["spans"] if span["name"] == "prefill")
        return Start(took_s, prefill_s, timeline)

    def _prompt(self) -> str:
        """Give a prompt that begins as none before did, always as long."""
        self._asked += 1
        number, words = self._asked, []
        for _ in range(8):
            number, word = divmod(number, len(WORDS))
            words.append(WORDS[word])
        return " ".join(["", *words])


def _rows(report: Report, label: str, starts: list[Start]) -> None:
    for part, values in (
        ("request to first token", [each.took_s for each in starts]),
        ("prefill alone", [each.prefill_s for each in starts]),
    ):
        report.row(model=label, part=part, ours_s=_median(values), fresh_process_s="")
    part_rows(report, label, starts[-1].timeline)


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 4)
