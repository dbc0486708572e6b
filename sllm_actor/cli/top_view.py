"""What `sllm-node top` draws of a look: a head, then nodes, starts, instances and streams, as far as there is room.

Pure: the same look, rates and size give the same lines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.text import Text

from sllm_actor.cli.fitting import Column, Row, fitted, shares
from sllm_actor.cli.seen import Seen, SeenMember, SeenModel
from sllm_actor.cli.token_rates import TokenRates, is_streaming, is_waiting
from sllm_actor.units import format_bytes, format_seconds

BAR_CHARACTERS = 10
# Of a section: the blank line above it and its columns' names.
AROUND_ROWS = 2
# With one row, and how many more there are.
LEAST_LINES = 4
NODES = (
    Column("NODE"), Column("STATE", 1), Column("ROLES", 6), Column("RUNS", 2), Column("REQUESTS", 3),
    Column("HOST MEMORY", 4), Column("SSD", 5),
)  # fmt: skip
STARTS = (Column("STARTING"), Column("AT", 1), Column("HAS ARRIVED", 1), Column("FOR", 2), Column("WAIT FOR IT", 3))
INSTANCES = (
    Column("INSTANCE"), Column("MODEL", 3), Column("NODE", 2), Column("STATE", 1),
    Column("REQUESTS", 4, right=True), Column("TOKENS/S", 1, right=True),
)  # fmt: skip
STREAMS = (
    Column("STREAM"), Column("MODEL", 3), Column("NODE", 2), Column("TOKENS", 4, right=True),
    Column("TOKENS/S", 1, right=True), Column("FIRST AFTER", 6, right=True), Column("FOR", 5, right=True),
)  # fmt: skip


class Glance(NamedTuple):
    """What there is to draw at a moment, which is `now_s` on the node's clock; `trouble` says why it is an old one."""

    url: str
    seen: Seen
    rates: TokenRates
    now_s: float
    trouble: str = ""


class Section(NamedTuple):
    """A table with all its rows, the most interesting ones first."""

    columns: Sequence[Column]
    rows: Sequence[Row]


def draw(glance: Glance, width: int, height: int | None) -> RenderableType:
    """Draw a glance into so many columns and lines; into as many lines as it takes where no `height` is given."""
    head = _head(glance)
    sections = [one for one in _sections(glance) if one.rows]
    wanted = [AROUND_ROWS + len(one.rows) for one in sections]
    room = sum(wanted) if height is None else height - len(head)
    parts: list[RenderableType] = [*head]
    for section, lines in zip(sections, shares(wanted, room, LEAST_LINES), strict=True):
        if lines:
            parts += [Text(""), *_drawn(section, width, lines - AROUND_ROWS)]
    return Group(*parts)


def _drawn(section: Section, width: int, rows: int) -> list[RenderableType]:
    if rows >= len(section.rows):
        return [fitted(section.columns, section.rows, width)]
    shown = section.rows[: rows - 1]
    return [fitted(section.columns, shown, width), Text(f"and {len(section.rows) - len(shown)} more", "dim")]


def _head(glance: Glance) -> list[Text]:
    seen, requests = glance.seen, glance.seen.requests
    title = Text(no_wrap=True, overflow="ellipsis")
    title.append(seen.node.node, "bold").append(f" at {glance.url}: ").append_text(_condition(glance))
    facts = [
        _counted(len(seen.nodes), "node"),
        f"{len(seen.instances)} of {sum(one.slots for one in seen.nodes)} instances",
        _counted(sum(map(is_streaming, requests)), "stream"), f"{sum(map(is_waiting, requests))} waiting",
        f"{glance.rates.in_all:.0f} tokens/s",
    ]  # fmt: skip
    if failed := sum(seen.node.failed_starts.values()):
        facts.append(_counted(failed, "failed start"))
    told = [title, Text(", ".join(facts), no_wrap=True, overflow="ellipsis")]
    return told + [Text(glance.trouble, "bold red", no_wrap=True, overflow="ellipsis")] * bool(glance.trouble)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _condition(glance: Glance) -> Text:
    seen = glance.seen
    if glance.trouble:
        return Text("as it was", "dim")
    if seen.problems:
        return Text("; ".join(f"{name}: {problem}" for name, problem in seen.problems.items()), "yellow")
    silent = [one.node for one in seen.nodes if not one.reported]
    if silent:
        return Text(f"no report from {', '.join(silent)}", "yellow")
    return Text("healthy", "green") if seen.node.ready else Text("not ready", "yellow")


