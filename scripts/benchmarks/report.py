"""What every benchmark prints and writes: rows, ratios with their spread, versions, machine."""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sllm_actor.cli.show import out, table
from sllm_actor.units import format_bytes

PACKAGES = ("sllm_actor", "torch", "transformers", "uvloop", "msgspec", "msgpack", "aiohttp")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


class Report:
    """Collects the rows and ratios of one run."""

    def __init__(self, bench: str, repeats: int, options: str = "") -> None:
        self._bench = bench
        self._command = f"scripts/bench {bench} --repeats {repeats}{options}"
        self.peer_versions: dict[str, str] = {}
        self.machine: dict[str, Any] = {}
        self._rows: list[dict[str, Any]] = []
        self._ratios: dict[str, dict[str, float]] = {}

    def row(self, **values: Any) -> None:
        """Add one measurement, or one summary, as it is."""
        self._rows.append(values)

    def ratio(self, name: str, values: Sequence[float]) -> None:
        """Add a ratio from its value in each repeat."""
        self._ratios[name] = {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "n": len(values),
        }

    def content(self) -> dict[str, Any]:
        """Give the whole report in the shape that all benchmarks share."""
        memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return {
            "bench": self._bench,
            "command": self._command,
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in PACKAGES}
            | self.peer_versions,
            "machine": {"processor": _processor(), "cores": os.cpu_count(), "memory": format_bytes(memory_bytes)}
            | self.machine,
            "rows": self._rows,
            "ratios": self._ratios,
        }

    def print(self) -> None:
        """Print the rows and ratios as tables; rows of other columns are another table."""
        content = self.content()
        out.print(f"\n[bold]{content['command']}[/bold]")
        out.print(", ".join(f"{name} {number}" for name, number in content["versions"].items()))
        out.print(", ".join(str(fact) for fact in content["machine"].values()) + "\n")
        for columns, rows in itertools.groupby(self._rows, tuple):
            table(columns, [[str(row[column]) for column in columns] for row in rows])
            out.print()
        table(
            ("RATIO", "MEDIAN", "MIN", "MAX", "N"),
            [
                [name, f"{spread['median']:.2f}", f"{spread['min']:.2f}", f"{spread['max']:.2f}", str(spread["n"])]
                for name, spread in self._ratios.items()
            ],
        )

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_text(json.dumps(self.content(), indent=2) + "\n")
        out.print(f"\nwritten to {path}")
