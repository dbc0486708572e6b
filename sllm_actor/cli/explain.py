"""`sllm-node explain`: why a request's model was started where it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.markup import escape

from sllm_actor.cli import completion
from sllm_actor.cli.asking import Json, Key, Url, ask
from sllm_actor.cli.client import DEFAULT_URL
from sllm_actor.cli.fitting import Column
from sllm_actor.cli.show import duration, out, print_json, table
from sllm_actor.units import format_bytes

Request = Annotated[
    str,
    typer.Argument(
        metavar="REQUEST_ID", help="What the answer's X-Request-Id header says.", autocompletion=completion.requests
    ),
]


def explain(request_id: Request, url: Url = DEFAULT_URL, api_key: Key = "", as_json: Json = False) -> None:
    """Tell how a request came to its instance: what each node could have done, in how long, and what would change it.

    Example: sllm-node explain req-1234
    """
    path = f"/admin/explain/{quote(request_id, safe='')}"
    answer = ask(url, api_key, lambda client: client.call("GET", path), as_json=as_json, about=request_id)
    if as_json:
        print_json(answer)
        return
    out.print(f"{escape(answer['request_id'])} for [bold]{answer['model']}[/bold]: {escape(answer['text'])}")
    if answer["decision"] is not None:
        _print_decision(answer["decision"])


def _print_decision(decision: Mapping[str, Any]) -> None:
    out.print()
    names = list(dict.fromkeys(term["name"] for one in decision["candidates"] for term in one["terms"]))
    rows = [_row(decision, one, names) for one in decision["candidates"]]
    if rows:
        terms = (Column(name.upper(), 3) for name in names)
        first = (Column("NODE"), Column("ACTION", wraps=True), Column("FROM", 2, wraps=True), Column("ESTIMATE"))
        table((*first, *terms, Column("OF", 4, wraps=True), Column("", 1, wraps=True)), rows)
    if decision["more"]:
        out.print(f"and {decision['more']} more nodes")
    out.print()
    out.print(f"policy {decision['policy']}, waited {duration(decision['waited_s'])} for a place")
    if decision["fetched_s"]:
        out.print(
            f"its bytes were fetched before a device was taken, {duration(decision['fetched_s'])} before it started"
        )
    if decision["given_up"]:
        out.print(f"given up for it: {', '.join(decision['given_up'])}")
    if decision["observed_s"]:
        out.print(
            f"{decision['outcome']} after {duration(decision['observed_s'])},"
            f" of which {duration(decision['predicted_s'])} were expected"
        )
    else:
        out.print(decision["outcome"])
    if decision["flip"] is not None:
        out.print(decision["flip"]["text"])


def _row(decision: Mapping[str, Any], one: Mapping[str, Any], names: list[str]) -> tuple[str, ...]:
    seconds = {term["name"]: _signed(term["seconds"]) for term in one["terms"]}
    note = "chosen" if one == decision["chosen"] else "runner-up" if one == decision["runner_up"] else ""
    action = f"{one['action']} {' '.join(one['leaving'])}".rstrip()
    return (
        one["node"], action, one["tier"], duration(one["estimate_s"]), *(seconds.get(name, "") for name in names),
        _inputs(one), note if one["possible"] else "not tried (again)",
    )  # fmt: skip


def _signed(seconds: float | str) -> str:
    """Write a part of an estimate, which is negative where the page cache was quicker than the disk."""
    return f"-{duration(-seconds)}" if not isinstance(seconds, str) and seconds < 0 else duration(seconds)


def _inputs(one: Mapping[str, Any]) -> str:
    inputs = {name: value for term in one["terms"] for name, value in term["inputs"].items()}
    parts = []
    if inputs.get("size_bytes"):
        parts.append(f"{format_bytes(inputs['size_bytes'])} at {inputs['bytes_per_s'] / 1e9:.2f} GB/s")
    if inputs.get("tokens"):
        parts.append(f"{inputs['tokens']:.0f} tokens to recompute")
    parts.append(f"starts seen: {inputs['starts_seen']:.0f}")
    return ", ".join(parts)
