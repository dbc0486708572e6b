"""What a client sees of its answer's move between two loaded nodes: the longest gap between its tokens, in usual gaps.

OPT-125M's shape in fp32, prompts of 64 to 1,024 tokens, one stream at a time, greedy, on real nodes that share this
machine. Beside each move stands what it would cost to stop and to compute prompt and tokens anew at the destination:
the time to the first token of a request for just those, whose prefix nobody has.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from benchmarks import weights
from benchmarks.report import Report
from sllm_actor.cli.show import out
from sllm_actor.testing.node_cluster import NodeCluster, running_cluster

NODES = ("n1", "n2")
# What is drained away.
STREAMS, STREAM_TOKENS, DRAINED_PROMPT_TOKENS, TINY_STREAMS = 20, 500, 64, 3
MODEL, SMALL_MODEL = "opt", "demo"
PROMPTS_TOKENS, TINY_PROMPTS_TOKENS = (64, 256, 1024), (16,)
BEFORE_TOKENS, ANSWER_TOKENS = 48, 240
VOCABULARY_TOKENS, SMALL_VOCABULARY_TOKENS = 50_000, 500
# Of each token in each layer, keys and values: hidden size 768, 12 layers, four bytes each.
KV_BYTES_PER_TOKEN = 2 * 12 * 768 * 4
KNOBS = (
    "host_pool_bytes=1GiB", "engine_threads=1", "listen=tcp://127.0.0.1:0", "max_instances=1", "warm_engines=1",
    "max_requests_per_instance=32", "drain_timeout_s=300",
)  # fmt: skip


class Move(NamedTuple):
    """One move: the gaps between tokens, the one at the hand-over, and what the nodes told of it."""

    usual_gap_s: float
    pause_s: float
    told: dict[str, Any]
    took_s: float
    anew_s: float

    @property
    def pause_in_gaps(self) -> float:
        return max(0.0, self.pause_s - self.usual_gap_s) / self.usual_gap_s


def body_of(prompt: list[int], max_tokens: int, model: str = MODEL) -> dict[str, Any]:
    """Ask for so many tokens, whatever they are."""
    return {
        "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
        "stream": True,
    }  # fmt: skip


async def times_of(
    session: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any],
    request_id: str,
    come: list[float],
    enough: asyncio.Event,
) -> None:
    """Note when each of a stream's events comes, and when there are enough of them to move it."""
    headers = {"X-Request-Id": request_id}
    async with session.post(f"{url}/v1/completions", json=body, headers=headers) as reply:
        if reply.status != 200:
            raise SystemExit(f"{request_id}: {await reply.text()}")
        async for line in reply.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise SystemExit(f"{request_id}: {event['error']}")
                come.append(asyncio.get_running_loop().time())
                if len(come) == BEFORE_TOKENS:
                    enough.set()


async def move(cluster: NodeCluster, draw: random.Random, tokens: int, number: int) -> Move:
    """Stream an answer, move it in the middle, and then ask for as much anew."""
    loop, gateway, request_id = asyncio.get_running_loop(), cluster.nodes["n1"].url, f"move-{tokens}-{number}"
    prompt = [draw.randrange(10, VOCABULARY_TOKENS) for _ in range(tokens)]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
        come, enough = list[float](), asyncio.Event()
        body = body_of(prompt, ANSWER_TOKENS)
        stream = asyncio.create_task(times_of(session, gateway, body, request_id, come, enough))
        await enough.wait()
        begin_s = loop.time()
        async with session.post(f"{gateway}/admin/requests/{request_id}/migrate", json={}) as reply:
            told = await reply.json()
        end_s = loop.time()
        await stream
        if reply.status != 200:
            raise SystemExit(f"{request_id} was not moved: {told}")
        gaps = [(later - earlier, later) for earlier, later in itertools.pairwise(come)]
        # The hand-over is in the move, or its effect at the client a little later.
        around = [gap for gap, at_s in gaps if begin_s <= at_s and at_s - gap <= end_s + 0.5]
        undisturbed = [gap for gap, at_s in gaps if at_s < begin_s]
        fresh = [draw.randrange(10, VOCABULARY_TOKENS) for _ in range(tokens + BEFORE_TOKENS)]
        anew: list[float] = []
        asked_s = loop.time()
        await times_of(session, gateway, body_of(fresh, 1), f"{request_id}-anew", anew, enough)
    out.print(f"{request_id}: {told['rounds']} rounds, {end_s - begin_s:.2f} s, longest gap {max(around):.3f} s")
    return Move(statistics.median(undisturbed), max(around), told, end_s - begin_s, anew[0] - asked_s)


