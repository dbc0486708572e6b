"""Request to first token of a cold model, against a fresh Python process that does the same with transformers.

The checkpoint is in the page cache for both, and not in our host pool: the pool holds one model, so that
each start of the one evicts the other, and the timeline of every start is checked for where its bytes came from.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import coldstart_large
from benchmarks.asking import first_token, part_rows, see_start
from benchmarks.report import Report
from sllm_actor.cli.show import out
from sllm_actor.sources.builtin import BUILTIN
from sllm_actor.testing.node_process import NodeProcess, running_node

DATA = Path("../shared/data")
# 15 chunks of 16 MiB: OPT-125M in float16 takes all of them.
POOL = "host_pool_bytes=240MiB"


class Subject(NamedTuple):
    """A model to start: its name in the ratios, its folder, what to ask it."""

    name: str
    folder: Path
    prompt: str
    chat: bool


def _read_into_page_cache(folder: Path) -> None:
    for path in folder.iterdir():
        path.read_bytes()


def ours(node: NodeProcess, subject: Subject) -> tuple[float, dict[str, Any]]:
    """Time a cold start over HTTP with streaming, from the request to its first text; give the timeline, too."""
    node.call("POST", f"/admin/models/{subject.name}/unload", {})
    _read_into_page_cache(subject.folder)
    took_s, timeline = first_token(node, subject.name, subject.prompt, chat=subject.chat)
    size_bytes = sum(path.stat().st_size for path in subject.folder.glob("*.safetensors"))
    see_start(timeline, {"page cache": size_bytes})
    return took_s, timeline


def fresh(subject: Subject) -> float:
    """Time a new process from its start to the first token that it prints."""
    _read_into_page_cache(subject.folder)
    kind = "chat" if subject.chat else "completion"
    command = [sys.executable, str(Path(__file__).with_name("fresh_process.py")), str(subject.folder)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    begin_s = time.perf_counter()
    process = subprocess.Popen(
        [*command, subject.prompt, kind], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    took_s = time.perf_counter() - begin_s
    process.stdout.close()
    if process.wait() or not line:
        raise SystemExit("the fresh process failed")
    return took_s


def opt_125m(work_dir: Path) -> Path:
    """Have a checkpoint of OPT-125M's shape, with random weights and a real tokenizer."""
    folder = work_dir / "opt-125m"
    command = [sys.executable, "-m", "sllm_actor.testing.shapes", str(folder)]
    command += ["--shapes", str(DATA / "model_layouts"), "--tokenizers", str(DATA / "tokenizers")]
    subprocess.run(command, check=True)
    return folder


def run(report: Report, repeats: int, work_dir: Path) -> None:
    """Measure both models, ours and fresh by turns; then a large one against what it can't go below."""
    opt = opt_125m(work_dir)
    subjects = (
        Subject("demo", BUILTIN["demo"], "What is 47 + 35?", True),
        Subject("opt125m", opt, "The quick brown fox", False),
    )
    with running_node(work_dir / "bench-data", POOL) as node:
        for subject in subjects:
            node.deploy(subject.folder.absolute(), subject.name, replace=True)
            ours(node, subject)  # The first start of each, and its fresh peer, warm the machine and are not counted.
            fresh(subject)
        times: dict[str, list[tuple[float, float]]] = {subject.name: [] for subject in subjects}
        last: dict[str, dict[str, Any]] = {}
        for repeat in range(repeats):
            for subject in subjects:
                ours_s, last[subject.name] = ours(node, subject)
                fresh_s = fresh(subject)
                times[subject.name].append((ours_s, fresh_s))
                out.print(f"{repeat + 1}/{repeats} {subject.name}: ours {ours_s:.3f} s, fresh process {fresh_s:.3f} s")
        late = [
            name for instance in node.call("GET", "/admin/instances")["instances"] for name in instance["late_imports"]
        ]
        if late:
            raise SystemExit(f"modules were imported after the node was ready: {late}")
    for name, pairs in times.items():
        report.row(
            model=name,
            part="request to first token",
            ours_s=round(statistics.median(pair[0] for pair in pairs), 4),
            fresh_process_s=round(statistics.median(pair[1] for pair in pairs), 4),
        )
        part_rows(report, name, last[name])
        report.ratio(f"{name}.fresh_over_ours", [fresh_s / ours_s for ours_s, fresh_s in pairs])
    coldstart_large.run(report, repeats, work_dir, DATA)