def _sections(glance: Glance) -> list[Section]:
    return [
        Section(NODES, _nodes(glance.seen)),
        Section(STARTS, _starts(glance)),
        Section(INSTANCES, _instances(glance)),
        Section(STREAMS, _streams(glance)),
    ]


def _nodes(seen: Seen) -> list[Row]:
    sizes = {model.fingerprint: model.size_bytes for model in seen.models}
    return [_node(one, seen, sizes) for one in seen.nodes]


def _node(node: SeenMember, seen: Seen, sizes: Mapping[str, int]) -> Row:
    words = ["ready" if node.reported else "silent"] + ["leads"] * node.leads + ["cordoned"] * node.cordoned
    roles = "all" if len(node.roles) == 3 else ",".join(node.roles)
    if not node.reported:
        return (node.node, ", ".join(words), roles, "", "", "", "")
    tiers = seen.tiers if node.node == seen.node.node else None
    held = sum(sizes.get(one, 0) for one in node.host_fingerprints)
    if tiers is not None:
        held = tiers.host_bytes - tiers.host_free_bytes
        ssd = f"{format_bytes(tiers.ssd_used_bytes)} of {format_bytes(tiers.ssd_quota_bytes)}"
    else:
        # Of another node is known which registered models it has, and no quota.
        ssd = format_bytes(sum(sizes.get(one, 0) for one in node.ssd_fingerprints))
    host = f"{format_bytes(held)} of {format_bytes(node.host_pool_bytes)}"
    return (
        node.node, ", ".join(words), roles, f"{node.instances} of {node.slots}", str(node.active), host, ssd
    )  # fmt: skip


def _starts(glance: Glance) -> list[Row]:
    """List the models that are being started: by any node, or for a request of this one that waits."""
    seen, waiting = glance.seen, [one for one in glance.seen.requests if is_waiting(one)]
    at: dict[str, list[str]] = {}
    for node in seen.nodes:
        for model in node.starting:
            at.setdefault(model, []).append(node.node)
    loading = [one.name for one in seen.models if one.state == "loading"]
    counts = Counter(seen.node.waiting)
    models = {model.name: model for model in seen.models}
    since_s = {one.model: one.arrived_s for one in sorted(waiting, key=lambda one: -one.arrived_s)}
    rows: list[Row] = []
    for name in dict.fromkeys([*at, *loading, *counts]):
        waited = format_seconds(max(0.0, glance.now_s - since_s[name])) if name in since_s else ""
        place = ", ".join(at.get(name, ())) or "no place yet"
        rows.append((name, place, _arrived(models.get(name)), waited, str(counts[name])))
    return rows


def _arrived(model: SeenModel | None) -> str:
    """Draw how much of a load is there; nothing where this node does not load it."""
    if model is None or model.state != "loading" or not model.size_bytes:
        return ""
    part = min(1.0, model.loading_bytes / model.size_bytes)
    filled = round(part * BAR_CHARACTERS)
    return f"{'█' * filled}{'░' * (BAR_CHARACTERS - filled)} {part:4.0%} of {format_bytes(model.size_bytes)}"


def _instances(glance: Glance) -> list[Row]:
    rates = glance.rates.instances
    rows = sorted(glance.seen.instances, key=lambda one: (-one.active, one.instance_id))
    return [
        (
            one.instance_id, one.model, one.node, "busy" if one.active else "idle", str(one.active),
            f"{rates.get(one.instance_id, 0.0):.1f}",
        )
        for one in rows
    ]  # fmt: skip


def _streams(glance: Glance) -> list[Row]:
    running = sorted(filter(is_streaming, glance.seen.requests), key=lambda one: -one.arrived_s)
    return [
        (
            one.request_id, one.model, one.node, str(one.generated_tokens),
            f"{glance.rates.requests.get(one.request_id, 0.0):.1f}",
            format_seconds(one.first_token_s - one.arrived_s),
            format_seconds(max(0.0, glance.now_s - one.arrived_s)),
        )
        for one in running
    ]  # fmt: skip
