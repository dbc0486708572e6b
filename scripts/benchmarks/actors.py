"""Actors: asks, tells, streams and bulk against the raw limit, xoscar and a bare queue, all by turns in one run.

Every system has a server and a client process, which stay up; the client measures one thing at a time over one
loopback TCP connection. What raw is, and what it leaves out, is written in `actors_raw_plain`, `actors_raw_bulk` and
`actors_raw_tuned`.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from benchmarks.actors_process import Child
from benchmarks.report import Report
from sllm_actor.cli.show import out
from sllm_actor.units import KIB, MIB

# `scripts/bench` makes it: what xoscar brings along would slow the imports of others down.
PEERS_PYTHON = ".venv-peers-actors/bin/python"
ITEM_BYTES = 100
STREAMS = {"streams": 100, "item_bytes": ITEM_BYTES}
PACE = {**STREAMS, "period_s": 0.02}
# The streams that go on beside the one that stalls.
OTHERS = {"streams": 10, "item_bytes": ITEM_BYTES, "period_s": 0.02}
STALLED_ITEM_BYTES = {"100 B": ITEM_BYTES, "64 KiB": 64 * KIB}
STALL_ASKS = {"outstanding": 64, "item_bytes": ITEM_BYTES}
IDLE_ACTORS = 10_000
OURS, RAW, TUNED, XOSCAR, QUEUE = "ours", "raw", "raw_tuned", "xoscar", "queue"


class Part(NamedTuple):
    """One measurement: a command that several systems carry out, and what is compared."""

    name: str
    command: str
    arguments: dict[str, Any]
    systems: tuple[str, ...]
    # What a ratio is called, and the system that ours is divided by.
    ratios: dict[str, str]
    unit: str = "asks/s"
    value: str = "rate"


def _ask(name: str, outstanding: int, systems: tuple[str, ...], ratios: dict[str, str]) -> Part:
    return Part(name, "ask", {"outstanding": outstanding, "item_bytes": ITEM_BYTES}, systems, ratios)


REMOTE = (
    _ask("ask1", 1, (OURS, RAW, XOSCAR), {"ask1.share_of_raw": RAW}),
    _ask(
        "ask64",
        64,
        (OURS, RAW, TUNED, XOSCAR),
        {"ask64.share_of_raw": RAW, "ask64.share_of_raw_tuned": TUNED, "ask64.over_xoscar": XOSCAR},
    ),
    _ask("ask256", 256, (OURS, RAW), {"ask256.share_of_raw": RAW}),
    Part("tell", "tell", {"tellers": 2, "item_bytes": ITEM_BYTES}, (OURS, RAW, XOSCAR), {}, "tells/s"),
    Part("stream100", "flood", {**STREAMS, "burst": False}, (OURS, RAW), {"stream100.share_of_raw": RAW}, "items/s"),
    Part(
        "burst100",
        "flood",
        {**STREAMS, "burst": True},
        (OURS, TUNED),
        {"burst100.share_of_raw_tuned": TUNED},
        "items/s",
    ),
    Part("paced", "paced", PACE, (OURS, RAW), {"paced.p99_over_raw": RAW}, "µs", "p99"),
    Part("bulk", "bulk", {"outstanding": 1, "payload_bytes": MIB}, (OURS, RAW), {"bulk.share_of_raw": RAW}),
    Part(
        "mixed",
        "mixed",
        {**PACE, "outstanding": 4, "payload_bytes": MIB},
        (OURS, RAW),
        {"mixed.p99_over_raw": RAW},
        "µs",
        "p99",
    ),
)
LOCAL = (
    _ask("local_ask", 64, (OURS, QUEUE), {"local_ask.share_of_queue": QUEUE}),
    _ask("local_ask1", 1, (OURS, QUEUE), {"local_ask1.share_of_queue": QUEUE}),
    Part("local_tell", "tell", {"tellers": 2, "item_bytes": ITEM_BYTES}, (OURS,), {}, "tells/s"),
    Part("local_stream", "flood", {"streams": 1, "item_bytes": ITEM_BYTES, "burst": True}, (OURS,), {}, "items/s"),
)
NAMES = (*(part.name for part in (*REMOTE, *LOCAL)), "stall", "idle")


class Systems:
    """The processes of one run, each started when it is first needed."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._pairs: dict[str, tuple[Child, Child]] = {}
        self._local: Child | None = None

    def pair(self, system: str) -> tuple[Child, Child]:
        """Give the server and the client of a system."""
        if system not in self._pairs:
            python = PEERS_PYTHON if system == XOSCAR else sys.executable
            server = Child(self._stack, f"actors_{system}", "server", python=python)
            addresses = server.ready if isinstance(server.ready, list) else [server.ready]
            client = Child(self._stack, f"actors_{system}", "client", *addresses, python=python)
            self._pairs[system] = (server, client)
        return self._pairs[system]

    def measure(self, part: Part, system: str, seconds: float) -> dict[str, float]:
        """Have one system carry out one part."""
        child, command = self.pair(system)[1] if part in REMOTE else self._one_process(), part.command
        if system == QUEUE:
            command = f"queue_{command}"
        result: dict[str, float] = child.call(command, **part.arguments, seconds=seconds)
        return result

    def _one_process(self) -> Child:
        if self._local is None:
            self._local = Child(self._stack, "actors_local", "both")
        return self._local

    def idle_bytes(self, traced: bool) -> float:
        """Give what an idle actor takes, from a process of its own."""
        with ExitStack() as stack:
            size_bytes: float = Child(stack, "actors_local", "idle").call("spawn", actors=IDLE_ACTORS, traced=traced)
            return size_bytes


