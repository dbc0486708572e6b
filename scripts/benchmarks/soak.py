"""A real node that serves many models from a web server, over a host pool and an SSD that hold a few of them.

Requests follow a Zipf distribution. At the end: no error, the hits of each tier; descriptors, threads and processes as
they were after the warm-up; and memory, which goes up and down by some per cent, in the later half of the readings as
in the earlier one.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy

from benchmarks.actors_process import Child
from sllm_actor.checkpoint.convert import convert
from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.cli.show import out
from sllm_actor.sources.builtin import BUILTIN
from sllm_actor.testing.node_process import NodeProcess, running_node
from sllm_actor.units import KIB, MIB

POOL_MODELS, SSD_MODELS = 5, 12
INSTANCES = 3
CHUNK_BYTES = MIB
MEMORY_SHARE = 0.02
ORIGIN_BYTES_PER_S = 2e9
# Every model has been asked for a few times by then, each tier has been full, and allocators have grown.
WARM_UP_SHARE = 0.25
READINGS = 10


def main() -> None:
    """Run one soak; the exit status says whether it is clean."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--models", type=int, default=30)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sllm-soak-")))
        wrong = soak(stack, folder, arguments.models, arguments.requests, random.Random(arguments.seed))
    for line in wrong:
        out.print(f"[bold red]{line}[/bold red]")
    raise SystemExit(1 if wrong else 0)


def soak(stack: ExitStack, folder: Path, models: int, requests: int, chance: random.Random) -> list[str]:
    """Serve and ask; give what is wrong."""
    size_bytes = 0
    for number in range(models):
        size_bytes = _make(folder / "stock", folder / "served" / f"m{number}", number)
    chunks = -(-size_bytes // CHUNK_BYTES)
    origin = Child(stack, "remote_origin", "origin", str(folder / "served"), str(ORIGIN_BYTES_PER_S))
    knobs = (
        f"host_pool_bytes={max(POOL_MODELS * chunks * CHUNK_BYTES, 16 * MIB)}",
        f"chunk_bytes={CHUNK_BYTES}",
        f"ssd_quota_bytes={int(SSD_MODELS * size_bytes * 1.05)}",
        f"max_instances={INSTANCES}",
        "engine_threads=1",
        "warm_engines=1",
        # Otherwise what is remembered of requests still grows after the warm-up.
        "request_history=100",
    )
    node = stack.enter_context(running_node(folder / "data", *knobs))
    for number in range(models):
        node.deploy(f"http://127.0.0.1:{origin.ready['port']}/m{number}/", f"m{number}")
    weights = [1 / (rank + 1) for rank in range(models)]
    hits: Counter[str] = Counter()
    wrong: list[str] = []
    seen: list[dict[str, float]] = []
    warm = int(requests * WARM_UP_SHARE)
    each = max(1, (requests - warm) // READINGS)
    for done in range(requests):
        (number,) = chance.choices(range(models), weights)
        reply = node.request("POST", "/v1/completions", {"model": f"m{number}", "prompt": "1 + 1", "max_tokens": 2})
        if reply.status != 200:
            wrong.append(f"request {done}: {reply.status} {reply.body.decode(errors='replace')[:300]}")
        hits[_tier(node)] += 1
        if done >= warm and (done + 1 - warm) % each == 0:
            seen.append(_quiet(node))
    before, after = (_mean(half) for half in (seen[: len(seen) // 2], seen[len(seen) // 2 :]))
    for tier, count in hits.most_common():
        out.print(f"{tier:<24}{count:>6}  {count / requests:.1%}")
    for name, value in after.items():
        out.print(f"{name:<24}{before[name]:>12.0f} after the warm-up, {value:.0f} later")
    if abs(after["memory_kib"] - before["memory_kib"]) > MEMORY_SHARE * before["memory_kib"]:
        wrong.append("the node's memory has grown or shrunk")
    wrong += [f"{name} was {before[name]:g} and is {after[name]:g}" for name in after if _leaks(name, before, after)]
    status, left = node.stop()
    if status or left:
        wrong.append(f"the node left with status {status} and {len(left)} processes")
    return wrong


def _make(stock: Path, target: Path, seed: int) -> int:
    """Convert a model that differs from the others in its weights; give the size of those."""
    shutil.rmtree(stock, ignore_errors=True)
    shutil.copytree(BUILTIN["demo"], stock)
    (file,) = read_folder(stock).files
    weights = numpy.memmap(stock / file.name, dtype=numpy.uint8, mode="r+")
    weights[-256:] = numpy.random.default_rng(seed).integers(0, 64, 256, dtype=numpy.uint8)
    weights.flush()
    target.parent.mkdir(exist_ok=True)
    convert(stock, target, chunk_bytes=256 * KIB)
    return sum(found.size_bytes for found in read_folder(target).files)


def _tier(node: NodeProcess) -> str:
    newest: dict[str, Any] = node.call("GET", "/admin/requests")["requests"][0]
    tiers = {span["tier"] for span in newest["spans"] if span["name"] == "load"}
    return "running" if not tiers else "source" if "source" in tiers else " and ".join(sorted(tiers))


def _quiet(node: NodeProcess) -> dict[str, float]:
    """Unload everything, and count what the node holds then."""
    for model in node.call("GET", "/admin/models")["models"]:
        node.call("POST", f"/admin/models/{model['model']['name']}/unload")
    while any(entry["leases"] for tier in ("host", "ssd") for entry in node.call("GET", "/admin/tiers")[tier]):
        continue
    pid = node.process.pid
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "memory_kib": float(status["RssAnon"].split()[0]),
        "threads": float(status["Threads"]),
        "descriptors": float(len(list(Path(f"/proc/{pid}/fd").iterdir()))),
        "processes": float(len(node.children())),
    }


def _mean(readings: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(reading[name] for reading in readings) / len(readings) for name in readings[0]}


def _leaks(name: str, before: dict[str, float], after: dict[str, float]) -> bool:
    # Connections to the origin and threads of a pool come and go by a few.
    return name != "memory_kib" and after[name] > before[name] + 8


if __name__ == "__main__":
    main()
