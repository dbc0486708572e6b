"""Three real nodes with twelve models and two places each, asked as Azure's functions are: how long starts take.

Every policy gets the same arrivals: for each model a Gamma process of its own with a coefficient of variation of 8
(ServerlessLLM, OSDI '24, section 7.1), so that bursts of one model meet silences of others. How often each model is
asked comes from a trace of invocations per minute (Azure Functions 2019, In-Vitro's sample: one function a line), whose
functions are dealt to the models, or else is Zipf's law. A start's time is from arrival to first token.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.report import Report
from sllm_actor.cli.show import out
from sllm_actor.sources.builtin import BUILTIN
from sllm_actor.testing.node_cluster import NodeCluster, running_cluster
from sllm_actor.testing.questions import count, is_right
from sllm_actor.testing.traces import function_counts
from sllm_actor.testing.workloads import Length, gamma_arrivals, spread, zipf

NODES, MODELS = ("n1", "n2", "n3"), 12
POLICIES = ("startup_time", "availability", "locality_wait", "preempt")
REQUESTS_PER_S = 1.5
WARM_UP_STARTS = 50
SECONDS, TINY_SECONDS = 600.0, 20.0
SILENCES = "sllm:link_silences_total"
KNOBS = (
    "host_pool_bytes=64MiB", "chunk_bytes=1MiB", "engine_threads=1", "listen=tcp://127.0.0.1:0", "max_instances=2",
    "keep_alive_s=5", "start_timeout_s=60", "request_history=100000",
)  # fmt: skip


class Arrival(NamedTuple):
    """A request: when it comes, for which model, through which node."""

    at_s: float
    model: int
    node: str
    last: int


class Seen(NamedTuple):
    """What became of one; `error` is empty where its answer was right."""

    request_id: str
    node: str
    error: str


class Started(NamedTuple):
    """A start: what was expected of it, of that each term, what it took, and how many it had beside it."""

    expected_s: float
    terms_s: dict[str, float]
    took_s: float
    beside: int

    @property
    def error(self) -> float:
        """How far the one is from the other, in parts of the latter."""
        return abs(self.expected_s - self.took_s) / self.took_s


def shares(trace: Path | None) -> list[float]:
    """Give the part of all requests that each model has."""
    return zipf(MODELS) if trace is None else spread(function_counts(trace), MODELS)


def arrivals(seconds: float, parts: Sequence[float], seed: int) -> list[Arrival]:
    """Draw all requests, in order."""
    draw = random.Random(seed)
    found = gamma_arrivals(draw, seconds=seconds, per_s=REQUESTS_PER_S, parts=parts, lengths=_count_to)
    return [Arrival(one.at_s, one.model, draw.choice(NODES), one.new_tokens) for one in found]


def _count_to(dice: random.Random) -> Length:
    """Give an answer's length in numbers to count, which is what is asked."""
    return Length(1, dice.randrange(5, 60))


async def ask(session: aiohttp.ClientSession, url: str, arrival: Arrival, number: int, begin_s: float) -> Seen:
    """Ask at the right moment, and compare the answer with the right one."""
    request_id, question = f"live-{number}", count(1, arrival.last)
    await asyncio.sleep(max(0.0, begin_s + arrival.at_s - asyncio.get_running_loop().time()))
    body = {"model": f"m{arrival.model}", "messages": [{"role": "user", "content": question.prompt}]}
    async with session.post(f"{url}/v1/chat/completions", json=body, headers={"X-Request-Id": request_id}) as reply:
        answer = await reply.json()
    if reply.status != 200:
        return Seen(request_id, arrival.node, answer["error"]["code"])
    text = answer["choices"][0]["message"]["content"]
    return Seen(request_id, arrival.node, "" if is_right(question, text) else f"wrong: {text[-80:]}")


