"""Three real nodes and their simulated twin, asked the same: how far what the simulation says is from what happens.

The twin has the production actors, the knobs of the real nodes and the requests that these met (moment, model, tokens
of prompt and answer). How fast its engines, disks and nodes are is measured on the real ones before they are asked, one
start and one answer at a time. All that computes in the twin shares as many cores as this machine has.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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
from sllm_actor.policy.estimator import HOST
from sllm_actor.runtime import Limits
from sllm_actor.sources.builtin import BUILTIN
from sllm_actor.testing.evaluation import Seen, evaluate, part
from sllm_actor.testing.hardware import MACHINES
from sllm_actor.testing.node_cluster import NodeCluster, running_cluster
from sllm_actor.testing.node_process import NodeProcess
from sllm_actor.testing.simulated_cores import Cores
from sllm_actor.testing.simulated_engine import Speed
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
LONG = f"What are {', '.join(map(str, range(61, 99)))}?"
AT_ONCE = 4
# Each model is started so often alone, first from the SSD and then mostly from host memory, after a silence as between
# bursts: nothing is warm from the start before, and the engine that it took is replaced.
ROUNDS, SILENCE_S, IDLE_S = 2, 1.0, 5.0


class Measured(NamedTuple):
    """What one start took on real nodes, and answers of what it started."""

    attach_s: float
    request_s: float
    prefill_s: float
    prefill_s_per_token: float
    token_s: float
    cpu_s: float
    tokens: int
    leave_s: float
    size_bytes: int
    # None where it came from host memory.
    ssd_bytes_per_s: float | None


class Calibrated(NamedTuple):
    """How fast real nodes are: their engines, their disks, and they themselves with a request.

    `attaches_s` are what all measured starts took, of which the twin's have one each, drawn.
    """

    speed: Speed
    attaches_s: tuple[float, ...]
    request_s: float
    ssd_bytes_per_s: float
    size_bytes: int


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
        world = TwinWorld(_calibrate(cluster))
        out.print(str(world))
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
    return seen, arrivals, world


def _calibrate(cluster: NodeCluster) -> Calibrated:
    """Measure starts and answers of each model, one after the other, and then one's with several answers at once.

    What nodes compute for a token is all that they compute while one answer runs, but for what they do when nobody asks
    and for its request.
    Every model is then on each node's SSD and in no host memory that the twin would not have, too, and each node knows
    its vocabulary, which takes longer than a prompt that is asked of it first.
    """
    before_s = _cpu_s(cluster)
    time.sleep(IDLE_S)
    idle_share = (_cpu_s(cluster) - before_s) / IDLE_S
    measured = [_measure(cluster, f"m{model}", idle_share) for _ in range(ROUNDS) for model in range(MODELS)]
    node, last = cluster.nodes[NODES[0]], f"m{MODELS - 1}"
    with ThreadPoolExecutor(AT_ONCE) as pool:
        together = list(pool.map(lambda _: _asked(node, last), range(AT_ONCE)))
    node.call("POST", f"/admin/models/{last}/unload", {})

    def median(name: str) -> float:
        return float(statistics.median(getattr(one, name) for one in measured))

    row_s = max(0.0, (statistics.median(map(_token_s, together)) - median("token_s")) / (AT_ONCE - 1))
    attaches_s = tuple(one.attach_s for one in measured)
    told_s = sum(one.cpu_s - one.request_s for one in measured) / sum(one.tokens for one in measured)
    rates = [one.ssd_bytes_per_s for one in measured if one.ssd_bytes_per_s is not None]
    speed = Speed(
        prefill_s=median("prefill_s"), prefill_s_per_token=median("prefill_s_per_token"),
        step_s=median("token_s") - row_s, row_s=row_s, told_s=max(0.0, told_s), leave_s=median("leave_s"),
    )  # fmt: skip
    return Calibrated(speed, attaches_s, median("request_s"), statistics.median(rates), measured[0].size_bytes)


def _measure(cluster: NodeCluster, model: str, idle_share: float) -> Measured:
    """Start a model, have it answer, and have it leave.

    The second prompt is what a prompt costs: the first one touches all that is new in its process, which is the
    start's. All of a start that is neither its bytes nor a request's is one time, wherever it passes.
    """
    node = cluster.nodes[NODES[0]]
    time.sleep(SILENCE_S)
    first = _asked(node, model)
    loads = [span for span in first["spans"] if span["name"] == "load" and span["size_bytes"]]
    load_s = max(span["end_s"] for span in loads) - loads[0]["begin_s"]
    before_s, begin_s = _cpu_s(cluster), time.perf_counter()
    again = _asked(node, model, ANOTHER)
    cpu_s = _cpu_s(cluster) - before_s - idle_share * (time.perf_counter() - begin_s)
    long = _asked(node, model, LONG, max_tokens=1)
    more_s, more_tokens = _prefill_s(long) - _prefill_s(again), long["prompt_tokens"] - again["prompt_tokens"]
    prefill_s_per_token = max(0.0, more_s / more_tokens)
    for other in NODES[1:]:
        _asked(cluster.nodes[other], model, ANOTHER, max_tokens=1)
    leaves_s = [_timed(lambda: node.call("POST", f"/admin/models/{model}/unload", {})) for _ in range(2)]
    size_bytes = sum(span["size_bytes"] for span in loads)
    return Measured(
        attach_s=_wait_s(first) - _wait_s(again) - load_s,
        request_s=_wait_s(again) - _prefill_s(again),
        prefill_s=_prefill_s(again) - prefill_s_per_token * again["prompt_tokens"],
        prefill_s_per_token=prefill_s_per_token,
        token_s=_token_s(again),
        cpu_s=cpu_s,
        tokens=again["generated_tokens"],
        leave_s=max(0.0, leaves_s[0] - leaves_s[1]),
        size_bytes=size_bytes,
        ssd_bytes_per_s=None if HOST in {span["tier"] for span in loads} else size_bytes / max(load_s, 1e-6),
    )


def _asked(node: NodeProcess, model: str, question: str = QUESTION, **options: Any) -> dict[str, Any]:
    """Ask once, and give the timeline."""
    node.chat(model, question, **options)
    found: list[dict[str, Any]] = node.call("GET", "/admin/requests")["requests"]
    return max(
        (one for one in found if one["model"] == model and one["end_s"]), key=lambda one: float(one["arrived_s"])
    )


def _wait_s(one: Mapping[str, Any]) -> float:
    return float(one["first_token_s"] - one["arrived_s"])


def _token_s(one: Mapping[str, Any]) -> float:
    return float((one["end_s"] - one["first_token_s"]) / (one["generated_tokens"] - 1))


def _prefill_s(one: Mapping[str, Any]) -> float:
    (took_s,) = (float(span["end_s"] - span["begin_s"]) for span in one["spans"] if span["name"] == "prefill")
    return took_s


def _cpu_s(cluster: NodeCluster) -> float:
    """Tell how long the nodes' own processes have computed (proc_pid_stat(5): utime and stime)."""
    ticks = 0
    for node in cluster.nodes.values():
        stat = Path(f"/proc/{node.process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(stat[11]) + int(stat[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _timed(call: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    call()
    return time.perf_counter() - begin_s


class TwinWorld(World):
    """What follows from what was measured, where `World` has what follows from data sheets."""

    def __init__(self, calibrated: Calibrated) -> None:
        self.description = Description(nodes=len(NODES), copies=len(NODES), keep_alive_s=KEEP_ALIVE_S, timeout_s=60.0)
        self.system = SYSTEMS["ours"]
        self.machine = msgspec.structs.replace(
            MACHINES["a40"], devices=PLACES, host_pool_bytes=64 * MIB, ssd_bytes_per_s=calibrated.ssd_bytes_per_s
        )
        self.names = list(NODES)
        self.devices_each = 1
        self._calibrated = calibrated
        scaling = Scaling(max_instances=PLACES * len(NODES))
        self.models = [
            msgspec.structs.replace(model_of(f"m{number}", calibrated.size_bytes, KEEP_ALIVE_S), scaling=scaling)
            for number in range(MODELS)
        ]
        self.cards = {model.card: SimulatedCard(model.card, model.size_bytes) for model in self.models}
        self._dice = random.Random(1)
        self._cores = Cores(len(os.sched_getaffinity(0)))

    def __str__(self) -> str:
        speed, attaches_s, request_s, ssd_bytes_per_s, _ = self._calibrated
        return (
            f"calibrated: {speed.prefill_s * 1e3:.2f} ms for prompts and {speed.prefill_s_per_token * 1e3:.3f} a token,"
            f" {speed.step_s * 1e3:.2f} a step and {speed.row_s * 1e3:.2f} a row, {speed.leave_s * 1e3:.1f} to leave,"
            f" of nodes {request_s * 1e3:.2f} a request and {speed.told_s * 1e3:.2f} a token;"
            f" starts of {min(attaches_s) * 1e3:.0f} to {max(attaches_s) * 1e3:.0f} ms,"
            f" {statistics.median(attaches_s) * 1e3:.0f} at the median; {ssd_bytes_per_s / 1e9:.2f} GB/s from the SSD"
        )

    def speed(self, model: int) -> Speed:
        """Tell how fast its engines are; one start takes as long as another."""
        return msgspec.structs.replace(self._calibrated.speed, attach_s=statistics.fmean(self._calibrated.attaches_s))

    def _drawn_speed(self, _path: str) -> Speed:
        return msgspec.structs.replace(self._calibrated.speed, attach_s=self._dice.choice(self._calibrated.attaches_s))

    def means(self) -> Means:
        machine = self.machine
        return Means(
            config_of=self._config_of, limits=Limits(), ssd_bytes_per_s=machine.ssd_bytes_per_s,
            remote_bytes_per_s=machine.remote_bytes_per_s, speed_of=self._drawn_speed,
            cores=self._cores, request_s=self._calibrated.request_s,
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