class Drain(NamedTuple):
    """A node's drain: how long it and one resume took, and how long the streams would have gone on there.

    `engines_s` is the processor time of the destination's engines meanwhile. In `anew_s` the same instance computed as
    much anew when nothing else ran: as many prompts, each as long as a stream was when the drain began, all at once. A
    drain can hardly take less, whatever its moves cost.
    """

    streams: int
    took_s: float
    resume_s: float
    would_take_s: float
    engines_s: float
    anew_s: float


def processor_s(pids: Iterable[int]) -> dict[int, float]:
    """Give the processor time of each of some processes so far, but of those that have ended."""
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            # Behind the name, which may have any characters: the 14th and 15th of all fields.
            user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            found[pid] = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return found


async def drain(cluster: NodeCluster, draw: random.Random, streams: int, model: str, vocabulary: int) -> Drain:
    """Begin streams at a node's only instance, and drain the node in their midst."""

    def asked(prompt_tokens: int, max_tokens: int) -> dict[str, Any]:
        return body_of([draw.randrange(10, vocabulary) for _ in range(prompt_tokens)], max_tokens, model)

    loop, gateway = asyncio.get_running_loop(), cluster.nodes["n1"].url
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        begun = []
        for number in range(streams):
            come, enough = list[float](), asyncio.Event()
            body = asked(DRAINED_PROMPT_TOKENS, STREAM_TOKENS)
            task = asyncio.create_task(times_of(session, gateway, body, f"{model}-{number}", come, enough))
            begun.append((task, come, enough))
        await asyncio.gather(*(enough.wait() for _, _, enough in begun))
        engines = processor_s(cluster.nodes["n1"].children())
        begin_s = loop.time()
        async with session.post(f"{gateway}/admin/nodes/n2/drain") as reply:
            told = await reply.json()
        took_s = loop.time() - begin_s
        engines_s = sum(seconds - engines[pid] for pid, seconds in processor_s(engines).items())
        if reply.status != 200 or told["stopped"] != 1 or any(task.done() for task, _, _ in begun):
            raise SystemExit(f"n2 was not drained while all of it ran: {told}")
        gaps = [later - earlier for _, come, _ in begun for earlier, later in itertools.pairwise(come[:BEFORE_TOKENS])]
        left = max(STREAM_TOKENS - sum(at_s < begin_s for at_s in come) for _, come, _ in begun)
        await asyncio.gather(*(task for task, _, _ in begun))
        anew, asked_s = list[float](), loop.time()
        fresh = asked(DRAINED_PROMPT_TOKENS + BEFORE_TOKENS, 1)
        await times_of(session, gateway, fresh, f"{model}-resume", anew, asyncio.Event())
        resume_s, asked_s = anew[0] - asked_s, loop.time()
        fresh_ones = [asked(DRAINED_PROMPT_TOKENS + sum(at_s < begin_s for at_s in come), 1) for _, come, _ in begun]
        await asyncio.gather(
            *(
                times_of(session, gateway, body, f"{model}-anew-{number}", anew, asyncio.Event())
                for number, body in enumerate(fresh_ones)
            )
        )
        anew_s = max(anew) - asked_s
    return Drain(streams, took_s, resume_s, left * statistics.median(gaps), engines_s, anew_s)


def on_n2_alone(cluster: NodeCluster, model: str) -> None:
    """Have the model run on the node that is drained, and nowhere else; the other one has its bytes."""
    n1 = cluster.nodes["n1"]
    n1.call("POST", f"/admin/models/{model}/unload")
    n1.call("POST", "/admin/nodes/n1/cordon")
    while not cluster.shown("n1")["n1"]["cordoned"]:
        pass
    n1.call("POST", "/v1/completions", body_of([10], 1, model) | {"stream": False})
    n1.call("POST", "/admin/nodes/n1/uncordon")
    while cluster.shown("n1")["n1"]["cordoned"]:
        pass


