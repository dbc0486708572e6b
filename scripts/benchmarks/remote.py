"""A checkpoint that is nowhere on the node: to host memory as it comes, against its bare transfer and against
downloading it first.

The origin is nginx behind a relay that lets BYTES_PER_S through in all. Each repeat measures, one after another: the
transfer to nowhere; ours; our own pull and a load after it; a plain download into synced files and a load after it; and
what people do today: huggingface_hub's download and from_pretrained, in a process that has imported all, and in a new
one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import load_limits
from benchmarks.actors_process import SCRIPTS, Child
from benchmarks.load_cases import MAIN, OPTIMIZED, STOCK, Case
from benchmarks.load_folders import Folders
from benchmarks.report import Report
from sllm_actor.cli.show import out
from sllm_actor.units import MIB, format_rate, format_seconds

BYTES_PER_S = 200e6
CHUNK_BYTES, TINY_CHUNK_BYTES = 16 * MIB, 4 * MIB
FRESH_TIMEOUT_S = 300
# No questions to anybody else, and no bars.
HUB_VARIABLES = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
TRANSFER, STREAM, PULL, PLAIN = "bare transfer", "ours, as it comes", "ours, pull then load", "download then load"
HUB, FRESH = "huggingface_hub then from_pretrained", "the same in a new process"


def run(report: Report, repeats: int, work_dir: Path, tiny: bool) -> None:
    """Measure all six, `repeats` times, interleaved."""
    root = work_dir / ("load-tiny" if tiny else "load")
    folders = Folders(root, load_limits.Machine(load_limits.build(root)))
    folders.make([Case("remote", MAIN, layout, "ours") for layout in (OPTIMIZED, STOCK)], tiny, None)
    folder = root / f"{MAIN}-{OPTIMIZED}"
    names = [file["name"] for file in json.loads((folder / "sllm.json").read_text())["files"]]
    weights = {name: (folder / name).stat().st_size for name in names}
    smalls = {path.name: path.stat().st_size for path in folder.iterdir() if path.name not in weights}
    chunk_bytes = TINY_CHUNK_BYTES if tiny else CHUNK_BYTES
    pool_bytes = sum(-(-size // chunk_bytes) for size in weights.values()) * chunk_bytes
    with ExitStack() as stack:
        served = Child(stack, "remote_origin", "origin", str(folder), str(BYTES_PER_S))
        url = f"http://127.0.0.1:{served.ready['port']}/"
        scratch = (work_dir / "remote").absolute()
        hub = Child(stack, "remote_origin", "origin", str(root / MAIN), str(BYTES_PER_S))
        hub_url, cache = f"http://127.0.0.1:{hub.ready['port']}", scratch / "hub"
        warm = Child(stack, "remote_peers", "warm", str(cache))
        node = Child(stack, "remote_ours", "node", str(scratch / "node"), str(pool_bytes), str(chunk_bytes))
        plain = Child(stack, "remote_ours", "plain", str(scratch / "plain"), str(pool_bytes), str(chunk_bytes))
        measures: dict[str, Callable[[], dict[str, Any]]] = {
            TRANSFER: lambda: plain.call("transfer", url=url, files=weights, keep=False),
            STREAM: lambda: node.call("stream", url=url),
            PULL: lambda: node.call("pull_then_load", url=url),
            PLAIN: lambda: plain.call("transfer", url=url, files=weights | smalls, keep=True),
            HUB: lambda: warm.call("download_then_load", url=hub_url),
            FRESH: lambda: _in_a_new_process(cache, hub_url),
        }
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in measures}
        for repeat in range(repeats):
            for name, measure in measures.items():
                found[name].append(measure())
                out.print(f"{repeat + 1}/{repeats} {name} {format_seconds(found[name][-1]['s'])}")
    _write(report, found)


def _in_a_new_process(cache: Path, url: str) -> dict[str, Any]:
    """Time all of it, from the beginning of the process to the model."""
    shutil.rmtree(cache, ignore_errors=True)
    begun_s = time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.remote_peers", "fresh", str(cache), url],
        env=os.environ | HUB_VARIABLES | {"PYTHONPATH": str(SCRIPTS)},
        stdout=subprocess.PIPE,
        check=True,
        timeout=FRESH_TIMEOUT_S,
    )
    answer: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return answer | {"s": answer["ended_s"] - begun_s}


def _write(report: Report, found: dict[str, list[dict[str, Any]]]) -> None:
    seconds = {name: [each["s"] for each in answers] for name, answers in found.items()}
    for name, values in seconds.items():
        ordered = sorted(values)
        middle = ordered[len(ordered) // 2]
        note = format_rate(found[name][0]["size_bytes"], middle)
        if name == STREAM:
            stored_s = sorted(each["stored_s"] for each in found[name])[len(ordered) // 2]
            note += f"; on the SSD after {format_seconds(stored_s)}"
        if name in (HUB, FRESH):
            parts = {"download": "arrived_s", "sync": "sync_s", "from_pretrained": "load_s"}
            medians = {
                part: sorted(each[key] for each in found[name])[len(ordered) // 2] for part, key in parts.items()
            }
            note += "".join(f"; {part} {format_seconds(part_s)}" for part, part_s in medians.items())
        shown = {"median": middle, "min": ordered[0], "max": ordered[-1]}
        rounded = {which: round(value, 3) for which, value in shown.items()}
        report.row(measured=name, unit="s", **rounded, n=len(ordered), note=note)

    def ratio(over: str, under: str) -> list[float]:
        return [above / below for above, below in zip(seconds[over], seconds[under], strict=True)]

    report.ratio("stream_over_transfer", ratio(STREAM, TRANSFER))
    # As it is done without us; how much of that is our own quick load is seen beside it.
    report.ratio("sequential_over_stream", ratio(HUB, STREAM))
    report.ratio("plain_then_our_load_over_stream", ratio(PLAIN, STREAM))
    report.ratio("pull_then_load_over_stream", ratio(PULL, STREAM))
    report.ratio("fresh_process_over_stream", ratio(FRESH, STREAM))
