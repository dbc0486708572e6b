"""Tables, timelines and JSON for the terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console

from sllm_actor.cli.fitting import Column, Row, fitted
from sllm_actor.units import format_bytes, format_rate, format_seconds

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

BAR_CHARACTERS = 40
# Whoever reads a pipe does not want lines that are folded.
PIPE_CHARACTERS = 1000
# No table is wider.
WIDEST_CHARACTERS = 100_000
TIERS = (
    Column("TIER"), Column("MODEL", wraps=True), Column("SIZE", 1), Column("PINNED", 3),
    Column("HELD BY", 4, wraps=True), Column("IDLE", 2),
)  # fmt: skip
# The rows of a start, in the order in which a person thinks of them; what a span is called inside is on the left.
LABELS = {
    "text": "text (template, tokens)",
    "placement": "placement",
    "engine": "engine (warm process)",
    "load": "load",
    "skeleton": "engine: skeleton",
    "map": "engine: map weights",
    "attach": "engine: attach weights",
    "adapter": "adapter",
    "prefill": "prefill",
    "embed": "embed",
}


def print_json(content: Any) -> None:
    """Print JSON on one line, for programs: `forever` for what is infinite, null for what is no number."""
    sys.stdout.write(json.dumps(_finite(content), ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None if math.isnan(content) else "forever"
    return content


def table(columns: Sequence[Column | str], rows: Sequence[Row]) -> None:
    """Print a plain table, or nothing but its head where there are no rows; a column's mere name may be folded."""
    width = out.width if out.is_terminal else PIPE_CHARACTERS
    named = [column if isinstance(column, Column) else Column(column, wraps=True) for column in columns]
    shown = fitted(named, rows, width, may_fold=False)
    # Of a name that is longer than the terminal is wide, the terminal itself begins a line anew: it is copied whole.
    Console(file=out.file, width=WIDEST_CHARACTERS, highlight=False).print(shown)


def print_tiers(tiers: Mapping[str, Any]) -> None:
    """Print what each tier holds: of which model, who has it and for how long, since when nobody has."""
    rows: list[Row] = []
    for tier, used_bytes, size_bytes in (
        ("host", tiers["host_bytes"] - tiers["host_free_bytes"], tiers["host_bytes"]),
        ("ssd", tiers["ssd_used_bytes"], tiers["ssd_quota_bytes"]),
    ):
        rows.append((tier, "", f"{format_bytes(used_bytes)} of {format_bytes(size_bytes)}", "", "", ""))
        rows += [
            (
                "", ", ".join(entry["models"]) or f"(not registered) {entry['model_id']}".rstrip(), _held(entry),
                "pinned" if entry["pinned"] else "", _holders(entry),
                "" if entry["leases"] else duration(entry["idle_s"]),
            )
            for entry in tiers[tier]
        ]  # fmt: skip
    table(TIERS, rows)


def state(status: Mapping[str, Any]) -> str:
    """Write where a model is, and how far a load is."""
    if status["state"] != "loading" or not status["loading_bytes"]:
        return str(status["state"])
    return f"loading {status['loading_bytes'] * 100 // max(1, status['model']['size_bytes'])}%"


def _held(entry: Mapping[str, Any]) -> str:
    if entry["done_bytes"] == entry["size_bytes"]:
        return format_bytes(entry["size_bytes"])
    return f"{format_bytes(entry['done_bytes'])} of {format_bytes(entry['size_bytes'])}"


def _holders(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{holder['who']} for {format_seconds(holder['held_s'])}" for holder in entry["held_by"])


def duration(value: float | str) -> str:
    """Write a duration that may be `forever`."""
    return value if isinstance(value, str) else format_seconds(value)


class Part(NamedTuple):
    """One row of a timeline, in seconds since the request's arrival; `moved` says what bytes it moved."""

    label: str
    begin_s: float
    end_s: float
    moved: str


def timeline_parts(timeline: Mapping[str, Any]) -> list[Part]:
    """Give the parts of a request's start, in the order in which they begin to matter."""
    arrived_s, spans = timeline["arrived_s"], timeline["spans"]
    parts = []
    placed_s = next((span["begin_s"] for span in spans if span["name"] == "placement"), None)
    if placed_s is not None:
        parts.append(Part("queue (arrival to placement)", 0.0, placed_s - arrived_s, ""))
    for span in sorted(spans, key=lambda span: list(LABELS).index(span["name"])):
        parts.append(Part(LABELS[span["name"]], span["begin_s"] - arrived_s, span["end_s"] - arrived_s, _moved(span)))
    last_s = max((part.end_s for part in parts), default=0.0)
    parts.append(Part("first token to the gateway", last_s, timeline["first_token_s"] - arrived_s, ""))
    return parts


def _moved(span: Mapping[str, Any]) -> str:
    if not span["size_bytes"]:
        return ""
    if span["tier"] == "host memory":
        return f"{format_bytes(span['size_bytes'])} were in host memory already"
    if span["tier"] == "page cache in place":
        return f"{format_bytes(span['size_bytes'])} are mapped as they lie in the page cache"
    rate = format_rate(span["size_bytes"], span["end_s"] - span["begin_s"])
    return f"{format_bytes(span['size_bytes'])} from the {span['tier']}, {rate}"


def first_token_s(timeline: Mapping[str, Any]) -> float:
    """Give the seconds from a request's arrival to its first token."""
    return float(timeline["first_token_s"] - timeline["arrived_s"])


def print_timeline(timeline: Mapping[str, Any]) -> None:
    """Print a request's start as a waterfall."""
    total_s = max(first_token_s(timeline), 1e-9)
    kind = "cold" if timeline["cold"] else "warm"
    out.print(f"{kind} start of {timeline['model']}: first token after [bold]{format_seconds(total_s)}[/bold]")
    for part in timeline_parts(timeline):
        left = min(BAR_CHARACTERS - 1, max(0, round(part.begin_s / total_s * BAR_CHARACTERS)))
        width = min(BAR_CHARACTERS - left, max(1, round((part.end_s - part.begin_s) / total_s * BAR_CHARACTERS)))
        bar = " " * left + "█" * width
        spent = format_seconds(max(0.0, part.end_s - part.begin_s))
        out.print(f"  {part.label:<30}{spent:>9}  {bar:<{BAR_CHARACTERS}}  {part.moved}".rstrip())


def purpose_of(model: Mapping[str, Any]) -> str:
    """Say what a model is for, where that is embedding alone."""
    how = model["embedding"]
    if model["generates"] or how is None:
        return ""
    length = "normalized" if how["normalize"] else "not normalized"
    return (
        f"; for embeddings: {how['dimensions']} dimensions, pooling {how['pooling']}, {length}, "
        f"texts of at most {how['max_tokens']} tokens"
    )
