"""What the fork server of `test_forking` imports, and what its children do."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path


def preload() -> None:
    """Leave a mark that every child inherits."""
    sys.preloaded_by = os.getpid()  # type: ignore[attr-defined]


def leave(_: Sequence[int]) -> int:
    return 7


def fail(_: Sequence[int]) -> int:
    sys.stderr.close()
    raise ZeroDivisionError


def end_by_signal(_: Sequence[int]) -> int:
    os.kill(os.getpid(), signal.SIGUSR1)
    return 0


def wait(fds: Sequence[int]) -> int:
    """Say which process it is and which preloaded, then wait for the other end to go."""
    os.write(fds[0], f"{os.getpid()} {sys.preloaded_by}\n".encode())  # type: ignore[attr-defined]
    os.read(fds[0], 1)
    return 0


def list_descriptors(fds: Sequence[int]) -> int:
    """Write what this process has open beside the first three, its own listing and what it was given."""
    found = [int(name) for name in os.listdir("/proc/self/fd")]
    others = [fd for fd in found if fd > 2 and fd not in fds and os.path.exists(f"/proc/self/fd/{fd}")]
    os.write(fds[0], f"{len(fds)} {others}\n".encode())
    return 0


def tell(fds: Sequence[int]) -> int:
    """Write what this process has from its node, and to both outputs."""
    facts = {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "import_path": sys.path,
        "processors": sorted(os.sched_getaffinity(0)),
        "name": Path("/proc/self/comm").read_text().strip(),
    }
    os.write(fds[0], json.dumps(facts).encode())
    print("to the output")
    print("to the errors", file=sys.stderr)
    return 0


ENTRIES = {
    "leave": leave,
    "fail": fail,
    "signal": end_by_signal,
    "wait": wait,
    "descriptors": list_descriptors,
    "tell": tell,
}