def _drain_rows(report: Report, model: str, made: Drain) -> None:
    for what, seconds in (
        (f"{model}: drain of {made.streams} streams of {STREAM_TOKENS} tokens", made.took_s),
        (f"{model}: one resume", made.resume_s),
        (f"{model}: the streams would have gone on for", made.would_take_s),
        (f"{model}: processor time of the destination's engines", made.engines_s),
        (f"{model}: all of it computed anew, nothing beside it", made.anew_s),
    ):
        value = round(seconds, 3)
        report.row(prompt=DRAINED_PROMPT_TOKENS, measured=what, unit="s", median=value, min=value, max=value, n=1)
    report.ratio(f"{model}.drain_s", [made.took_s])
    report.ratio(f"{model}.drain_less_resume_s", [made.took_s - made.resume_s])
    report.ratio(f"{model}.drain_in_resumes", [made.took_s / made.resume_s])
    report.ratio(f"{model}.drain_in_anew", [made.took_s / made.anew_s])


def run(report: Report, repeats: int, work_dir: Path, tiny: bool) -> None:
    """Move answers to prompts of every length."""
    draw = random.Random(1)
    folder = weights.checkpoint(work_dir, "opt-125m", "fp32", False)
    with (
        tempfile.TemporaryDirectory() as data,
        running_cluster(Path(data), Path(".servers"), NODES, KNOBS) as cluster,
    ):
        cluster.nodes["n1"].deploy(folder.absolute(), MODEL, min_instances=2, max_instances=2)
        while len(cluster.nodes["n1"].call("GET", "/admin/instances")["instances"]) < len(NODES):
            pass
        moves = {
            tokens: [asyncio.run(move(cluster, draw, tokens, number)) for number in range(repeats)]
            for tokens in (TINY_PROMPTS_TOKENS if tiny else PROMPTS_TOKENS)
        }
        cluster.nodes["n1"].deploy(folder.absolute(), MODEL, replace=True)
        cluster.nodes["n1"].deploy("builtin:demo", SMALL_MODEL)
        drained = {}
        # The one costs these cores as much as the streams have tokens; the other shows what the moves take themselves.
        for model, vocabulary in ((MODEL, VOCABULARY_TOKENS), (SMALL_MODEL, SMALL_VOCABULARY_TOKENS)):
            on_n2_alone(cluster, model)
            drained[model] = asyncio.run(drain(cluster, draw, TINY_STREAMS if tiny else STREAMS, model, vocabulary))
            cluster.nodes["n1"].call("POST", "/admin/nodes/n2/uncordon")
    for tokens, made in moves.items():
        _rows(report, tokens, made)
    for model, ended in drained.items():
        _drain_rows(report, model, ended)
    everything = [one for made in moves.values() for one in made]
    report.ratio("pause_in_gaps", [one.pause_in_gaps for one in everything])
    report.ratio("anew_in_gaps", [one.anew_s / one.usual_gap_s for one in everything])
    report.ratio("bytes_per_token", [one.told["bytes_moved"] / one.told["tokens"] for one in everything])
    ordered = sorted(one.pause_in_gaps for one in everything)
    report.ratio("pause_in_gaps.p99", [ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]])
    out.print(f"{len(everything)} moves")


def _rows(report: Report, tokens: int, made: list[Move]) -> None:
    kv_bytes = statistics.median(one.told["tokens"] for one in made) * KV_BYTES_PER_TOKEN
    for what, unit, values in (
        ("usual gap", "s", [one.usual_gap_s for one in made]),
        ("longest gap around the hand-over", "s", [one.pause_s for one in made]),
        ("stop and compute anew", "s", [one.anew_s for one in made]),
        ("from the wish to the hand-over", "s", [one.took_s for one in made]),
        ("rounds", "", [float(one.told["rounds"]) for one in made]),
        ("computed twice", "s", [one.told["recomputed_s"] for one in made]),
        ("moved", "bytes", [float(one.told["bytes_moved"]) for one in made]),
    ):
        report.row(
            prompt=tokens, measured=what, unit=unit, median=round(statistics.median(values), 5),
            min=round(min(values), 5), max=round(max(values), 5), n=len(values),
        )  # fmt: skip
    report.row(
        prompt=tokens, measured="keys and values not moved", unit="bytes", median=kv_bytes, min="", max="", n=len(made)
    )