async def ask_all(cluster: NodeCluster, wanted: Sequence[Arrival]) -> list[Seen]:
    """Ask all of it at its times."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300)) as session:
        begin_s = asyncio.get_running_loop().time()
        return list(
            await asyncio.gather(
                *(
                    ask(session, cluster.nodes[arrival.node].url, arrival, number, begin_s)
                    for number, arrival in enumerate(wanted)
                )
            )
        )


def silences(metrics: str) -> int:
    """Count how often a node has taken another one for dead; all of them live."""
    families = text_string_to_metric_families(metrics)
    return int(sum(one.value for family in families for one in family.samples if one.name == SILENCES))


def timelines(cluster: NodeCluster, seen: Sequence[Seen]) -> list[dict[str, Any]]:
    """Give the timelines of all requests that were answered."""
    asked = {one.request_id for one in seen if not one.error}
    found = [one for node in cluster.nodes.values() for one in node.call("GET", "/admin/requests")["requests"]]
    return [one for one in found if one["request_id"] in asked]


def starts(cluster: NodeCluster, cold: Sequence[dict[str, Any]]) -> list[Started]:
    """Give what was expected of each start and what it took, in their order."""
    found = []
    node = cluster.nodes[cluster.leader(NODES[0])]
    for one in sorted(cold, key=lambda one: float(one["arrived_s"])):
        reply = node.request("GET", f"/admin/explain/{one['start_of']}")
        decision = reply.json()["decision"] if reply.status == 200 and one["start_of"] == one["request_id"] else None
        if decision is not None and decision["outcome"] == "started":
            terms = decision["chosen"]["terms"]
            (engine,) = (term for term in terms if term["name"] == "engine")
            seconds = {term["name"]: term["seconds"] for term in terms}
            beside = int(engine["inputs"]["beside"])
            found.append(Started(decision["predicted_s"], seconds, decision["observed_s"], beside))
    return found


def show(report: Report, policy: str, learned: Sequence[Started]) -> None:
    """Say where estimates are wrong: by how many a start had beside it, each part's median."""
    levels = sorted({one.beside.bit_length() for one in learned})
    for level in levels:
        of_level = [one for one in learned if one.beside.bit_length() == level]
        least, most = (1 << level) >> 1, (1 << level) - 1
        parts = {
            f"{name}_s": round(statistics.median(one.terms_s.get(name, 0.0) for one in of_level), 4)
            for name in ("queue", "bytes", "engine", "leave")
        }
        report.row(
            policy=policy, beside=f"{least}-{most}", starts=len(of_level), **parts,
            expected_s=round(statistics.median(one.expected_s for one in of_level), 4),
            took_s=round(statistics.median(one.took_s for one in of_level), 4),
            error=round(statistics.median(one.error for one in of_level), 3),
        )  # fmt: skip


def run(report: Report, seconds: float, trace: Path | None, only: Sequence[str] = ()) -> None:
    """Run every policy, or these alone, one after the other, each on nodes of its own."""
    wanted = arrivals(seconds, shares(trace), seed=1)
    out.print(
        f"{len(wanted)} requests in {seconds:g} s for each policy, popularity by {trace.name if trace else 'Zipf'}"
    )
    medians: dict[str, tuple[float, float]] = {}
    chosen = [policy for policy in POLICIES if policy in (only or POLICIES)]
    for policy in chosen:
        with tempfile.TemporaryDirectory() as folder:
            cold_s, started = _policy(report, policy, wanted, Path(folder))
            medians[policy] = statistics.median(cold_s), _part(cold_s, 0.99)
            out.print(
                f"{policy}: {len(started)} starts were estimated, the first {WARM_UP_STARTS} of them to learn from"
            )
            show(report, policy, started[WARM_UP_STARTS:] or started)
            if policy == "startup_time" and len(started) > WARM_UP_STARTS:
                learned = [one.error for one in started[WARM_UP_STARTS:]]
                report.ratio("estimate_error.median", [statistics.median(learned)])
                report.ratio("estimate_error.p95", [_part(learned, 0.95)])
    if POLICIES[0] not in chosen:
        return
    for policy in chosen[1:]:
        for name, ours, other in zip(("p50", "p99"), medians["startup_time"], medians[policy], strict=True):
            report.ratio(f"{name}.{policy}_over_startup_time", [other / ours])


def _policy(report: Report, policy: str, wanted: Sequence[Arrival], folder: Path) -> tuple[list[float], list[Started]]:
    models = folder / "models"
    for model in range(MODELS):  # Copies, so that each has bytes of its own in every tier.
        shutil.copytree(BUILTIN["demo"], models / f"m{model}")
    knobs = [*KNOBS, f"placement_policy={policy}"]
    with running_cluster(folder / "cluster", Path(".servers"), NODES, knobs) as cluster:
        for model in range(MODELS):
            cluster.nodes[NODES[0]].deploy((models / f"m{model}").absolute(), f"m{model}")
        while any(node.request("GET", f"/v1/models/m{MODELS - 1}").status != 200 for node in cluster.nodes.values()):
            pass
        seen = asyncio.run(ask_all(cluster, wanted))
        missed = sum(silences(node.request("GET", "/metrics").body.decode()) for node in cluster.nodes.values())
        answered = timelines(cluster, seen)
        cold = [one for one in answered if one["cold"]]
        took_s = {
            kind: [one["first_token_s"] - one["arrived_s"] for one in some]
            for kind, some in (("cold", cold), ("warm", [one for one in answered if not one["cold"]]))
        }
        wrong = [one.error for one in seen if one.error]
        report.row(
            policy=policy, requests=len(seen), errors=len(wrong), what=wrong[0] if wrong else "", cold=len(cold),
            cold_p50_s=round(statistics.median(took_s["cold"]), 3), cold_p99_s=round(_part(took_s["cold"], 0.99), 3),
            warm_p50_s=round(statistics.median(took_s["warm"]), 3), warm_p99_s=round(_part(took_s["warm"], 0.99), 3),
            missed=missed,
        )  # fmt: skip
        return took_s["cold"], starts(cluster, cold)


def _part(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]
