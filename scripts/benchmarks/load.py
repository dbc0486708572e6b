"""Checkpoints from files to tensors: ours against its peers and the machine's limits, by turns in one run.

Every system has a process of its own that stays up, and one contract: the time from the call until every tensor is
there and every page of it has been touched. How that is measured is in `load_meter`, what in `load_cases`, by which
calls of the product in `load_api`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import load_device, load_device_run, load_limits
from benchmarks.load_cases import (
    CACHED,
    LIMIT,
    MAIN,
    MEMCPY,
    OPTIMIZED,
    OTHERS,
    OURS,
    PARTS,
    PEERS,
    POOL,
    RATIOS,
    SMALL,
    STEP,
    TWO,
    WATCHED,
    Case,
    chosen,
    in_turn,
)
from benchmarks.load_folders import Folders
from benchmarks.load_systems import CACHED_SHARE, PEERS_PYTHON, Sizes, Systems, Unavailable
from benchmarks.report import Report
from sllm_actor.cli.show import out
from sllm_actor.units import MIB, format_bytes, format_seconds

DEVICE = "device"
NAMES = (*PARTS, DEVICE)
CHUNK_BYTES, TINY_CHUNK_BYTES = 16 * MIB, 2 * MIB
_SIGNIFICANT = 4


class Options(NamedTuple):
    """What a person may choose."""

    work_dir: Path
    only: Sequence[str] = ()
    tiny: bool = False
    peers: bool = True


def run(report: Report, repeats: int, options: Options) -> None:
    """Measure every part, or only those that are named."""
    unknown = set(options.only) - set(NAMES)
    if unknown:
        raise SystemExit(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    parts = options.only or NAMES
    root = options.work_dir / ("load-tiny" if options.tiny else "load")
    peers_python = PEERS_PYTHON if options.peers and Path(PEERS_PYTHON).exists() else None
    if cases := chosen([part for part in parts if part in PARTS]):
        _run_on_host(report, repeats, cases, root, options, peers_python)
    if DEVICE not in parts:
        return
    if missing := load_device.device_missing():
        _row(report, "→ device", OURS, "s", [], missing)
        return
    add_row = partial(_row, report)
    for name, values in load_device_run.run(add_row, repeats, root, options.tiny, peers_python).items():
        report.ratio(name, values)


def _run_on_host(
    report: Report, repeats: int, cases: Sequence[Case], root: Path, options: Options, peers_python: str | None
) -> None:
    library = load_limits.build(root)
    folders = Folders(root, load_limits.Machine(library))
    folders.make(cases, options.tiny, peers_python)
    found: list[dict[Case, dict[str, Any]]] = []
    with ExitStack() as stack:
        systems = Systems(stack, library, folders, _sizes(cases, folders, options.tiny), options.peers)
        _warm_up(systems, cases)
        for repeat in range(repeats):
            found.append(_repeat(systems, in_turn(cases, repeat, repeats), f"{repeat + 1}/{repeats}"))
    report.peer_versions |= systems.versions
    report.machine["pool"] = f"{systems.huge_share:.0%} of the pool in huge pages"
    reasons = systems.failed | folders.failed
    _write_rows(report, cases, found, reasons)
    for name, ratio in RATIOS.items():
        if values := ratio(found):
            report.ratio(name, values)


def _sizes(cases: Sequence[Case], folders: Folders, tiny: bool) -> Sizes:
    chunk_bytes = TINY_CHUNK_BYTES if tiny else CHUNK_BYTES

    def chunked(folder: str) -> int:
        return sum(-(-path.stat().st_size // chunk_bytes) * chunk_bytes for path in folders.weights(folder))

    ours = {case.folder for case in cases if case.system in (OURS, STEP)}
    pool_bytes = max((chunked(folder) for folder in ours), default=chunk_bytes)
    if any(case.state == TWO for case in cases):
        pool_bytes = max(pool_bytes, chunked(MAIN) + chunked(f"{MAIN}-{OPTIMIZED}"))
    small = [chunked(case.folder) for case in cases if case.system == SMALL]
    return Sizes(pool_bytes, max(small, default=0), chunk_bytes)


def _warm_up(systems: Systems, cases: Sequence[Case]) -> None:
    """Have every system load every folder once, and see that all find the same tensors in the same shape."""
    first: dict[str, tuple[Case, list[int]]] = {}
    seen: set[tuple[str, str, str, bool]] = set()
    for case in cases:
        key = (case.system, case.variant, case.folder, case.state == POOL)
        if key in seen:
            continue
        seen.add(key)
        try:
            answer = systems.warm(case)
        except Unavailable as why:
            out.print(f"{case.label}: not measured: {why}")
            continue
        if "digest" not in answer:
            continue
        other, expected = first.setdefault(case.shape, (case, answer["digest"]))
        if answer["digest"] != expected:
            wrong = f"finds other tensors than {other.label}: {answer['digest']}, not {expected}"
            raise SystemExit(f"{case.label} in {case.folder} {wrong}")
        systems.maps_files[case.system, case.folder] = answer["maps_files"]


def _repeat(systems: Systems, cases: Sequence[Case], label: str) -> dict[Case, dict[str, Any]]:
    found: dict[Case, dict[str, Any]] = {}
    for case in cases:
        try:
            answer = systems.measure(case)
        except Unavailable:
            continue  # The report's row says why.
        found[case] = answer | {"maps_files": systems.maps_files.get((case.system, case.folder), False)}
        value = format_seconds(answer["s"])
        huge = f" ({answer['huge_share']:.0%} cached in huge pages)" if "huge_share" in answer else ""
        out.print(f"{label} {case.state}, {case.shape}: {case.label} {value}{huge}")
    return found


def _write_rows(
    report: Report, cases: Sequence[Case], found: Sequence[dict[Case, dict[str, Any]]], reasons: dict[str, str]
) -> None:
    for case in cases:
        answers = [each[case] for each in found if case in each]
        measured = f"{case.state}, {case.shape}"
        reason = reasons.get(case.system) or reasons.get(case.layout, "")
        if case.state == WATCHED:
            values = [answer["beyond_pool_mib"] for answer in answers]
            _row(report, "memory beyond the pool", case.label, "MiB", values, _looks(answers))
            continue
        note = _note(case, answers[-1]) if answers else ""
        _row(report, measured, case.label, "s", [answer["s"] for answer in answers], reason or note)
    _write_more(report, cases, found, "processor time", "CPU s/GB", _cpu_s_per_gb)
    _write_more(report, cases, found, "touching again", "s", lambda answer: float(answer["again_s"]))


def _write_more(
    report: Report,
    cases: Sequence[Case],
    found: Sequence[dict[Case, dict[str, Any]]],
    what: str,
    unit: str,
    value: Callable[[dict[str, Any]], float],
) -> None:
    """Add what the processes measured beside the time."""
    for case in cases:
        if case.system in (LIMIT, MEMCPY) or case.state == WATCHED or case.shape in OTHERS:
            continue
        answers = [each[case] for each in found if case in each]
        if answers:
            _row(report, f"{what}: {case.state}, {case.shape}", case.label, unit, [value(each) for each in answers], "")


def _cpu_s_per_gb(answer: dict[str, Any]) -> float:
    return float(answer["cpu_s"] / answer["size_bytes"] * 1e9)


def _looks(answers: Sequence[dict[str, Any]]) -> str:
    looks = min((answer["looks"] for answer in answers), default=0)
    return f"anonymous memory and page tables, the peak of at least {looks} looks, and what stays in the page cache"


def _note(case: Case, answer: dict[str, Any]) -> str:
    """Say how fast that was, by which ways ours got its bytes, and whether a peer mapped its files."""
    parts = [f"{answer['size_bytes'] / answer['s'] / 1e9:.2f} GB/s"]
    parts += [
        f"{name.removesuffix('_bytes')} {format_bytes(count)}" for name, count in answer.get("report", {}).items()
    ]
    if case.state in (CACHED, POOL) and answer.get("device_bytes", 0) > CACHED_SHARE * answer["size_bytes"]:
        parts.append(f"{format_bytes(answer['device_bytes'])} from the device all the same")
    if "huge_share" in answer and (answer["maps_files"] or "in_place_bytes" in answer.get("report", {})):
        parts.append(f"{answer['huge_share']:.0%} of it cached in huge pages the last time")
    if answer["maps_files"] and case.system in PEERS:
        parts.append("maps the files")
    return ", ".join(parts)


def _row(report: Report, measured: str, system: str, unit: str, values: Sequence[float], note: str) -> None:
    spread = dict.fromkeys(("median", "min", "max"), "")
    if values:
        numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        spread = {name: f"{number:.{_SIGNIFICANT}g}" for name, number in numbers.items()}
    report.row(
        measured=measured,
        system=system,
        unit=unit,
        **{name: float(text) if text else "" for name, text in spread.items()},
        n=len(values),
        note=note,
    )
