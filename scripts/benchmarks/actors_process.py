"""Child processes that stay up over a benchmark and carry out one command at a time.

Commands and answers are JSON, one a line, over the child's stdin and stdout. A child ends as soon as its stdin
does, so none outlives the benchmark, however that ends.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import select
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import uvloop

CALL_TIMEOUT_S = 120.0
SCRIPTS = Path(__file__).parent.parent
Commands = Mapping[str, Callable[..., Awaitable[Any]]]
# Starts whatever a child is there for; gives what its parent should know, and the commands that it takes.
Opening = Callable[..., Awaitable[tuple[Any, Commands]]]


class ChildEnded(SystemExit):
    """A child ended, or hangs, and has not answered; a benchmark ends with that, unless it can do without the child."""


class Child:
    """A child process, as its parent sees it."""

    def __init__(self, stack: ExitStack, module: str, *arguments: str, python: str = sys.executable) -> None:
        self._name = " ".join((module, *arguments))
        # A session of its own: Ctrl-C reaches the parent alone, and whatever the child starts ends with it.
        self._process = subprocess.Popen(
            [python, "-m", f"benchmarks.{module}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(SCRIPTS)},
            start_new_session=True,
        )
        stack.callback(self.end)
        self.ready = self._answer()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def call(self, command: str, **arguments: Any) -> Any:
        """Have it carry out a command, and wait for the answer."""
        self._begin(command, **arguments)
        return self._answer()

    def watch(self, look: Callable[[], None], period_s: float, command: str, **arguments: Any) -> Any:
        """Have it carry out a command, and call `look` every `period_s` until the answer is there."""
        self._begin(command, **arguments)
        assert self._process.stdout is not None
        look()
        for _ in range(int(CALL_TIMEOUT_S / period_s)):
            if select.select([self._process.stdout], [], [], period_s)[0]:
                break
            look()
        return self._answer()

    def _begin(self, command: str, **arguments: Any) -> None:
        """Have it begin with a command."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # The answer that does not come says the same, and better.
            self._process.stdin.write(json.dumps([command, arguments]).encode() + b"\n")
            self._process.stdin.flush()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], CALL_TIMEOUT_S)[0]:
            raise ChildEnded(f"{self._name} did not answer within {CALL_TIMEOUT_S:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise ChildEnded(f"{self._name} ended; why is written above")
        return json.loads(line)

    def end(self) -> None:
        """Kill it, and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


class _Input(asyncio.Protocol):
    """Stdin of a child, line by line."""

    def __init__(self) -> None:
        self.lines: asyncio.Queue[bytes] = asyncio.Queue()
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self.lines.put_nowait(line)

    def connection_lost(self, exc: Exception | None) -> None:
        os._exit(0)  # The parent has gone, and whatever runs here is of no use to anyone.


async def memory() -> dict[str, int]:
    """Give what this process holds: its resident set, and what Python allocated since `trace`."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"rss": pages * os.sysconf("SC_PAGE_SIZE"), "traced": tracemalloc.get_traced_memory()[0]}


async def trace(on: bool) -> None:
    """Begin to account every allocation of Python's, or cease."""
    if on:
        tracemalloc.start()
    else:
        tracemalloc.stop()


async def _obey(opening: Opening, arguments: list[str], answers: int) -> None:
    source = _Input()
    await asyncio.get_running_loop().connect_read_pipe(lambda: source, sys.stdin)
    ready, commands = await opening(*arguments)
    commands = {"memory": memory, "trace": trace, **commands}
    os.write(answers, json.dumps(ready).encode() + b"\n")
    while True:
        name, values = json.loads(await source.lines.get())
        os.write(answers, json.dumps(await commands[name](**values)).encode() + b"\n")


def serve(**openings: Opening) -> None:
    """Be a child: open what the first argument names, then obey."""
    # Whatever a library prints must not be taken for an answer.
    answers = os.dup(1)
    os.dup2(2, 1)
    uvloop.run(_obey(openings[sys.argv[1]], sys.argv[2:], answers))


class Tally:
    """What the workers of one measurement count, and whether they should go on."""

    __slots__ = ("ages_ns", "count", "running")

    def __init__(self) -> None:
        self.running = True
        self.count = 0
        self.ages_ns: list[int] = []


async def measure(tally: Tally, workers: list[Awaitable[None]], seconds: float) -> dict[str, float]:
    """Run workers together, warm up, and give the rate of what they count, and the ages of items if they note those.

    A worker ends soon after `tally.running` has become false.
    """
    tasks = [asyncio.ensure_future(worker) for worker in workers]
    await asyncio.sleep(0.25 * seconds)
    tally.ages_ns = []
    first, begin_s = tally.count, time.perf_counter()
    await asyncio.sleep(seconds)
    result = {"rate": (tally.count - first) / (time.perf_counter() - begin_s)}
    ages_ns = sorted(tally.ages_ns)
    tally.running = False
    await asyncio.gather(*tasks)
    if ages_ns:
        result |= {f"p{share}": ages_ns[len(ages_ns) * share // 100] / 1000 for share in (50, 99)}
    return result
