"""Asks a node as a client with streaming does, and times the first token."""

from __future__ import annotations

import http.client
import json
import secrets
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from benchmarks.report import Report
from sllm_actor.cli.show import timeline_parts
from sllm_actor.testing.node_process import NodeProcess


def first_token(node: NodeProcess, model: str, prompt: str, *, chat: bool = False) -> tuple[float, dict[str, Any]]:
    """Time one token over HTTP, from the request to its text; give the timeline, too."""
    body: dict[str, Any] = {"model": model, "stream": True, "max_tokens": 1, "temperature": 0}
    if chat:
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": prompt}]
    else:
        path, body["prompt"] = "/v1/completions", prompt
    request_id = f"bench-{secrets.token_hex(6)}"
    headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
    connection = http.client.HTTPConnection(urlsplit(node.url).netloc, timeout=120)
    begin_s = time.perf_counter()
    connection.request("POST", path, json.dumps(body), headers)
    response = connection.getresponse()
    while not _has_text(response.readline()):
        pass
    took_s = time.perf_counter() - begin_s
    response.read()
    connection.close()
    timeline: dict[str, Any] = node.call("GET", f"/admin/requests/{request_id}")
    return took_s, timeline


def _has_text(line: bytes) -> bool:
    """Tell whether an event brings the first token: text, or the end of an answer whose token has none."""
    if not line:
        raise SystemExit("the stream ended without a token")
    if not line.startswith(b"data: {"):
        return False
    event = json.loads(line[6:])
    if "error" in event:
        raise SystemExit(event["error"]["message"])
    choice = event["choices"][0]
    return bool(choice.get("text") or choice.get("delta", {}).get("content") or choice["finish_reason"])


def see_start(timeline: Mapping[str, Any], expected: Mapping[str, int]) -> None:
    """See that it was a cold start whose bytes came from these tiers, and from no other."""
    tiers = {span["tier"]: span["size_bytes"] for span in timeline["spans"] if span["name"] == "load"}
    if not timeline["cold"] or tiers != expected:
        raise SystemExit(f"not the start that was to be measured: cold={timeline['cold']}, bytes {tiers}")


def part_rows(report: Report, model: str, timeline: Mapping[str, Any]) -> None:
    """Add the parts of one start to a report."""
    for part in timeline_parts(timeline):
        label = f"{part.label} (last start, from {part.begin_s:.4f} s) {part.moved}".strip()
        report.row(model=model, part=label, ours_s=round(part.end_s - part.begin_s, 4), fresh_process_s="")
