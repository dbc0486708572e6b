"""A real node as a process, for tests, the demo and benchmarks: start it, use it, stop it, see that it is gone."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

CLI = Path(sys.executable).with_name("sllm-node")
ANSWER_TIMEOUT_S = 300
STOP_TIMEOUT_S = 400


class Reply(NamedTuple):
    """An HTTP answer with its body read."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class NodeProcess:
    """A running node; `url` is where it listens, `address` where other nodes find it, if they do."""

    def __init__(self, process: subprocess.Popen[str], url: str, address: str = "") -> None:
        self.process = process
        self.url = url
        self.address = address

    def connect(self) -> http.client.HTTPConnection:
        """Open a connection of one's own."""
        return http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=ANSWER_TIMEOUT_S)

    def request(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Reply:
        """Ask once; `body` is sent as it is where it is bytes, else as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = self.connect()
        try:
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            return Reply(response.status, dict(response.headers), response.read())
        finally:
            connection.close()

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Ask and give the JSON answer of a success; anything else fails with what was said."""
        reply = self.request(method, path, body)
        if reply.status >= 300:
            raise RuntimeError(f"{method} {path}: {reply.status} {reply.body.decode(errors='replace')}")
        return reply.json()

    def deploy(self, source: Path | str, name: str, **options: Any) -> dict[str, Any]:
        """Register a model and give its description."""
        answer = self.call("POST", "/admin/models", {"source": str(source), "name": name, **options})
        model: dict[str, Any] = answer["model"]
        return model

    def chat(self, model: str, prompt: str, **options: Any) -> str:
        """Ask a chat model and give its whole answer."""
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], **options}
        text: str = self.call("POST", "/v1/chat/completions", body)["choices"][0]["message"]["content"]
        return text

    def stream(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> Generator[dict[str, Any], None, None]:
        """Ask with streaming and give each event as it comes; closing this leaves the node in mid-answer."""
        connection = self.connect()
        try:
            data = json.dumps({**body, "stream": True})
            connection.request("POST", path, data, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"{response.status} {response.read().decode(errors='replace')}")
            for line in response:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])
        finally:
            connection.close()

    def children(self) -> list[int]:
        """List the processes that the node has started, or has from a template, and theirs."""
        found = [self.process.pid]
        for pid in found:
            for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):  # It may end between being listed and being looked at.
                    found += [int(child) for child in tasks.read_text().split()]
            if pid == self.process.pid:
                found += [held for held in held_by_pidfd(pid) if held not in found]
        return found[1:]

    def stop(self) -> tuple[int, list[int]]:
        """Stop it with SIGTERM; give its exit status and the processes that it left behind."""
        children = self.children()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_TIMEOUT_S), living(children)


def held_by_pidfd(pid: int) -> list[int]:
    """List the living processes that a process has a descriptor of."""
    held = []
    for info in Path(f"/proc/{pid}/fdinfo").glob("*"):
        with contextlib.suppress(OSError):
            held += [int(line[4:]) for line in info.read_text().splitlines() if line.startswith("Pid:")]
    return [found for found in held if found > 0]


def living(pids: list[int]) -> list[int]:
    """Give those of the processes that have not ended; the dead whom init has not collected yet have."""
    return [pid for pid in pids if _state(pid) not in "ZX"]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


@contextmanager
def running_node(
    data_dir: Path,
    *knobs: str,
    log: IO[str] | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    log_level: str = "warning",
) -> Iterator[NodeProcess]:
    """Start a node on a free port and wait until it is ready; it is killed if it still runs at the end.

    `environment` is added to this process's; `folder` is where the node is started.
    """
    command = [str(CLI), "start", "--json", "--port", "0", "--data-dir", str(data_dir)]
    command += ["--log-level", log_level]
    for knob in knobs:
        command += ["--set", knob]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder, env={**os.environ, **(environment or {})}
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the node ended before it was ready, with exit status {process.wait()}")
        first = json.loads(line)
        if "error" in first:
            raise RuntimeError(f"the node did not start: {first['error']['message']}")
        yield NodeProcess(process, first["url"], first["address"])
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
