"""One placement over a hundred and over a thousand nodes, with ten times as many models; and a live node's estimates.

A cluster's nodes have some models on their disks, a few of them in host memory, and instances that are idle or busy;
one in three is full. The live part starts small models of several sizes over and over, one after the other, on a node
that has to give up one for the next and can't hold all of them in memory, and compares what was expected of each start
with what it took.
"""

from __future__ import annotations

import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.report import Report
from sllm_actor.cli.show import out
from sllm_actor.domain import ModelName, NodeId, RequestId
from sllm_actor.messages.placement import InstanceView, NodeReport, PlaceModel
from sllm_actor.policy.cluster_view import ClusterView
from sllm_actor.policy.estimator import Estimator
from sllm_actor.policy.placement import ABLE, decide, fits_nowhere
from sllm_actor.policy.policies import POLICIES, Situation
from sllm_actor.sources.builtin import BUILTIN
from sllm_actor.testing.node_process import NodeProcess, running_node

GIB = 1024**3
FEW, MANY, MODELS_PER_NODE = 100, 1000, 10
PLACEMENTS = 400
WARM_UP, STARTS, MODELS, BETWEEN_S = 50, 130, 6, 0.7


def size_of(model: int) -> int:
    return (2 + model % 29) * GIB


def report_of(number: int, models: int, draw: random.Random) -> NodeReport:
    """Make a node's report: every model is on about four disks of the cluster."""
    on_ssd = draw.sample(range(models), 4 * MODELS_PER_NODE)
    full = number % 3 == 0
    instances = tuple(
        InstanceView(
            instance_id=f"m{model}-1",
            model=ModelName(f"m{model}"),
            active=draw.randrange(3),
            idle_since_s=draw.uniform(0, 1000),
            host_bytes=size_of(model),
            fingerprint=f"print-{model}",
            size_bytes=size_of(model),
            prompt_tokens=500,
            running_s=10.0,
            token_s=0.03,
            resume_s_per_token=0.0002,
            resume_s=0.05,
        )
        for model in on_ssd[: 8 if full else draw.randrange(8)]
    )
    return NodeReport(
        node=NodeId(f"node-{number:04}"),
        manager="manager",
        slots=8,
        host_pool_bytes=512 * GIB,
        instances=instances,
        pinned_host_bytes={},
        ended_placements=(),
        starting=(),
        host_fingerprints=tuple(f"print-{model}" for model in on_ssd[:10]),
        ssd_fingerprints=tuple(f"print-{model}" for model in on_ssd),
        ssd_bytes_per_s=draw.uniform(2e9, 7e9),
        disk_queues_s=dict.fromkeys((f"print-{model}" for model in on_ssd), draw.choice((0.0, draw.uniform(0, 20)))),
        remote_bytes_per_s=draw.uniform(2e8, 1.2e9),
        remote_queue_s=draw.choice((0.0, draw.uniform(0, 60))),
    )


def cluster(nodes: int) -> tuple[ClusterView, Estimator]:
    """Make a cluster whose nodes have been seen to start what they hold."""
    draw, view, estimator = random.Random(nodes), ClusterView(), Estimator()
    for number in range(nodes):
        report = report_of(number, nodes * MODELS_PER_NODE, draw)
        view.hear(report, 0.0)
        for fingerprint in report.ssd_fingerprints[:5]:
            estimator.learn_start(report.node, "ssd", fingerprint, GIB, draw.uniform(0.2, 2.0))
    return view, estimator


def place(view: ClusterView, estimator: Estimator, model: int, policy: str) -> float:
    """Place one model, with all that the Scheduler does for it; give the milliseconds."""
    question = PlaceModel(
        request_id=RequestId("r"), model=ModelName(f"m{model}"), fingerprint=f"print-{model}",
        size_bytes=size_of(model), host_bytes=size_of(model), timeout_s=1.0,
    )  # fmt: skip
    begin_s = time.perf_counter()
    assert not fits_nowhere(question, view)
    decide(Situation(view, estimator, question, now_s=1.0, able=ABLE), policy)
    return (time.perf_counter() - begin_s) * 1e3