class Results:
    """The values of every repeat, by what was measured, in which case or of which system."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str, str], list[float]] = {}
        self.ratios: dict[str, list[float]] = {}

    def add(self, measured: str, system: str, unit: str, value: float) -> None:
        self.values.setdefault((measured, system, unit), []).append(value)

    def ratio(self, name: str, value: float) -> None:
        self.ratios.setdefault(name, []).append(value)

    def write(self, report: Report) -> None:
        """Put the medians into the report."""
        for (measured, system, unit), values in self.values.items():
            spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
            report.row(
                measured=measured,
                system=system,
                unit=unit,
                **{name: round(value, 1) for name, value in spread.items()},
            )
        for name, values in self.ratios.items():
            report.ratio(name, values)


def _measure_part(systems: Systems, results: Results, part: Part, turn: int, seconds: float) -> str:
    """Measure a part on each of its systems, and say what came out."""
    found: dict[str, dict[str, float]] = {}
    for system in part.systems if turn % 2 == 0 else reversed(part.systems):
        found[system] = systems.measure(part, system, seconds)
    for system in part.systems:
        for value, number in found[system].items():
            if value != "rate":
                results.add(f"{part.name}, age {value}", system, "µs", number)
            elif number:  # A paced stream has no rate to speak of; what goes on beside it may.
                results.add(part.name, system, part.unit if part.value == "rate" else "asks/s", number)
    for name, peer in part.ratios.items():
        results.ratio(name, found[OURS][part.value] / found[peer][part.value])
    return ", ".join(f"{system} {found[system][part.value]:,.0f}" for system in part.systems) + f" {part.unit}"


def _measure_stall(systems: Systems, results: Results, turn: int, seconds: float) -> str:
    """Measure asks before and while a reader stalls, and then, with every allocation accounted, what both ends hold."""
    shares = {}
    cases = list(STALLED_ITEM_BYTES.items())
    for case, item_bytes in cases if turn % 2 == 0 else reversed(cases):
        shares[case] = _stalled_share(systems, results, case, item_bytes, seconds)
        _stalled_growth(systems, results, case, item_bytes, seconds)
    results.ratio("stall.other_share", min(shares.values()))
    return ", ".join(f"{case} items: asks go on at {share:.2f}" for case, share in shares.items())


def _stalled_share(systems: Systems, results: Results, case: str, item_bytes: int, seconds: float) -> float:
    server, client = systems.pair(OURS)
    client.call("others_begin", **OTHERS)
    before = client.call("ask", **STALL_ASKS, seconds=seconds)["rate"]
    held = server.call("memory")["rss"], client.call("memory")["rss"]
    client.call("stall_begin", item_bytes=item_bytes)
    during = client.call("ask", **STALL_ASKS, seconds=seconds)["rate"]
    for end, child, had in (("server", server, held[0]), ("client", client, held[1])):
        results.add(f"stall.{end}_rss_growth_bytes, {case} items", OURS, "B", child.call("memory")["rss"] - had)
    client.call("stall_end")
    if not client.call("others_end"):
        raise SystemExit("the streams beside the stalled one brought nothing")
    results.add(f"stall, asks before, {case} items", OURS, "asks/s", before)
    results.add(f"stall, asks during, {case} items", OURS, "asks/s", during)
    return float(during / before)


def _stalled_growth(systems: Systems, results: Results, case: str, item_bytes: int, seconds: float) -> None:
    ends = dict(zip(("server", "client"), systems.pair(OURS), strict=True))
    client = ends["client"]
    for child in ends.values():
        child.call("trace", on=True)
    client.call("others_begin", **OTHERS)
    client.call("ask", **STALL_ASKS, seconds=0.25 * seconds)
    held = {end: child.call("memory")["traced"] for end, child in ends.items()}
    client.call("stall_begin", item_bytes=item_bytes)
    client.call("ask", **STALL_ASKS, seconds=0.25 * seconds)
    for end, child in ends.items():
        growth_bytes = child.call("memory")["traced"] - held[end]
        results.add(f"stall.{end}_growth_bytes, {case} items", OURS, "B", growth_bytes)
    client.call("stall_end")
    client.call("others_end")
    for child in ends.values():
        child.call("trace", on=False)


def _measure_idle(systems: Systems, results: Results, turn: int, seconds: float) -> str:
    rss_bytes = systems.idle_bytes(traced=False)
    results.add("idle_actor_bytes, resident", OURS, "B", rss_bytes)
    if turn == 0:
        results.add("idle_actor_bytes, accounted by tracemalloc", OURS, "B", systems.idle_bytes(traced=True))
    return f"{rss_bytes:,.0f} B an actor"


def run(report: Report, repeats: int, only: Sequence[str], seconds: float) -> None:
    """Measure every part, or only those that are named."""
    unknown = set(only) - set(NAMES)
    if unknown:
        raise SystemExit(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    report.peer_versions["xoscar"] = subprocess.run(
        [PEERS_PYTHON, "-c", "from importlib.metadata import version; print(version('xoscar'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    results = Results()
    chosen = only or NAMES
    parts = [part for part in (*REMOTE, *LOCAL) if part.name in chosen]
    special: dict[str, Callable[[Systems, Results, int, float], str]] = {"stall": _measure_stall, "idle": _measure_idle}
    with ExitStack() as stack:
        systems = Systems(stack)
        for part in parts:  # Warms every process, and is not counted.
            for system in part.systems:
                systems.measure(part, system, 0.2 * seconds)
        for turn in range(repeats):
            for part in parts:
                said = _measure_part(systems, results, part, turn, seconds)
                out.print(f"{turn + 1}/{repeats} {part.name}: {said}")
            for name, measure in special.items():
                if name in chosen:
                    out.print(f"{turn + 1}/{repeats} {name}: {measure(systems, results, turn, seconds)}")
    results.write(report)
