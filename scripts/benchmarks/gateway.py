"""HTTP in to the first byte of the first event out, with an engine that does nothing, against a bare aiohttp handler.

Streams last a second, twenty events each; one that ends is replaced by a new one, so that as many are always open.
Each server is a process of its own, and this one the client of both, by turns.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast
from urllib.parse import urlsplit

import uvloop

from benchmarks.gateway_server import more_open_files
from benchmarks.report import Report

STREAMS, MANY, SECONDS = 200, 1000, 4.0
BODY = json.dumps({"model": "m", "stream": True, "messages": [{"role": "user", "content": "hello"}]}).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
REQUEST = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


@contextmanager
def server(kind: str) -> Iterator[tuple[str, list[dict[str, float]]]]:
    """Run a server; how late its loop was is in the list at the end."""
    lag: list[dict[str, float]] = []
    command = [sys.executable, "-m", "benchmarks.gateway_server", kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        output = cast(IO[str], process.stdout)
        yield output.readline().strip(), lag
        cast(IO[str], process.stdin).close()
        lag.append(json.loads(output.readline()))


class Client:
    """Keeps a number of streams open and notes what each took to begin."""

    def __init__(self, url: str, streams: int) -> None:
        self._address = urlsplit(url)
        self._streams = streams
        self.first_byte_s: list[float] = []
        self.whole = 0
        self.dropped = 0

    async def run(self, seconds: float) -> None:
        end_s = time.perf_counter() + seconds
        async with asyncio.TaskGroup() as group:
            for number in range(self._streams):
                group.create_task(self._keep_open(number / self._streams, end_s))

    async def _keep_open(self, begin_s: float, end_s: float) -> None:
        # They do not all come at once: a stream lasts a second.
        await asyncio.sleep(begin_s)
        reader, writer = await asyncio.open_connection(self._address.hostname, self._address.port)
        while time.perf_counter() < end_s:
            asked_s = time.perf_counter()
            writer.write(REQUEST)
            head = await reader.readuntil(b"data: ")
            self.first_byte_s.append(time.perf_counter() - asked_s)
            # Ours says with an event that it begins; the end of the chunked body ends both.
            rest = await reader.readuntil(b"\r\n0\r\n\r\n")
            ended = head.startswith(b"HTTP/1.1 200") and rest.count(b"data: ") >= 20 and b"[DONE]" in rest
            self.whole += ended
            self.dropped += not ended
        writer.close()


def p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


def run(report: Report, repeats: int) -> None:
    """Measure both by turns, and then ours with a thousand streams."""
    more_open_files()
    ratios, medians = [], []
    with server("ours") as (our_url, _), server("bare") as (bare_url, _):
        for repeat in range(repeats + 1):
            seen: dict[str, list[float]] = {}
            for name, url in (("ours", our_url), ("bare", bare_url))[:: 1 if repeat % 2 else -1]:
                client = Client(url, STREAMS)
                uvloop.run(client.run(SECONDS))
                seen[name] = client.first_byte_s
                if repeat:
                    _row(report, name, STREAMS, repeat, client)
            if repeat:  # The first one warms both up.
                ratios.append(p99(seen["ours"]) / p99(seen["bare"]))
                medians.append(
                    sorted(seen["ours"])[len(seen["ours"]) // 2] / sorted(seen["bare"])[len(seen["bare"]) // 2]
                )
    report.ratio("gateway.p99_over_bare", ratios)
    report.ratio("gateway.p50_over_bare", medians)
    with server("ours") as (url, lag):
        client = Client(url, MANY)
        uvloop.run(client.run(2 * SECONDS))
    _row(report, "ours", MANY, 1, client, worst_lag_ms=round(lag[0]["worst_s"] * 1e3, 1))


def _row(report: Report, name: str, streams: int, repeat: int, client: Client, worst_lag_ms: float | str = "") -> None:
    report.row(
        system=name, streams=streams, repeat=repeat, whole=client.whole, dropped=client.dropped,
        p50_ms=round(statistics.median(client.first_byte_s) * 1e3, 2),
        p99_ms=round(p99(client.first_byte_s) * 1e3, 2), worst_lag_ms=worst_lag_ms,
    )  # fmt: skip
