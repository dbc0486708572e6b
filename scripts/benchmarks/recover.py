"""How long a stream stands still whose node is killed (-9) or hangs (SIGSTOP): until it is missed, until it goes on.

OPT-125M's shape in fp32 on real nodes that share this machine, with their default knobs of time, one greedy stream at a
time. Beside the pause stands what it may be: the detection and one start, as the Scheduler estimated it.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import weights
from benchmarks.report import Report
from sllm_actor.cli.show import out
from sllm_actor.testing.node_cluster import NodeCluster, running_cluster
from sllm_actor.testing.node_process import NodeProcess

NAMES = ("n1", "n2", "n3")
MODEL = "opt"
PROMPT_TOKENS, BEFORE_TOKENS, ANSWER_TOKENS, TINY_ANSWER_TOKENS = 64, 48, 160, 80
VOCABULARY_TOKENS = 50_000
PATIENCE_S = 120.0
KNOBS = (
    "host_pool_bytes=1GiB", "engine_threads=1", "listen=tcp://127.0.0.1:0", "max_instances=1", "warm_engines=1",
)  # fmt: skip


class Death(NamedTuple):
    """One of them, in seconds: from the signal to where another start is asked for, to the next token, and the gaps.

    `prefill_s` is the computing of prompt and tokens where it goes on: the estimate is of the start alone.
    """

    hangs: bool
    leads: bool
    detected_s: float
    pause_s: float
    estimated_start_s: float
    prefill_s: float
    usual_gap_s: float
    tokens: int


def until(what: str, holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    end_s = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > end_s:
            raise SystemExit(f"it never came true that {what}")
        time.sleep(0.01)


def stream(node: NodeProcess, request_id: str, prompt: list[int], tokens: int, come: list[float]) -> None:
    """Note when each token of an answer comes."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    for event in node.stream("/v1/completions", body, {"X-Request-Id": request_id}):
        if "error" in event:
            raise SystemExit(f"{request_id}: {event['error']}")
        come.append(time.monotonic())


def placed(cluster: NodeCluster, victim: str) -> None:
    """Have the model run on one node alone."""
    avoided = [name for name in NAMES if name != victim]
    gateway = cluster.nodes[avoided[0]]
    gateway.call("POST", f"/admin/models/{MODEL}/unload")
    for name in avoided:
        gateway.call("POST", f"/admin/nodes/{name}/cordon")
    until("the others are cordoned", lambda: all(cluster.shown(avoided[0])[name]["cordoned"] for name in avoided))
    stream(gateway, f"warm-{victim}-{time.monotonic_ns()}", [5, 6, 7], 1, [])
    for name in avoided:
        gateway.call("POST", f"/admin/nodes/{name}/uncordon")
    until("they are not any more", lambda: not any(one["cordoned"] for one in cluster.shown(avoided[0]).values()))


def die(cluster: NodeCluster, draw: random.Random, number: int, tokens: int, hangs: bool) -> Death:
    """Kill the node of a stream in its middle, or have it hang."""
    leader = cluster.leader(NAMES[0])
    victim = leader if number % 2 else next(name for name in NAMES if name != leader)
    asked = next(name for name in NAMES if name != victim)
    gateway = cluster.nodes[asked]
    placed(cluster, victim)
    request_id, come = f"{'silent' if hangs else 'death'}-{number}", list[float]()
    prompt = [draw.randrange(10, VOCABULARY_TOKENS) for _ in range(PROMPT_TOKENS)]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stream, gateway, request_id, prompt, tokens, come)
        until("the stream has begun", lambda: len(come) >= BEFORE_TOKENS or answer.done())
        killed_s = time.monotonic()
        if hangs:
            cluster.hold_up(victim)
        else:
            cluster.kill(victim)
        answer.result()
    timeline: dict[str, Any] = gateway.call("GET", f"/admin/requests/{request_id}")
    decision = gateway.call("GET", f"/admin/explain/{request_id}")["decision"]
    starts = [span["begin_s"] for span in timeline["spans"] if span["begin_s"] > killed_s]
    pause_s = max(later - max(earlier, killed_s) for earlier, later in itertools.pairwise(come) if later > killed_s)
    behind = [one for one in timeline["spans"] if one["name"] == "prefill" and one["begin_s"] > killed_s]
    prefill_s = sum(one["end_s"] - one["begin_s"] for one in behind)
    gaps = [later - earlier for earlier, later in itertools.pairwise(come) if later < killed_s]
    detected_s, usual_gap_s = min(starts) - killed_s, statistics.median(gaps)
    found = Death(
        hangs, victim == leader, detected_s, pause_s, decision["predicted_s"], prefill_s, usual_gap_s, len(come)
    )
    out.print(f"{request_id} of {victim}: {json.dumps(found._asdict())}")
    if hangs:
        cluster.go_on(victim)
    else:
        cluster.start(victim)
    until("all are there again", lambda: all(one["reported"] for one in cluster.shown(asked).values()))
    until("it is known", lambda: victim in cluster.shown(asked))
    return found


def run(report: Report, repeats: int, work_dir: Path, tiny: bool) -> None:
    """Kill nodes under streams."""
    draw, tokens = random.Random(1), TINY_ANSWER_TOKENS if tiny else ANSWER_TOKENS
    folder = weights.checkpoint(work_dir, "opt-125m", "fp32", False)
    with (
        tempfile.TemporaryDirectory() as data,
        running_cluster(Path(data), Path(".servers"), NAMES, KNOBS) as cluster,
    ):
        cluster.nodes[NAMES[0]].deploy(folder.absolute(), MODEL)
        for name in NAMES:  # So that every node has the checkpoint, and the estimates have something to go by.
            placed(cluster, name)
        deaths = [die(cluster, draw, number, tokens, hangs) for number in range(repeats) for hangs in (False, True)]
    for how, hangs in (("", False), ("silent.", True)):
        report.ratio(f"{how}detected_s", [one.detected_s for one in deaths if one.hangs is hangs])
        for who, leads in (("another", False), ("the leader", True)):
            if found := [one for one in deaths if (one.hangs, one.leads) == (hangs, leads)]:
                _rows(report, how, who, found)


def _rows(report: Report, how: str, who: str, deaths: list[Death]) -> None:
    """Add what was measured where the leader died or hung, whom another one has to follow first, or another node."""
    for what, values in (
        ("until it is missed", [one.detected_s for one in deaths]),
        ("one start, as estimated", [one.estimated_start_s for one in deaths]),
        ("prompt and tokens computed there", [one.prefill_s for one in deaths]),
        ("until the stream goes on", [one.pause_s for one in deaths]),
        ("usual gap", [one.usual_gap_s for one in deaths]),
    ):
        report.row(
            signal="SIGSTOP" if how else "SIGKILL", node=who, measured=what, unit="s",
            median=round(statistics.median(values), 4), min=round(min(values), 4), max=round(max(values), 4),
            n=len(values),
        )  # fmt: skip
    name = f"{how}{who.replace(' ', '_')}"
    bounds = [one.detected_s + one.estimated_start_s for one in deaths]
    shares = [one.pause_s / bound for one, bound in zip(deaths, bounds, strict=True)]
    report.ratio(f"pause_over_detection_and_estimate.{name}", shares)
    shares = [one.pause_s / (bound + one.prefill_s) for one, bound in zip(deaths, bounds, strict=True)]
    report.ratio(f"pause_over_detection_estimate_and_prefill.{name}", shares)
