"""Streams as a client reads them that may go on with one elsewhere: events, their ids, and the stream's."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from sllm_actor.testing.node_process import NodeProcess

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DONE = b"[DONE]"


class Event(NamedTuple):
    """An event's data, and its id, empty where it has none."""

    data: bytes
    id: str

    def choices(self) -> list[dict[str, Any]]:
        if self.data == DONE:
            return []
        choices: list[dict[str, Any]] = json.loads(self.data).get("choices", [])
        return choices

    def error(self) -> str:
        return "" if self.data == DONE else str(json.loads(self.data).get("error", {}).get("code", ""))


class Reading(NamedTuple):
    """A stream that is being read."""

    stream_id: str
    events: Iterator[Event]


@contextmanager
def reading(
    node: NodeProcess, path: str, body: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
) -> Iterator[Reading]:
    """Ask for a stream, or with no body for the rest of one; what is not read of it is left when this ends."""
    connection = node.connect()
    try:
        data = None if body is None else json.dumps({**body, "stream": True})
        method = "GET" if body is None else "POST"
        connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{response.status} {response.read().decode()}")
        yield Reading(response.headers.get("X-Stream-Id", ""), _events(response))
    finally:
        connection.close()


def _events(response: http.client.HTTPResponse) -> Iterator[Event]:
    data, event_id = b"", ""
    for line in response:
        name, _, value = line.rstrip(b"\n").partition(b": ")
        if name == b"data":
            data = value
        elif name == b"id":
            event_id = value.decode()
        elif not line.strip() and data:
            yield Event(data, event_id)
            data, event_id = b"", ""


def whole(
    node: NodeProcess, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> tuple[str, list[Event]]:
    """Read a stream to its end; give its id and its events."""
    with reading(node, path, body, headers) as stream:
        return stream.stream_id, list(stream.events)


def some(stream: Reading, least: int) -> list[Event]:
    """Read so many events, and more until one has an id: those that come before a stream is written down have none."""
    read = [next(stream.events) for _ in range(least)]
    while not read[-1].id:
        read.append(next(stream.events))
    return read


def rest(node: NodeProcess, stream_id: str, behind: str = "", headers: Mapping[str, str] | None = None) -> list[Event]:
    """Read what follows behind an event, or all of a stream, to its end."""
    last = {"Last-Event-ID": behind} if behind else {}
    with reading(node, f"/v1/streams/{stream_id}", None, {**last, **(headers or {})}) as stream:
        return list(stream.events)


def comparable(events: list[Event], choice: int | None = None) -> list[Any]:
    """Give the events of a choice, or of all and what is behind them, without what may differ.

    That is how many tokens of the prompt were computed for another request, the last digits of log-probabilities, and
    where there are several choices, which of their events comes first.
    """
    found: list[Any] = []
    for event in events:
        if choice is not None and [one["index"] for one in event.choices()] != [choice]:
            continue
        found.append((event.data if event.data == DONE else _rounded(json.loads(event.data)), event.id))
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items() if key != "cached_tokens"}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value