def measure(report: Report, repeats: int) -> None:
    """Measure both sizes by turns, and the cost of a report."""
    clusters = {nodes: cluster(nodes) for nodes in (FEW, MANY)}
    medians: dict[int, list[float]] = {FEW: [], MANY: []}
    for repeat in range(repeats):
        draw = random.Random(repeat)
        for nodes, (view, estimator) in clusters.items():
            for policy in POLICIES:
                models = [draw.randrange(nodes * MODELS_PER_NODE) for _ in range(PLACEMENTS)]
                took_ms = [place(view, estimator, model, policy) for model in models]
                if policy == "startup_time":
                    medians[nodes].append(statistics.median(took_ms))
                if repeat == repeats - 1:
                    _row(report, f"{policy}, {nodes} nodes, {nodes * MODELS_PER_NODE} models", took_ms)
    view, draw = clusters[MANY][0], random.Random(9)
    reports = [report_of(number, MANY * MODELS_PER_NODE, draw) for number in range(200)]
    _row(report, f"report heard, {MANY} nodes", [_heard_ms(view, one) for one in reports])
    report.ratio("placement_ms.n1000", medians[MANY])
    report.ratio(
        "placement_growth", [many / (MANY / FEW * few) for few, many in zip(medians[FEW], medians[MANY], strict=True)]
    )


def _heard_ms(view: ClusterView, report: NodeReport) -> float:
    begin_s = time.perf_counter()
    view.hear(report, 2.0)
    return (time.perf_counter() - begin_s) * 1e3


def _row(report: Report, what: str, took_ms: list[float]) -> None:
    p99_ms = sorted(took_ms)[int(len(took_ms) * 0.99)]
    report.row(what=what, median_ms=round(statistics.median(took_ms), 3), p99_ms=round(p99_ms, 3))


def larger_demo(folder: Path, number: int) -> Path:
    """Make a model of the demo's kind, with random weights: larger with its number, from 15 MB to 280."""
    if not folder.exists():
        from transformers import AutoConfig, AutoModelForCausalLM

        demo, making = BUILTIN["demo"], folder.with_suffix(".making")
        config = AutoConfig.from_pretrained(demo)
        config.hidden_size, config.intermediate_size = 256 * (1 + number // 2), 768 * (1 + number // 2)
        config.num_hidden_layers = 4 * (1 + number % 2)
        AutoModelForCausalLM.from_config(config).save_pretrained(making)
        for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo / name, making)
        making.rename(folder)
    return folder


def start(node: NodeProcess, model: str, number: int) -> dict[str, Any]:
    """Start a model cold; give the decision about it, with what was observed."""
    request_id = f"bench-{number}"
    body = {"model": model, "prompt": "one two", "max_tokens": 1, "temperature": 0}
    reply = node.request("POST", "/v1/completions", body, {"X-Request-Id": request_id})
    if reply.status != 200:
        raise SystemExit(reply.body.decode())
    decision: dict[str, Any] = node.call("GET", f"/admin/explain/{request_id}")["decision"]
    if decision is None or decision["outcome"] != "started":
        raise SystemExit(f"not the start that was to be measured: {decision}")
    return decision


def live(report: Report, work_dir: Path) -> None:
    """Start models until there were enough to learn from, and as many again; compare."""
    draw = random.Random(1)
    errors: list[float] = []
    knobs = ("host_pool_bytes=320MiB", "max_instances=2", "engine_threads=1")
    with running_node(work_dir / "policy-data", *knobs) as node:
        for number in range(MODELS):
            node.deploy(larger_demo(work_dir / f"policy-model-{number}", number).absolute(), f"m{number}", replace=True)
        last = -1
        for number in range(STARTS):
            # So that the node has its warm engines again; and one that runs would not be started.
            time.sleep(BETWEEN_S)
            running = {one["model"] for one in node.call("GET", "/admin/instances")["instances"]}
            last = draw.choice([one for one in range(MODELS) if f"m{one}" not in running])
            decision = start(node, f"m{last}", number)
            observed_s, predicted_s = decision["observed_s"], decision["predicted_s"]
            if number >= WARM_UP:
                errors.append(abs(predicted_s - observed_s) / observed_s)
    out.print(f"{len(errors)} starts after the first {WARM_UP}")
    errors.sort()
    report.ratio("estimate_error.median", [statistics.median(errors)])
    report.ratio("estimate_error.p95", [errors[int(len(errors) * 0.95)]])


def run(report: Report, repeats: int, work_dir: Path) -> None:
    """Measure placements, then estimates."""
    measure(report, repeats)
    live(report, work_dir)
