"""Three real nodes and their simulated twin, asked the same: how far what the simulation says is from what happens.

The twin has the production actors, the knobs of the real nodes and the requests that these met (moment, model, tokens
of prompt and answer). How fast its engines and disks are is measured on the real nodes before they are asked, one start
and one answer at a time. The twin's engines share as many cores as this machine has; its nodes compute in no time.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from benchmarks import cluster_live
from benchmarks.cluster_live import MODELS, NODES
from benchmarks.report import Report
from sllm_actor.cli.show import out
from sllm_actor.config import Config
from sllm_actor.domain import Scaling
from sllm_actor.runtime import Limits
from sllm_actor.sources.builtin import BUILTIN
from sllm_actor.testing.evaluation import Seen, evaluate, part
from sllm_actor.testing.hardware import MACHINES
from sllm_actor.testing.node_cluster import NodeCluster, running_cluster
from sllm_actor.testing.simulated_engine import Cores, Speed
from sllm_actor.testing.simulated_node import PORT, Means, model_of
from sllm_actor.testing.simulated_tiers import SimulatedCard
from sllm_actor.testing.workloads import Arrival
from sllm_actor.testing.world import SYSTEMS, Description, World
from sllm_actor.units import MIB

SECONDS, TINY_SECONDS = 300.0, 20.0
PLACES, KEEP_ALIVE_S = 2, 5.0
# Of cluster-live's requests per second, so that cores are rarely what is waited for.
SHARE = 1 / 3
QUESTION, ANOTHER = "Count from 1 to 60.", "Count from 1 to 59."
AT_ONCE = 4


class Measured(NamedTuple):
    """What one real start took, with what its first prompt took longer than the next, and an answer of what runs."""

    attach_s: float
    prefill_s_per_token: float
    token_s: float


def run(report: Report, seconds: float, trace: Path | None) -> None:
    """Ask the real nodes, have the twin asked the same, and compare how long requests waited for their first token."""
    with tempfile.TemporaryDirectory() as folder:
        real, arrivals, world = _real(Path(folder), seconds, trace)
    twin = evaluate(world, arrivals, seed=1)
    failed = sum(twin.errors().values())
    if failed:
        raise SystemExit(f"{failed} requests failed in the twin: {twin.errors()}")
    for name, seen in (("real", real), ("twin", list(twin.seen))):
        cold = _waits(seen, lambda one: one.tier != "running")
        warm = _waits(seen, lambda one: one.tier == "running")
        report.row(
            which=name, requests=len(seen), cold=len(cold), cold_p50_s=_at(cold, 0.5), cold_p95_s=_at(cold, 0.95),
            cold_p99_s=_at(cold, 0.99), warm_p50_s=_at(warm, 0.5), warm_p95_s=_at(warm, 0.95),
        )  # fmt: skip
    waits = [_waits(seen, lambda one: one.tier != "running") for seen in (real, list(twin.seen))]
    for name, share in (("p50", 0.5), ("p95", 0.95)):
        ours, theirs = (part(one, share) for one in waits)
        report.ratio(f"cold.{name}.twin_over_real", [theirs / ours])
    report.ratio("cold.twin_over_real", [len(waits[1]) / len(waits[0])])


def _real(folder: Path, seconds: float, trace: Path | None) -> tuple[list[Seen], list[Arrival], TwinWorld]:
    models = folder / "models"
    for model in range(MODELS):
        shutil.copytree(BUILTIN["demo"], models / f"m{model}")
    with running_cluster(folder / "cluster", Path(".servers"), NODES, cluster_live.KNOBS) as cluster:
        for model in range(MODELS):
            cluster.nodes[NODES[0]].deploy((models / f"m{model}").absolute(), f"m{model}")
        while any(node.request("GET", f"/v1/models/m{MODELS - 1}").status != 200 for node in cluster.nodes.values()):
            pass
        speed, ssd_bytes_per_s, size_bytes = _calibrate(cluster)
        out.print(f"calibrated: {speed}, {ssd_bytes_per_s / 1e9:.2f} GB/s from the SSD")
        drawn = cluster_live.arrivals(seconds, cluster_live.shares(trace), seed=1)
        wanted = drawn[:: round(1 / SHARE)]
        answered = asyncio.run(cluster_live.ask_all(cluster, wanted))
        if wrong := [one.error for one in answered if one.error]:
            raise SystemExit(f"{len(wrong)} of {len(answered)} requests failed: {wrong[0]}")
        found = sorted(cluster_live.timelines(cluster, answered), key=lambda one: float(one["arrived_s"]))
    begin_s = found[0]["arrived_s"]
    seen = [
        Seen(
            one["arrived_s"] - begin_s, int(one["model"][1:]), one["first_token_s"] - begin_s, one["end_s"] - begin_s,
            "start" if one["cold"] else "running", one["node"], "",
        )
        for one in found
    ]  # fmt: skip
    arrivals = [
        Arrival(one["arrived_s"] - begin_s, int(one["model"][1:]), one["prompt_tokens"], one["generated_tokens"])
        for one in found
    ]
    return seen, arrivals, TwinWorld(speed, ssd_bytes_per_s, size_bytes)


def _calibrate(cluster: NodeCluster) -> tuple[Speed, float, int]:
    """Measure starts and answers of each model, one after the other, and then of one with several answers at once.

    Of prompts the second of an instance counts: the first touches all that is new in its process, which is the start's.
    Every model is then on each node's SSD and in no host memory that the twin would not have, too.
    """
    node = cluster.nodes[NODES[0]]
    measured, rates, size_bytes = list[Measured](), list[float](), 0
    for model in range(MODELS):
        timeline = _asked(cluster, f"m{model}")
        spans = {span["name"]: span for span in timeline["spans"]}
        loads = [span for span in timeline["spans"] if span["name"] == "load" and span["size_bytes"]]
        size_bytes = sum(span["size_bytes"] for span in loads)
        rates.append(size_bytes / max(max(span["end_s"] for span in loads) - loads[0]["begin_s"], 1e-6))
        again = _asked(cluster, f"m{model}", ANOTHER)
        (prompt,) = (span for span in again["spans"] if span["name"] == "prefill")
        prefill_s = prompt["end_s"] - prompt["begin_s"]
        measured.append(
            Measured(
                spans["prefill"]["end_s"] - max(span["end_s"] for span in loads) - prefill_s,
                prefill_s / again["prompt_tokens"],
                (again["end_s"] - again["first_token_s"]) / (again["generated_tokens"] - 1),
            )
        )
    last = f"m{MODELS - 1}"
    with ThreadPoolExecutor(AT_ONCE) as pool:
        together = list(pool.map(lambda _: _asked(cluster, last), range(AT_ONCE)))
    crowded_s = statistics.median(
        (one["end_s"] - one["first_token_s"]) / (one["generated_tokens"] - 1) for one in together
    )
    token_s = statistics.median(one.token_s for one in measured)
    row_s = max(0.0, (crowded_s - token_s) / (AT_ONCE - 1))
    for number in range(MODELS):
        node.call("POST", f"/admin/models/m{number}/unload", {})
    speed = Speed(
        attach_s=statistics.median(one.attach_s for one in measured),
        prefill_s_per_token=statistics.median(one.prefill_s_per_token for one in measured),
        step_s=token_s - row_s,
        row_s=row_s,
    )
    return speed, statistics.median(rates), size_bytes


def _asked(cluster: NodeCluster, model: str, question: str = QUESTION) -> dict[str, Any]:
    """Ask once, and give the timeline."""
    node = cluster.nodes[NODES[0]]
    node.chat(model, question)
    found: list[dict[str, Any]] = node.call("GET", "/admin/requests")["requests"]
    return max(
        (one for one in found if one["model"] == model and one["end_s"]), key=lambda one: float(one["arrived_s"])
    )


class TwinWorld(World):
    """What follows from what was measured, where `World` has what follows from data sheets."""

    def __init__(self, speed: Speed, ssd_bytes_per_s: float, size_bytes: int) -> None:
        self.description = Description(nodes=len(NODES), copies=len(NODES), keep_alive_s=KEEP_ALIVE_S, timeout_s=60.0)
        self.system = SYSTEMS["ours"]
        self.machine = msgspec.structs.replace(
            MACHINES["a40"], devices=PLACES, host_pool_bytes=64 * MIB, ssd_bytes_per_s=ssd_bytes_per_s
        )
        self.names = list(NODES)
        self.devices_each = 1
        self._speed = speed
        scaling = Scaling(max_instances=PLACES * len(NODES))
        self.models = [
            msgspec.structs.replace(model_of(f"m{number}", size_bytes, KEEP_ALIVE_S), scaling=scaling)
            for number in range(MODELS)
        ]
        self.cards = {model.card: SimulatedCard(model.card, model.size_bytes) for model in self.models}

    def speed(self, model: int) -> Speed:
        return self._speed

    def means(self) -> Means:
        machine = self.machine
        return Means(
            config_of=self._config_of, limits=Limits(), ssd_bytes_per_s=machine.ssd_bytes_per_s,
            remote_bytes_per_s=machine.remote_bytes_per_s, speed_of=lambda _: self._speed,
            cores=Cores(len(os.sched_getaffinity(0))),
        )  # fmt: skip

    def _config_of(self, name: str) -> Config:
        """Give the knobs of the real nodes (`cluster_live.KNOBS`)."""
        return Config(
            node_id=name, listen=f"tcp://{name}:{PORT}", metadata="etcd://store:2379",
            host_pool_bytes=int(self.machine.host_pool_bytes), chunk_bytes=MIB, max_instances=PLACES,
            keep_alive_s=KEEP_ALIVE_S, start_timeout_s=60.0, request_history=100_000,
        )  # fmt: skip


def _waits(seen: Sequence[Seen], counts: Callable[[Seen], bool]) -> list[float]:
    return sorted(one.wait_s for one in seen if counts(one))


def _at(waits: Sequence[float], share: float) -> float:
    return round(part(waits, share), 4) if waits else 0.0
